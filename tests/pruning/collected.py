"""Batches of random ids, and how collected scores are compared."""

import torch


def ids(rows, columns, seed=0):
    return torch.randint(3, 96, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded(rows, columns, seed=0):
    """A batch of rows padded on the left, on the right and not at all; what pads is random."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, columns - 5 :] = 0
    return {"input_ids": ids(rows, columns, seed), "attention_mask": mask}


def states(scores):
    return {
        f"{name}.{key}": value
        for name, axis in scores.axes.items()
        for key, value in axis.state.state_dict().items()
    }


def assert_same_bits(a, b):
    a, b = states(a), states(b)
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
