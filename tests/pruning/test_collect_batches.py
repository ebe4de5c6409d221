"""However a batch tells its sequences, scores are those of the sequences one by one, or it is refused."""

import pytest
import torch

from pruning.packed_batches import (
    BORDERS,
    NUMBERS,
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
)

SLIDING = dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("mistral", dict(sliding_window=3)),
        ("gemma3_text", SLIDING),
        ("qwen3_moe", dict(mlp_only_layers=[0])),
    ],
)
def test_scores_are_those_of_the_sequences_one_by_one(name, changes, attention):
    model = model_of(name, attention, **changes)
    alone = {}
    for way, (batch, sequences) in WAYS.items():
        key = tuple(map(id, sequences))
        if key not in alone:
            alone[key] = collect(model, sequences)
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        found = collect(model, [batch])
        assert_close(found, alone[key], way, attention)
        assert found.tokens == sum(sequence.shape[1] for sequence in sequences)
        for k, v in before.items():
            assert torch.equal(v, batch[k]) if isinstance(v, torch.Tensor) else v == batch[k], (way, k)
    embeds = WAYS["numbers and padding"][0]
    embedded = {
        "inputs_embeds": model.model.embed_tokens(embeds["input_ids"]).detach(),
        "attention_mask": embeds["attention_mask"],
    }
    assert_close(collect(model, [embedded]), alone[tuple(map(id, (A, B, C)))], "inputs_embeds", attention)


def test_positions_that_begin_elsewhere_are_kept():
    """Seen in the model's arguments, for rotary positions are relative: scores hardly tell."""
    model, seen = model_of("llama"), []
    model.model.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True)

    def positions(**batch):
        del seen[:]
        collect(model, [batch])
        given = seen[-1].get("position_ids")
        return None if given is None else given.tolist()

    assert positions(input_ids=C.repeat(1, 4)) is None
    assert positions(input_ids=A, position_ids=torch.arange(5, 12)) == [list(range(5, 12))]
    apart = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 9]])
    assert positions(input_ids=ROW, position_ids=apart) == apart.tolist()
    # where they do not show the border they cannot stay: the model reads it off them
    on = torch.arange(4, 4 + WHOLE)[None]
    assert positions(input_ids=ROW, position_ids=on, cu_seq_lens_q=BORDERS) == POSITIONS.tolist()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    assert positions(input_ids=A, attention_mask=mask) is None
    assert "attention_mask" in seen[-1]
    given = positions(input_ids=A, attention_mask=mask, position_ids=torch.arange(7)[None])
    assert given[0][:4] == [2, 3, 4, 5]
    assert positions(input_ids=A.view(7, 1), position_ids=torch.tensor([[6]])) == [[6]] * 7
    collect(model, [{"input_ids": A, "attention_mask": torch.ones_like(A)}])
    assert set(seen[-1]) == {"input_ids", "use_cache"}  # a mask of ones would cost a comparison in each model


def test_a_batch_of_padding_alone_counts_nothing():
    model = model_of("llama", "eager")
    row = collect(model, [A])
    nothing = {"input_ids": ROW, "attention_mask": torch.zeros_like(ROW), "position_ids": POSITIONS}
    assert_close(collect(model, [nothing, A, nothing]), row, "padding")
    assert collect(model, [nothing]).tokens == 0


REFUSED = {
    "additive": (dict(attention_mask=torch.tensor([[0.0] * 10 + [-1e9] * 3])), r"values from -1e\+09 to 0"),
    "negative": (dict(attention_mask=-NUMBERS), "values from -3 to -1"),
    "weights": (dict(attention_mask=torch.full((1, WHOLE), 0.5)), "values from 0.5 to 0.5"),
    "4-D": (dict(attention_mask=torch.ones(1, 1, WHOLE, WHOLE).tril()), r"\(1, 1, 13, 13\).*begin anew"),
    "4-D bool": (dict(attention_mask=torch.ones(1, 1, WHOLE, WHOLE).bool()), r"\[1, 13\].*begin anew"),
    "of each kind of layer": (dict(attention_mask={"full_attention": None}), "got dict"),
    "in pieces": (dict(attention_mask=torch.tensor([[1] * 5 + [2] * 5 + [1] * 3])), "must be one run"),
    "another row": (dict(attention_mask=torch.ones(2, WHOLE)), r"\[1, 13\]"),
    "types": (dict(token_type_ids=NUMBERS - 1), "token_type_ids must be 0 everywhere"),
    "three positions": (dict(position_ids=POSITIONS.expand(3, 1, -1)), r"position_ids must be \[1, 13\]"),
    "floats": (dict(position_ids=POSITIONS.float()), "position_ids must be an int32 or int64 tensor"),
    "short positions": (dict(position_ids=POSITIONS[:, 1:]), r"position_ids must be \[1, 13\]"),
    "contradiction": (
        dict(attention_mask=NUMBERS, cu_seq_lens_q=torch.tensor([0, 6, 12, 13])),
        "the numbers in attention_mask and cu_seq_lens_q must give the same sequences",
    ),
    "positions begin elsewhere": (
        dict(position_ids=POSITIONS, cu_seq_lens_q=torch.tensor([0, 13])),
        "position_ids must rise by one inside a sequence",
    ),
    "borders short": (dict(cu_seq_lens_q=BORDERS[:-1]), r"rise from 0 to the number of tokens 13"),
    "borders late": (dict(cu_seq_lens_q=BORDERS[1:]), "rise from 0"),
    "borders fall": (dict(cu_seq_lens_q=torch.tensor([0, 12, 7, 13])), "rise from 0"),
    "borders of a batch": (dict(cu_seq_lens_q=BORDERS[None]), r"must be \[sequences \+ 1\]"),
    "borders as a list": (dict(cu_seq_lens_q=[0, 13]), "must be an int32 or int64 tensor, got list"),
    "keys otherwise": (
        dict(cu_seq_lens_q=BORDERS, cu_seq_lens_k=torch.tensor([0, 6, 12, 13], dtype=torch.int32)),
        "cu_seq_lens_k must equal cu_seq_lens_q",
    ),
    "keys alone": (dict(cu_seq_lens_k=BORDERS), "cu_seq_lens_q must be .* got NoneType"),
    "another trainer's": (dict(cu_seqlens=BORDERS), "cu_seqlens is not read: leave it out.*cu_seq_lens_q"),
    "a cache": (dict(past_key_values=object()), "past_key_values is not read"),
    "two texts": (dict(inputs_embeds=torch.ones(1, WHOLE, 48)), "input_ids or inputs_embeds, got both"),
    "beyond": (dict(input_ids=torch.tensor([[5, 96]])), r"vocabulary \[0, 96\), got 96: another model's"),
    "ignored label": (dict(input_ids=torch.tensor([[5, -100]])), r"got -100; -100 belongs in labels"),
    "negative id": (dict(input_ids=torch.tensor([[-1, 5]])), r"vocabulary \[0, 96\), got -1"),
    "no row": (dict(input_ids=ROW[:0]), r"at least one token, got a tensor \(0, 13\)"),
    "no token": (dict(input_ids=ROW[0, :0]), r"at least one token, got a tensor \(1, 0\)"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_read_is_refused_before_the_forward_pass(way):
    model = model_of("llama")
    change, message = REFUSED[way]
    passes = []
    model.model.register_forward_pre_hook(lambda *args: passes.append(1))
    with pytest.raises((ValueError, TypeError), match=rf"(?s)^batches\[1\].*{message}"):
        collect(model, [ROW, {"input_ids": ROW} | change])
    assert len(passes) == 1


def test_rows_of_borders_must_begin_sequences():
    batch = {"input_ids": torch.cat([A, A]), "cu_seq_lens_q": torch.tensor([0, 5, 9, 14])}
    with pytest.raises(ValueError, match="must have a border where each row of 7 tokens begins"):
        collect(model_of("llama"), [batch])
