"""Packed sequences are kept apart by every layer's attention, or refused; how rows are laid out."""

import pytest
import torch
import torch.nn.functional as F

from minitron_kernels.pruning.score.packing import check_apart_by_config, lay_out
from pruning.packed_batches import (
    POSITIONS,
    ROW,
    WAYS,
    WHOLE,
    A,
    B,
    C,
    assert_close,
    collect,
    model_of,
    with_padding,
)


def attention_of(causal_over):
    """An attention function: causal over runs of the sequence that causal_over(position_ids, query) gives."""

    def attention(module, query, key, value, attention_mask, scaling=None, **given):
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        owner = causal_over(query, **given)
        at = torch.arange(query.shape[2])
        seen = (owner[:, :, None] == owner[:, None, :]) & (at[:, None] >= at)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, :].bool()
        seen = seen | torch.eye(query.shape[2], dtype=torch.bool)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], scale=scaling)
        return out.transpose(1, 2), None

    return attention


def as_flash_attention(query, position_ids=None, **given):
    """Reads packing off a single row, where a position is the smallest; as transformers calls it."""
    rows, length = query.shape[0], query.shape[2]
    if rows != 1 or position_ids is None:
        return torch.zeros(rows, length)
    return (position_ids == position_ids.min()).cumsum(-1)


def as_if_one_sequence(query, **given):
    return torch.zeros(query.shape[0], query.shape[2])


@pytest.fixture
def implementation(monkeypatch):
    """Sets a model's attention, under a name that masks are made for or not."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def put(model, name, function):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, function)
        model.config._attn_implementation = name
        return model

    return put


def test_attention_that_reads_packing_off_one_row_gets_one(implementation):
    plain, model = model_of("llama"), model_of("llama")
    implementation(model, "flash_attention_2", attention_of(as_flash_attention))
    for way in (
        "positions",
        "FlashAttention's arguments",
        "numbers and padding",
        "two rows",
        "left",
        "holes",
    ):
        batch, sequences = WAYS[way]
        assert_close(collect(model, [batch]), collect(plain, sequences), way)
    apart = {"input_ids": ROW, "position_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 9]])}
    assert_close(collect(model, [apart]), collect(plain, (A, B, C)), "begin elsewhere")


@pytest.mark.parametrize("axes", [None, ("layers",)])
def test_a_model_that_does_not_keep_sequences_apart_is_refused(implementation, axes):
    model = implementation(model_of("llama"), "of_a_stranger", attention_of(as_if_one_sequence))
    batch, _ = WAYS["positions"]
    passes = []
    model.model.register_forward_pre_hook(lambda _module, args, given: passes.append(given), with_kwargs=True)
    with pytest.raises(
        ValueError, match=r"^batches\[1\] is packed.*'of_a_stranger'; measured: .*row of its own"
    ):
        collect(model, [A, batch], axes=axes)
    assert all(given["input_ids"].shape != ROW.shape for given in passes)
    rows = {
        "input_ids": torch.cat([A, F.pad(B, (0, 2))]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    if axes:
        plain = collect(model_of("llama"), [A, B], axes=axes)
        assert_close(collect(model, [rows], axes=axes), plain, "rows")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("leaking", [0, 1])
def test_one_layer_that_sees_across_borders_is_enough(name, leaking):
    model = model_of(name)
    layer = model.model.layers[leaking]
    if name == "llama":  # by little, as one of many layers of a trained model does
        with torch.no_grad():
            layer.self_attn.o_proj.weight *= 0.01
    forward = layer.forward
    layer.forward = lambda *args, **given: forward(*args, **{**given, "attention_mask": None})
    with pytest.raises(ValueError, match=r"^batches\[0\] is packed.*measured: \d+\.\d% off"):
        collect(model, [WAYS["positions"][0]])


def test_the_measurement_itself_counts_nowhere():
    model, batch = model_of("qwen3_moe"), WAYS["positions"][0]
    scores = collect(model, [batch, batch])
    assert scores.tokens == 2 * WHOLE and scores.axes["experts"].state.counts.sum() == 2 * 2 * WHOLE


def test_apart_by_config_alone():
    from transformers import AutoConfig

    def config(attention="sdpa", **given):
        made = AutoConfig.for_model("llama")
        made._attn_implementation = attention
        for key, value in given.items():
            setattr(made, key, value)
        return made

    for attention in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        check_apart_by_config(config(attention), "batches[0]")
    check_apart_by_config(config(layer_types=["full_attention", "sliding_attention"]), "batches[0]")
    with pytest.raises(ValueError, match=r"batches\[2\] is packed.*'paged\|sdpa'"):
        check_apart_by_config(config("paged|sdpa"), "batches[2]")
    with pytest.raises(ValueError, match=r"'sdpa'; layers linear_attention.*row of its own"):
        check_apart_by_config(config(layer_types=["full_attention", "linear_attention"]), "batches[2]")


def test_padding_is_laid_out_where_it_can_do_no_harm():
    """Behind the sequences, as one of its own where they are packed; a row of it alone attends to itself."""
    batch = with_padding(left=2, between=3, right=4)
    numbers = batch["attention_mask"]
    layout = lay_out(dict(batch), numbers != 0, numbers, "batches[0]")
    assert set(layout.inputs) == {"input_ids", "position_ids"}
    assert layout.inputs["input_ids"][:, :WHOLE].equal(ROW)
    assert layout.inputs["position_ids"].tolist() == [[*POSITIONS[0].tolist(), *range(9)]]
    assert layout.cu_seqlens.tolist() == [0, 7, 12, 13, 22]
    assert layout.mask.tolist() == [[True] * 13 + [False] * 9]
    mask = torch.tensor([[True] * 3 + [False] * 4, [False] * 7])
    layout = lay_out({"input_ids": torch.cat([A, A])}, mask, None, "batches[0]")
    assert layout.inputs["attention_mask"].tolist() == [[1] * 3 + [0] * 4, [1] * 7]
    assert layout.mask is mask and layout.cu_seqlens is None


def test_plain_rows_cost_nothing():
    """What is neither padded nor packed goes to the model as it came: not even copied."""
    layout = lay_out({"input_ids": ROW}, None, None, "batches[0]")
    assert layout.inputs["input_ids"] is ROW and set(layout.inputs) == {"input_ids"}
    assert layout.mask is None and layout.cu_seqlens is None
