"""Batches that tell their sequences in every way there is, and the scores of each compared."""

import torch
import torch.nn.functional as F

from minitron_kernels.pruning import collect_importance
from pruning.collected import states
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
