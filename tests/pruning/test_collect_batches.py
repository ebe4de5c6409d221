"""However a batch tells its sequences, scores are those of the sequences one by one, or it is refused."""

import pytest
import torch
import torch.nn.functional as F

from minitron_kernels.pruning import collect_importance
from minitron_kernels.pruning.score.packing import check_apart_by_config, lay_out
from pruning.tiny_models import tiny_model

# What is seen of another sequence is 0.01 and more. Eager attention takes its softmax in float32 always
CLOSE = {"sdpa": dict(rtol=1e-9, atol=1e-12), "eager": dict(rtol=2e-5, atol=2e-5)}
LENGTHS = (7, 5, 1)  # of the sequences a, b, c that are packed
WHOLE = sum(LENGTHS)


def ids(*shape, seed=0):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


A, B, C = (ids(1, length, seed=i) for i, length in enumerate(LENGTHS))
ROW = torch.cat([A, B, C], 1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
NUMBERS = torch.tensor([[1] * 7 + [2] * 5 + [3]])
BORDERS = torch.tensor([0, 7, 12, 13], dtype=torch.int32)


def with_padding(left=0, between=0, right=0):
    """The packed row with random padding before it, after its first sequence and behind it."""
    parts = [ids(1, left, seed=7), A, ids(1, between, seed=8), B, C, ids(1, right, seed=9)]
    numbers = [(0, left), (1, 7), (0, between), (2, 5), (3, 1), (0, right)]
    row = torch.tensor([[number for number, times in numbers for _ in range(times)]])
    return {"input_ids": torch.cat(parts, 1), "attention_mask": row}


def in_two_rows():
    """a and b in one row, b and c and padding in another."""
    second = torch.cat([B, C, ids(1, 6, seed=3)], 1)
    numbers = torch.tensor([[4] * 7 + [9] * 5, [1] * 5 + [2] + [0] * 6])
    return {"input_ids": torch.cat([torch.cat([A, B], 1), second]), "attention_mask": numbers}


def padded_positions():
    """Positions as a collator pads them: ones where the mask is 0."""
    batch = with_padding(left=3, right=2)
    counted = batch["attention_mask"] != 0
    positions = torch.cat(
        [torch.ones(1, 3, dtype=torch.int64), POSITIONS, torch.ones(1, 2, dtype=torch.int64)], 1
    )
    return {"input_ids": batch["input_ids"], "attention_mask": counted, "position_ids": positions}


def holes(**positions):
    """One sequence of a with three slots of padding inside, in two rows."""
    row = torch.cat([A[:, :2], ids(1, 3, seed=4), A[:, 2:]], 1)
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1, 1, 1]])
    return {"input_ids": row, "attention_mask": mask, **positions}


# name -> (batch, the sequences in it): what transformers and trainers around it make of packing and masks
WAYS = {
    "positions": ({"input_ids": ROW, "position_ids": POSITIONS}, (A, B, C)),
    "positions and ones": (
        {"input_ids": ROW, "position_ids": POSITIONS, "attention_mask": torch.ones_like(ROW)},
        (A, B, C),
    ),
    "cu_seq_lens_q": ({"input_ids": ROW, "cu_seq_lens_q": BORDERS}, (A, B, C)),
    "FlashAttention's arguments": (
        {
            "input_ids": ROW,
            "position_ids": torch.arange(WHOLE)[None],  # they go on counting: as far as attention reads them
            "cu_seq_lens_q": F.pad(BORDERS, (0, 1), value=WHOLE),  # an empty sequence, as padded borders have
            "cu_seq_lens_k": F.pad(BORDERS, (0, 1), value=WHOLE),
            "max_length_q": 7,
            "max_length_k": 7,
        },
        (A, B, C),
    ),
    "numbers": ({"input_ids": ROW, "attention_mask": NUMBERS}, (A, B, C)),
    "numbers and positions": (
        {"input_ids": ROW, "attention_mask": NUMBERS, "position_ids": POSITIONS, "cu_seq_lens_q": BORDERS},
        (A, B, C),
    ),
    "numbers and padding": (with_padding(left=2, between=3, right=4), (A, B, C)),
    "padded positions": (padded_positions(), (A, B, C)),
    "seq_idx": ({"input_ids": ROW, "seq_idx": (NUMBERS - 1).int()}, (A, B, C)),
    "two rows": (in_two_rows(), (A, B, B, C)),
    "left": (
        {"input_ids": torch.cat([C, C, A], 1), "attention_mask": torch.tensor([[0] * 2 + [1] * 7])},
        (A,),
    ),
    "both sides": (
        {
            "input_ids": torch.cat([C, A, C, C], 1),
            "attention_mask": torch.tensor([[0.0] + [1.0] * 7 + [0.0] * 2]),
        },
        (A,),
    ),
    "right, bool": (
        {"input_ids": torch.cat([A, C], 1), "attention_mask": torch.tensor([[True] * 7 + [False]])},
        (A,),
    ),
    "holes": (holes(), (A,)),
    "holes that positions count": (holes(position_ids=torch.arange(10)[None]), (A,)),
    "holes that positions leave out": (
        holes(position_ids=torch.tensor([[0, 1, 1, 1, 1, 2, 3, 4, 5, 6]])),
        (A,),
    ),
    "a row of padding alone": (
        {
            "input_ids": torch.cat([A, torch.cat([B, C, C], 1), ids(1, 7)]),
            "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 7]),
        },
        (A, B),
    ),
    "a row of one token": (
        {
            "input_ids": torch.cat([A, ids(1, 6), C], 1).view(2, 7),
            "attention_mask": torch.tensor([[1] * 7, [0] * 6 + [1]]),
        },
        (A, C),
    ),
    "one token": ({"input_ids": C, "attention_mask": torch.ones(1, 1)}, (C,)),
    "numbers by rows": (
        {
            "input_ids": torch.cat([A, ids(1, 2), B], 1).view(2, 7),
            "attention_mask": torch.tensor([[1] * 7, [0] * 2 + [2] * 5]),
        },
        (A, B),
    ),
    "cu_seq_lens_q by rows": (
        {"input_ids": torch.cat([A, A]), "cu_seq_lens_q": torch.tensor([0, 7, 14])},
        (A, A),
    ),
}


def states(scores):
    return {
        f"{name}.{key}": value
        for name, axis in scores.axes.items()
        for key, value in axis.state.state_dict().items()
    }


def assert_close(mine, wanted, what, attention="sdpa"):
    mine, wanted = states(mine), states(wanted)
    assert list(mine) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(
            mine[key], value, **CLOSE[attention], msg=lambda text, key=key: f"{what}: {key}\n{text}"
        )


def model_of(name, attention="sdpa", **changes):
    dtype = torch.float32 if attention == "eager" else torch.float64
    model = tiny_model(name, dtype=dtype, num_hidden_layers=2, **changes)
    model.config._experts_implementation = "eager"  # the others have no float64
    model.set_attn_implementation(attention)
    return model


def collect(model, batches, **options):
    return collect_importance(model, batches, seq=("mean", "var"), progress=False, **options)


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
