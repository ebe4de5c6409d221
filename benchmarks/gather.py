"""Kept rows and columns of a weight: gather_channels and its alternatives, compared with copying.

    python benchmarks/gather.py                     # the weights of Mistral-NeMo 12B -> Minitron 8B
    python benchmarks/gather.py --quick
    python benchmarks/gather.py --case mlp runs --threads 1,2 --json out.json --markdown out.md

The floor copies as many contiguous bytes as are kept. No gather can be as fast, since it also has to read the
bytes between them. Each row writes to an existing tensor if the implementation allows it. The result must be
that of numpy's take, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.bandwidth import Bench, Case, Row, main
from common.dtypes import DTYPES
from common.memory_ways import Ways, ways_to_copy

# numpy has no bfloat16, so its row moves integers; the other rows move the dtype itself
INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass
class Inputs:
    weight: Tensor
    rows: Tensor | None
    cols: Tensor | None
    out: Tensor  # the rows write to it
    kept: Tensor  # the floor copies from it
    copy: Tensor  # the floor copies to it


def keep_some(size: int, count: int, run: int, generator: torch.Generator) -> Tensor | None:
    """`count` of `size` indices, sorted, in runs of `run` that begin at multiples of it; None: all."""
    if count == size:
        return None
    runs = torch.randperm(size // run, generator=generator)[: count // run].sort()[0]
    return (runs[:, None] * run + torch.arange(run)).flatten()


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    size = torch.empty((), dtype=DTYPES[case["dtype"]]).element_size()
    bits = torch.randint(-100, 100, (case["R"], case["C"]), generator=generator, dtype=INTEGERS[size])
    weight = bits.view(DTYPES[case["dtype"]]).to(device)
    rows = keep_some(case["R"], case["kept_rows"], case["run"], generator)
    cols = keep_some(case["C"], case["kept_cols"], case["run"], generator)
    out, kept, copy = (weight.new_zeros(case["kept_rows"], case["kept_cols"]) for _ in range(3))
    where = [None if keep is None else keep.to(device) for keep in (rows, cols)]
    return Inputs(weight, *where, out, kept, copy)


def _ours(x: Inputs) -> Callable[[], Tensor]:
    from minitron_kernels import ChannelIndex, gather_channels

    R, C = x.weight.shape
    rows = None if x.rows is None else ChannelIndex(x.rows, R)
    cols = None if x.cols is None else ChannelIndex(x.cols, C)
    return lambda: gather_channels(x.weight, rows, cols, out=x.out)


def _ours_plain(x: Inputs) -> Callable[[], Tensor]:
    from minitron_kernels import gather_channels

    return lambda: gather_channels(x.weight, x.rows, x.cols)


def _index_select(x: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        part = x.weight if x.rows is None else x.weight.index_select(0, x.rows)
        return part if x.cols is None else torch.index_select(part, 1, x.cols, out=x.out)

    return call


def _advanced(x: Inputs) -> Callable[[], Tensor]:
    rows = slice(None) if x.rows is None else x.rows
    cols = slice(None) if x.cols is None else x.cols
    if x.rows is not None and x.cols is not None:
        rows = x.rows[:, None]
    return lambda: x.weight[rows, cols]


def _take(x: Inputs) -> Callable[[], Tensor]:
    """numpy's take of a view as integers. mode="clip", since by default numpy buffers its writes to `out`."""
    integer = INTEGERS[x.weight.element_size()]
    weight, out = x.weight.view(integer).numpy(), x.out.view(integer).numpy()
    rows, cols = (None if keep is None else keep.numpy() for keep in (x.rows, x.cols))

    def call() -> Tensor:
        if cols is None:
            np.take(weight, rows, 0, out=out, mode="clip")
        else:
            np.take(weight if rows is None else np.take(weight, rows, 0), cols, 1, out=out, mode="clip")
        return x.out

    return call


def _compiled(x: Inputs) -> Callable[[], Tensor]:
    compiled = torch.compile(_advanced(x), dynamic=False)
    return lambda: compiled()


def floor(x: Inputs) -> Ways:
    if x.weight.device.type == "cpu":
        return ways_to_copy(x.copy, x.kept)
    return {"torch.Tensor.copy_": lambda: x.copy.copy_(x.kept)}


def poison(x: Inputs) -> None:
    """Fills `out` with bits that no weight has: make_inputs() draws integers below 100."""
    x.out.view(INTEGERS[x.out.element_size()]).fill_(101)


def error(x: Inputs, result: Tensor) -> float:
    """The share of elements whose bits are not those of numpy's take."""
    integer = INTEGERS[x.weight.element_size()]
    expected = x.weight.view(integer).cpu().numpy()
    for axis, keep in enumerate((x.rows, x.cols)):
        expected = expected if keep is None else np.take(expected, keep.cpu().numpy(), axis)
    return float((result.view(integer).cpu().numpy() != expected).mean())


WEIGHT = {"R": 14336, "C": 5120, "kept_rows": 11520, "kept_cols": 4096, "run": 1, "dtype": "bf16"}
BENCH = Bench(
    name="gather",
    rows=(
        Row("index-select", "index_select twice, out=", _index_select),
        Row("advanced", "W[rows[:, None], cols]", _advanced),
        Row("compile", "torch.compile of that", _compiled),
        Row("take", "numpy take twice, out=", _take, devices=("cpu",)),
        Row("ours", "minitron, out=", _ours, ours=True),
        Row("ours-new", "minitron, a new tensor", _ours_plain, ours=True),
    ),
    cases={
        "small": {"R": 384, "C": 256, "kept_rows": 320, "kept_cols": 192, "run": 1, "dtype": "bf16"},
        "mlp": WEIGHT,
        "runs": WEIGHT | {"run": 64},
        "rows": WEIGHT | {"kept_cols": 5120},
        "fp32": WEIGHT | {"dtype": "fp32"},
        "embedding": {
            "R": 131072,
            "C": 5120,
            "kept_rows": 131072,
            "kept_cols": 4096,
            "run": 1,
            "dtype": "bf16",
        },
    },
    default=("mlp", "runs", "rows", "embedding"),
    make_inputs=make_inputs,
    floor=floor,
    floor_label="copying the kept bytes",
    floor_bytes=lambda x: 2 * x.out.nbytes,
    error=error,
    bound=0.0,
    poison=poison,
)

if __name__ == "__main__":
    main(BENCH, doc=__doc__)
