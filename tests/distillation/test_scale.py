"""plan_distillation() against what tiny models hold and send on 2 and 4 ranks, and against docs/scale.md."""

import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillation import scale_ranks
from distillation.scale_ranks import checkpoint_layers, kept_bytes_of
from minitron_kernels.distillation import plan_distillation
from minitron_kernels.distillation.scale import tables as scale_tables
from minitron_kernels.distillation.scale.activations import COUNTED, kept_bytes, layer_bytes
from minitron_kernels.distillation.scale.loss import STOCK_LOGIT_BYTES, exchanges
from minitron_kernels.distillation.scale.parts import Collective, size_text
from minitron_kernels.distillation.scale.shape import elements, shape_of
from pruning.plans import GQA, plan_of
from pruning.tiny_models import tiny_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
pytest.importorskip("transformers", reason="configs and tiny models are those of transformers")


@pytest.fixture(scope="module", name="reports")
def reports_fixture(tmp_path_factory):
    return scale_ranks.start(tmp_path_factory.mktemp("ranks"))


@pytest.mark.native
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("case", scale_ranks.CASES)
def test_what_ranks_hold_and_send(reports, case):
    """The first rank, which has most, to the byte; the others no more, in as many collectives."""
    for rank, report in enumerate(reports):
        found = report.get(case, "not reached")
        assert isinstance(found, dict), f"rank {rank}: {found}"
        wrong = {
            what: pair
            for what, pair in found.items()
            if (pair[0] != pair[1] if rank == 0 or what.endswith("number") else pair[0] < pair[1])
        }
        assert not wrong, f"rank {rank} [planned, found]: {wrong}"
        assert len(found) >= (1 if case.startswith("activations") else 6 + 2 * 3)
        assert all(planned for planned, _ in found.values())


class _FusedNorm(torch.autograd.Function):
    """An RMS norm that keeps its input and 1 / rms, as fused ones do."""

    @staticmethod
    def forward(ctx, x, weight):
        inverse = (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype) * weight


def kept_by_torch(config, dtype, fused, checkpointing, tokens):
    """Bytes that autograd keeps of a model's layers and last norm, by the memory that they lie in."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()
    if checkpointing:
        checkpoint_layers(model)
    if fused:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = lambda x, norm=module: _FusedNorm.apply(x, norm.weight)
    ids = torch.arange(tokens[0] * tokens[1]).reshape(tokens) % config.vocab_size
    return kept_bytes_of(model, ids)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(
    ("dtype", "fused", "checkpointing"),
    [
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
        (torch.float32, False, False),
    ],
)
def test_activations_are_those_that_autograd_keeps(name, dtype, fused, checkpointing):
    config, tokens = tiny_config(name), (2, 23)
    shape = shape_of("student", config, 1)
    planned = kept_bytes(shape, 2 * 23, dtype.itemsize, fused, checkpointing)
    assert kept_by_torch(config, dtype, fused, checkpointing, tokens) == planned


def test_the_count_is_that_of_the_paper():
    """GPT's 34 s b h less its dropout masks, with scores that are never kept: 32 h a token, and the sums."""
    gpt = dict(model_type="nemotron", hidden_size=256, intermediate_size=1024, num_hidden_layers=3,
               num_attention_heads=4, num_key_value_heads=4, head_dim=64, vocab_size=96)  # fmt: skip
    shape = shape_of("student", gpt, 1)
    assert layer_bytes(shape, 10, 2, fused_norms=True) == 10 * (32 * 256 + 2 * 8 + 4 * 4)


class _Live(TorchDispatchMode):
    """The most bytes of new tensors that live at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def freed(self, key, nbytes):
        self.now -= nbytes
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage()._cdata for x in inputs}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_the_stock_way(dtype):
    N, V, H = 16, 4096, 2
    student = [torch.randn(n, H, dtype=dtype, requires_grad=True) for n in (N, V)]
    teacher = [torch.randn(n, H, dtype=dtype) for n in (N, V)]
    with _Live() as live:
        logits, teacher_logits = F.linear(*student), F.linear(*teacher)
        log_p, target = F.log_softmax(logits.float(), -1), F.softmax(teacher_logits.float(), -1)
        F.kl_div(log_p, target, reduction="batchmean").backward()
    assert round(live.most / (N * V)) == STOCK_LOGIT_BYTES[dtype.itemsize]


def test_the_page_says_what_the_function_says():
    page = PAGE.read_text(encoding="utf-8")
    assert scale_tables.written(page) == page, (
        "run python -m minitron_kernels.distillation.scale.tables --write docs/scale.md"
    )
    with pytest.raises(ValueError, match="<!-- traffic -->"):
        scale_tables.written(page.replace("<!-- traffic -->", ""))


def test_command(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("GiB", "MB"), encoding="utf-8")
    scale_tables.main(["--write", str(page)])
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    scale_tables.main([])
    assert scale_tables.traffic() in capsys.readouterr().out


def test_paper_models():
    plan = scale_tables.plan(8, 64)
    assert (plan.student.parameters, plan.teacher.parameters) == (8_414_105_600, 12_247_782_400)
    for config, parameters in ((scale_tables.STUDENT, 8_414_105_600), (scale_tables.TEACHER, 12_247_782_400)):
        assert sum(map(elements, shape_of("student", config, 1).groups)) == parameters
    assert plan.micro_steps == 12 and plan.global_tokens == 768 * 8192
    assert plan.ours.peak_bytes == max(plan.ours.bytes_at(x) for x in ("teacher", "loss", "backward", "end"))
    text = plan.explain()
    assert "predicted for an H100, not measured" in text and "estimated" not in text
    assert size_text(plan.ours.peak_bytes) in text and size_text(plan.stock.sent_bytes) in text


def test_rings():
    sent = {kind: Collective("", kind, "tp", 4, 2, 120).sent_bytes for kind in
            ("all-gather", "reduce-scatter", "all-reduce")}  # fmt: skip
    assert sent == {"all-gather": 360, "reduce-scatter": 90, "all-reduce": 180}


@pytest.mark.parametrize("budget", [None, 700 << 20, 200 << 20])
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_exchanges_are_those_of_the_schedule(budget, schedule):
    """Every chunk of rows has one; a group of rows whose dz is kept begins a chunk of its own."""
    plan = scale_tables.plan(8, 64, workspace_bytes=budget, schedule=schedule).loss
    groups = range(0, plan.num_tokens, plan.dz_rows if plan.schedule == "store" else plan.num_tokens)
    step = groups.step
    chunks = [
        begin
        for first in groups
        for begin in range(first, min(first + step, plan.num_tokens), plan.chunk_rows)
    ]
    assert exchanges(plan) == len(chunks)


def test_a_pruning_plan_has_both_configs():
    plan = plan_of(GQA, hidden_size=48, intermediate_size=64, divisor=16)
    step = {"sequence_length": 64, "global_batch": 8, "tp": 2, "fsdp": 2}
    assert plan_distillation(plan, **step) == plan_distillation(plan.target_config, GQA, **step)
    with pytest.raises(ValueError, match="teacher must be None"):
        plan_distillation(plan, GQA, **step)


LLAMA = scale_tables.STUDENT | {"model_type": "llama"}


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "error", "message"),
    [
        (LLAMA, LLAMA, {"tp": 3}, ValueError, r"tp must divide num_attention_heads = 32 of student, got 3"),
        (LLAMA, LLAMA, {"tp": 16}, ValueError, r"num_key_value_heads = 8 of student"),
        (LLAMA, LLAMA | {"vocab_size": 7}, {}, ValueError, "same vocabulary, got 131072 and 7"),
        (LLAMA, LLAMA, {"global_batch": 7, "fsdp": 2}, ValueError, "multiple of .* = 2, got 7: take 6 or 8"),
        (LLAMA, LLAMA, {"fsdp": 0}, ValueError, "fsdp must be at least 1"),
        (LLAMA, LLAMA, {"micro_batch": 1.5}, TypeError, "micro_batch must be an int"),
        (LLAMA, LLAMA, {"dtype": torch.float64}, TypeError, "dtype must be bfloat16"),
        (LLAMA, None, {}, TypeError, "teacher must be a config"),
        (LLAMA | {"model_type": "mixtral", "num_local_experts": 4}, LLAMA, {}, ValueError, "dense decoder"),
        (LLAMA | {"model_type": "unheard"}, LLAMA, {}, ValueError, "model_type must be one of"),
    ],
)
def test_refused(student, teacher, changes, error, message):
    with pytest.raises(error, match=message):
        plan_distillation(student, teacher, **{"sequence_length": 64, "global_batch": 8} | changes)
