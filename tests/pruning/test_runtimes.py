"""runtime_notes(): the rules of vLLM and llama.cpp, on configs of published models and smaller ones."""

import pytest
import torch

from minitron_kernels.pruning import make_plan, runtime_notes
from minitron_kernels.pruning.plan.runtimes import new_notes
from pruning.paper_models import NEMO

NEMOTRON = dict(NEMO, model_type="nemotron", num_attention_heads=40)  # 40 · 128 = 5120
GPT2 = dict(model_type="gpt2", n_embd=1024, n_head=16, n_layer=24, n_positions=64, vocab_size=128)
SIZES = dict(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    vocab_size=256,
)
GEMMA2 = dict(SIZES, model_type="gemma2")  # 2B
GEMMA2_27B = dict(
    SIZES,
    model_type="gemma2",
    hidden_size=4608,
    intermediate_size=36864,
    num_hidden_layers=46,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=144,
)
SMOLLM3 = dict(NEMO, model_type="smollm3", hidden_size=4096)
SMOLLM3.pop("head_dim")
SCALE, KINDS, HEADS = ("llama.cpp, attention scale", "llama.cpp, kinds of layers", "llama.cpp, heads")
FULL, SLIDING = "full_attention", "sliding_attention"


def gpus(*numbers):
    return {f"vLLM, {number} GPUs" for number in numbers}


@pytest.mark.parametrize(
    ("config", "changes", "about"),
    [
        (NEMO, {}, set()),
        (NEMO, {"num_attention_heads": 24, "num_key_value_heads": 6}, gpus(4, 8)),
        (NEMO, {"num_attention_heads": 36, "num_key_value_heads": 4}, gpus(8)),
        (NEMO, {"num_key_value_heads": 2}, set()),  # two GPUs of four have the same
        (NEMO, {"intermediate_size": 14336 + 2}, gpus(4, 8) | {"vLLM, Marlin", "llama.cpp, k-quants"}),
        (NEMO, {"hidden_size": 4096 + 128}, {"llama.cpp, k-quants"}),
        (NEMOTRON, {}, set()),
        (NEMOTRON, {"hidden_size": 4096}, {HEADS}),
        (NEMO, {"hidden_size": 4096 - 1024}, set()),  # mistral has a head_dim there
        (GPT2, {}, set()),
        (GPT2, {"n_inner": 3072}, {"llama.cpp, MLP"}),
        (GEMMA2, {}, set()),
        (GEMMA2, {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}, set()),
        (GEMMA2, {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, FULL]}, {KINDS}),
        (GEMMA2_27B, {}, set()),
        (GEMMA2_27B, {"num_hidden_layers": 44}, {SCALE}),
        (GEMMA2_27B, {"hidden_size": 4096}, {SCALE}),
        (SMOLLM3, {}, set()),
        (SMOLLM3, {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, set()),
        (SMOLLM3, {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}, {KINDS}),
    ],
)
def test_notes(config, changes, about):
    notes = runtime_notes({**config, **changes})
    assert set(notes) == about
    assert all(".py)" in text or ".cpp)" in text for text in notes.values())  # where the rule is from


def test_notes_name_sizes():
    notes = runtime_notes(dict(NEMO, num_attention_heads=24, num_key_value_heads=6))
    assert "cannot divide 6 KV heads over 4 GPUs" in notes["vLLM, 4 GPUs"]
    notes = runtime_notes(dict(NEMO, intermediate_size=11500))
    assert "cannot divide 11500 neurons over 8 GPUs" in notes["vLLM, 8 GPUs"]
    assert "not MLP 11500 " in notes["vLLM, Marlin"] and ": MLP 11500 get" in notes["llama.cpp, k-quants"]


def test_only_what_is_new_is_in_a_summary():
    assert new_notes(NEMO, NEMO) == []
    source = dict(NEMO, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    source |= dict(head_dim=64, num_hidden_layers=2)
    there = runtime_notes(source)
    assert {"vLLM, 2 GPUs", "llama.cpp, k-quants"} <= set(there)  # 9 heads, rows of 576
    tables = {"mlp": dict.fromkeys((0, 1), torch.arange(1536.0))}
    summary = make_plan(tables, source, intermediate_size=1000, divisor=8).summary()
    assert "runtime: vLLM's Marlin" not in summary  # 576 is no multiple of 128 either
    assert "runtime:" not in summary
    even = dict(source, hidden_size=512, num_attention_heads=8, num_key_value_heads=2)
    summary = make_plan(tables, even, intermediate_size=1000, divisor=8).summary()
    assert "runtime: vLLM's Marlin" in summary and "runtime: llama.cpp's k-quants" in summary
