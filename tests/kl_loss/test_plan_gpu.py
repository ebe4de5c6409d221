"""Plans of linear_kl_loss for GPUs, and the bytes that a whole call of such a plan moves. Needs no GPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minitron_kernels as mk
from minitron_kernels.ops.kl_loss import gemm_gpu, gpu_figures, linear_gpu, plan_gpu
from minitron_kernels.ops.kl_loss.epilogues import Epilogues
from minitron_kernels.ops.kl_loss.gpu_figures import FIGURES, figures_of
from minitron_kernels.ops.kl_loss.options import LossOptions

N, V, H, HT = 8192, 131072, 4096, 5120  # Mistral-NeMo-Minitron's
SHAPE = (N, V, H, HT)
H100 = FIGURES["H100"]
PLAIN = LossOptions(0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def planned(*shape, **options):
    return mk.plan_linear_kl_loss(*(shape or SHAPE), device="cuda", gpu="H100", **options)


def floor_seconds(shape=SHAPE):
    tokens, vocab, width, teacher_width = shape
    return 2 * tokens * vocab * (3 * width + teacher_width) / H100.gemm_flops


def test_at_most_a_tenth_above_the_four_gemms():
    plan = planned()
    assert plan.schedule == "store" and plan.num_gemms == 4 and plan.dz_rows == N
    assert plan.predicted_seconds < 1.10 * floor_seconds()
    assert plan.flops == 2 * N * V * (3 * H + HT)
    # logits, dz of all rows, the hidden gradient in fp32; no head gradient in fp32
    assert plan.part_bytes == (8 * plan.chunk_rows * V, 2 * N * V, 0, 4 * N * H, 0)


def test_head_gradient_in_fp32_only_where_rows_come_in_groups():
    plan = planned(workspace_bytes=2 << 30)
    assert plan.schedule == "store" and plan.dz_rows < N
    assert plan.part_bytes[-1] == plan.accumulator_bytes - plan.part_bytes[3] == 4 * V * H
    lent = planned(workspace_bytes=2 << 30, grad_head_accumulator=True)
    assert lent.part_bytes[-1] == 0 and lent.num_gemms == 6
    assert planned(workspace_bytes=2 << 30, dtype=torch.float32).accumulator_bytes == 0


def test_waves_and_traffic():
    whole = H100.gemm_seconds(33 * 128, V, H, 2, 4) - gpu_figures.LAUNCH_SECONDS  # 16896 tiles: 128 waves
    assert whole == pytest.approx(2 * 33 * 128 * V * H / H100.gemm_flops)
    more = H100.gemm_seconds(33 * 128 + 1, V, H, 2, 4) - gpu_figures.LAUNCH_SECONDS
    assert more == pytest.approx(whole * 132 / 128)  # 512 more tiles: 4 waves
    few = H100.gemm_seconds(1, V, H, 2, 4) - gpu_figures.LAUNCH_SECONDS
    assert few == pytest.approx((2 * H * (1 + V) + 4 * V) / H100.memory_bytes)
    assert H100.traffic_seconds(3e12) == pytest.approx(1.0)
    assert H100.traffic_seconds(3e12, out_of_l2=8e12) == pytest.approx(2.0)


@pytest.mark.parametrize("gpu", FIGURES)
@pytest.mark.parametrize("shape", [SHAPE, (65536, V, H, HT), (300, 32000, 512, 1024), (1, 97, 8, 16)])
def test_a_larger_budget_is_never_slower(gpu, shape):
    last = None
    for budget in (1 << shift for shift in range(24, 36)):
        try:
            plan = mk.plan_linear_kl_loss(*shape, device="cuda", gpu=gpu, workspace_bytes=budget)
        except ValueError:
            assert last is None  # too small only below what was enough
            continue
        assert plan.workspace_bytes <= budget
        assert 1 <= plan.chunk_rows <= max(plan.dz_rows, 1) <= shape[0]
        if last is not None:
            assert plan.predicted_seconds <= last * 1.011  # twice what counts as hardly slower
        last = plan.predicted_seconds
    assert last is not None


@pytest.mark.parametrize("schedule", ["auto", "store", "recompute"])
def test_a_budget_that_is_too_small_names_one_that_is_not(schedule):
    with pytest.raises(ValueError, match="the least that would do is") as error:
        planned(schedule=schedule, workspace_bytes=1000)
    least = int(str(error.value).split("the least that would do is ")[1].split()[0])
    plan = planned(schedule=schedule, workspace_bytes=least)
    assert plan.workspace_bytes == least
    with pytest.raises(ValueError, match="too small"):
        planned(schedule=schedule, workspace_bytes=least - 1)


def test_a_small_budget_makes_logits_twice():
    plan = planned(workspace_bytes=200 << 20)
    assert plan.schedule == "recompute" and plan.num_gemms == 6 and plan.tile < V
    assert planned(workspace_bytes=200 << 20, divergence_needs_kl=True).num_gemms == 8
    assert planned(schedule="store", workspace_bytes=200 << 20).schedule == "store"


def test_no_gradients_and_no_rows():
    plan = planned(grad_hidden=False, grad_head=False)
    assert plan.schedule == "forward" and plan.num_gemms == 2 and plan.part_bytes[1:] == (0, 0, 0, 0)
    assert planned(0, V, H, HT).predicted_seconds == 0
    assert planned(1, 1, 1, 1).total_bytes > 0


def test_explain():
    text = planned().explain()
    assert "predicted for an H100, not measured" in text and "dz of 8192 rows kept" in text
    assert "4 GEMMs" in text and "MiB  dz" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "mps"}, ValueError, "device must be 'cpu' or 'cuda'"),
        ({"device": "cuda", "gpu": "V100"}, ValueError, "gpu must be one of A100, H100, H200, B200"),
        ({"gpu": "H100"}, ValueError, "gpu is for device='cuda'"),
        ({"device": "cuda", "engine": "bf16"}, ValueError, "engine is for plans of the CPU"),
        ({"device": "cuda", "dtype": torch.float64}, TypeError, "dtype must be bfloat16, float16 or"),
        ({"device": "cuda", "teacher_dtype": torch.int8}, TypeError, "teacher_dtype must be"),
        ({"device": "cuda", "schedule": "forward"}, ValueError, "schedule must be one of"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        mk.plan_linear_kl_loss(64, 100, 8, 8, **options)


@pytest.mark.parametrize(
    ("name", "major", "like"),
    [
        ("NVIDIA H200", 9, "H200"),
        ("NVIDIA A100-SXM4-80GB", 8, "A100"),
        ("NVIDIA GB200", 10, "B200"),
        ("NVIDIA L40S", 8, "A100"),
        ("NVIDIA GH200 480GB", 9, "H200"),
        ("NVIDIA B300", 10, "B200"),
    ],
)
def test_figures_are_of_the_gpu_that_is_there(monkeypatch, name, major, like):
    properties = SimpleNamespace(name=name, major=major, multi_processor_count=77)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu_figures._figures_of_index.cache_clear()
    try:
        found = figures_of(torch.device("cuda"))
    finally:
        gpu_figures._figures_of_index.cache_clear()
    assert (found.name, found.sms) == (like, 77)


# ---- the bytes of a whole call


class Counter(TorchDispatchMode):
    """Bytes that operations on large tensors read and write, by what does it. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def add(self, name, *tensors):
        self.bytes[name] = self.bytes.get(name, 0) + sum(x.numel() * x.itemsize for x in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = args[1:] if name == "copy_" else args
        moved = [x for x in (*read, out) if isinstance(x, torch.Tensor) and x.numel() > 8 * N]
        if moved and not func.is_view and name not in ("empty", "new_empty"):
            self.add(name, *moved)
        return out


def count(monkeypatch, shape=SHAPE, **numbers):
    """{what: bytes} of a training call of this shape on tensors without memory."""
    counter = Counter()

    def matmul(a, b, out, accumulate):
        kind = "logits" if b.shape[0] in shape[2:] else "gradients"
        counter.add(f"{kind}: operands", a, b)
        counter.add(f"{kind}: products", *[out] * (1 + accumulate))

    def forward_grad(logits, mask, weight, loss, stats, dz, *_):
        counter.add("logits: read", *logits[:2])  # once from memory, see cluster_kernels.cuh
        counter.add("dz: written", dz)

    plan = plan_gpu.plan
    monkeypatch.setattr(
        linear_gpu, "plan", lambda *arguments: dataclasses.replace(plan(*arguments), **numbers)
    )
    monkeypatch.setattr(gemm_gpu, "matmul", matmul)
    with counter:
        call(shape, forward_grad=forward_grad)
    return counter.bytes


def call(shape, needs_grad=True, budget=4 << 30, **kernels):
    """A call on tensors without memory, with no kernels but these."""
    names = [field.name for field in dataclasses.fields(Epilogues)]
    tokens, vocab, width, teacher_width = shape

    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta")

    fp32 = torch.float32
    outputs = (empty(tokens, dtype=fp32), empty(tokens, 6, dtype=fp32), empty(tokens, width))
    outputs += (empty(vocab, width), empty(0, dtype=fp32))
    student, teacher = ((empty(tokens, w), empty(vocab, w), None) for w in (width, teacher_width))
    linear_gpu.linear_kl_loss_(
        outputs, student, teacher, None, None, None, None, (needs_grad, needs_grad, False), vocab, PLAIN,
        "auto", budget, Epilogues(**dict.fromkeys(names) | kernels),
    )  # fmt: skip


def test_a_fused_evaluation_needs_no_budget():
    """Its memory is O(N), whatever the budget: nothing is planned, and nothing refused."""
    seen = []
    call(SHAPE, needs_grad=False, budget=1, linear_stats=lambda *arguments: seen.append(arguments))
    assert len(seen) == 1


def least(shape=SHAPE):
    """Bytes by what docs/performance.md says of the store schedule, with the dz of all rows kept."""
    tokens, vocab, width, teacher_width = shape
    chunks = -(-tokens // planned(*shape).chunk_rows)
    hidden, head = tokens * width, vocab * width
    return {
        "logits: operands": 2 * (tokens + chunks * vocab) * (width + teacher_width),
        "logits: products": 8 * tokens * vocab,
        "logits: read": 8 * tokens * vocab,
        "dz: written": 2 * tokens * vocab,
        "gradients: operands": 2 * (2 * tokens * vocab + head + hidden),
        "gradients: products": 4 * hidden + 2 * head,
        "copy_": 6 * hidden,
    }


@pytest.mark.parametrize("shape", [SHAPE, (4096, 32000, 2048, 3072)])
def test_bytes_of_the_whole_schedule(monkeypatch, shape):
    assert count(monkeypatch, shape) == least(shape)


def test_fp32_head_gradient_would_be_seen(monkeypatch):
    """The planted fault: dW of each chunk added up in fp32, as where the dz of one chunk is kept."""
    chunk = planned().chunk_rows
    found = count(monkeypatch, dz_rows=chunk)
    assert found["gradients: products"] > least()["gradients: products"] + 8 * 5 * V * H
    assert found["copy_"] == least()["copy_"] + 6 * V * H
