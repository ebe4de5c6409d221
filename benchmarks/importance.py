"""Importance of channels: fused accumulation and its alternatives, compared with reading the memory.

    python benchmarks/importance.py                     # [4, 2048, 14336] in bf16: a layer's MLP activations
    python benchmarks/importance.py --quick
    python benchmarks/importance.py --threads 1,2 --json out.json --markdown out.md
    python benchmarks/importance.py --impl mean         # only one row of the tables; then the collector

The score (batch L2, sequence mean) is the mean of |x| over each sequence, then the L2 norm over sequences.
After the tables comes what collecting all axes adds to the forward pass of a real model, SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from common.bandwidth import Bench, Case, Row, main
from common.dtypes import DTYPES
from common.memory_ways import Ways, ways_to_read
from importance_rows import collector

Call = Callable[[], torch.Tensor]


def make_inputs(case: Case, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (case["B"], case["S"], case["C"])
    return torch.randn(shape, generator=generator, dtype=DTYPES[case["dtype"]]).to(device)


def score(x: torch.Tensor) -> torch.Tensor:
    return x.abs().float().mean(1).square().sum(0).sqrt()


def _naive(x: torch.Tensor) -> Call:
    return lambda: score(x)


def _vector_norm(x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        means = torch.linalg.vector_norm(x, ord=1, dim=1, dtype=torch.float32) / x.shape[1]
        return torch.linalg.vector_norm(means, dim=0)

    return call


def _chunks(x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        total = torch.zeros(x.shape[0], x.shape[2], device=x.device)
        for part in x.split(64, 1):
            total += part.abs().sum(1, dtype=torch.float32)
        return (total / x.shape[1]).square().sum(0).sqrt()

    return call


def _compiled(x: torch.Tensor) -> Call:
    compiled = torch.compile(score, dynamic=False)
    return lambda: compiled(x)


def _modelopt(x: torch.Tensor) -> Call:
    """NVIDIA ModelOpt's hook on Megatron activations [S, B, C]: a copy in fp32, then mean and squares."""
    sequence_first = x.transpose(0, 1)

    def call() -> torch.Tensor:
        return sequence_first.to(torch.float32).abs().mean(dim=0).pow(2).sum(dim=0).sqrt()

    return call


def _ours(*seq: str) -> Callable[[torch.Tensor], Call]:
    def build(x: torch.Tensor) -> Call:
        from minitron_kernels import ImportanceState, accumulate_importance_

        def call() -> torch.Tensor:
            state = ImportanceState(x.shape[-1], seq=seq, device=x.device)
            return accumulate_importance_(state, x).scores()

        return call

    return build


def floor(x: torch.Tensor) -> Ways:
    if x.device.type == "cpu":
        return ways_to_read(x)
    words = x.view(torch.int32)
    return {"torch.sum": lambda: words.sum(dtype=torch.int32)}


def error(x: torch.Tensor, result: torch.Tensor) -> float:
    """The worst channel's relative error against float64 in NumPy."""
    means = np.stack([np.abs(sequence.cpu().double().numpy()).mean(0) for sequence in x])
    exact = np.sqrt((means**2).sum(0))
    return float(np.abs(result.double().cpu().numpy() / exact - 1).max())


def poison(x: torch.Tensor) -> None:
    """Changes the activations, so that a score from an earlier call is wrong."""
    x.mul_(0.5)


BENCH = Bench(
    name="importance",
    rows=(
        Row("naive", "naive PyTorch", _naive),
        Row("vector-norm", "torch.linalg.vector_norm", _vector_norm),
        Row("chunks", "PyTorch, 64 tokens at a time", _chunks),
        Row("compile", "torch.compile of the naive", _compiled),
        Row("modelopt", "ModelOpt's expression", _modelopt),
        Row("mean", "minitron, mean", _ours("mean"), ours=True),
        Row("all", "minitron, mean + L2 + variance", _ours("mean", "L2", "var"), ours=True),
    ),
    cases={
        "small": {"B": 2, "S": 256, "C": 1536, "dtype": "bf16"},
        "mlp": {"B": 4, "S": 2048, "C": 14336, "dtype": "bf16"},
        "mlp-fp32": {"B": 4, "S": 2048, "C": 14336, "dtype": "fp32"},
        "long": {"B": 1, "S": 8192, "C": 4096, "dtype": "bf16"},
    },
    default=("mlp", "long"),
    make_inputs=make_inputs,
    floor=floor,
    floor_label="reading x once",
    floor_bytes=lambda x: x.nbytes,
    error=error,
    bound=1e-5,
    poison=poison,
    beside={"collector": collector},
)

if __name__ == "__main__":
    main(BENCH, doc=__doc__)
