"""The floor: the GEMMs that no implementation can do without, by torch.mm and nothing else.

Teacher logits, student logits, gradient of the hidden states, gradient of the head, in blocks of 512 rows and
4096 tokens of the vocabulary, into buffers allocated before.
"""

from __future__ import annotations

import torch
from _cases import Case, Inputs

BLOCK_N = 512
BLOCK_V = 4096


def gemm_flops(case: Case) -> int:
    """Of the four GEMMs: 2 N V (3 H + Ht)."""
    return 2 * case.N * case.V * (3 * case.H + case.Ht)


class Floor:
    """Calling it runs the four GEMMs once, on operands and buffers of `dtype` (the inputs' unless given)."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype | None = None) -> None:
        self.X, self.W, self.Y, self.U = (
            operand.detach() if dtype is None else operand.detach().to(dtype) for operand in inputs.operands
        )
        rows, tile = min(BLOCK_N, len(self.X)), min(BLOCK_V, len(self.W))
        self.student_logits = self.X.new_empty(rows, tile)
        self.teacher_logits = self.X.new_empty(rows, tile)
        self.dX = torch.empty_like(self.X)
        self.dW = torch.empty_like(self.W)

    def __call__(self) -> None:
        X, W, Y, U = self.X, self.W, self.Y, self.U
        for n in range(0, len(X), BLOCK_N):
            rows = slice(n, min(n + BLOCK_N, len(X)))
            for v in range(0, len(W), BLOCK_V):
                cols = slice(v, min(v + BLOCK_V, len(W)))
                size = (slice(0, rows.stop - rows.start), slice(0, cols.stop - cols.start))
                dz = self.student_logits[size]  # any numbers will do: the time is that of dense operands
                torch.mm(Y[rows], U[cols].t(), out=self.teacher_logits[size])
                torch.mm(X[rows], W[cols].t(), out=dz)
                torch.mm(dz, W[cols], out=self.dX[rows])
                torch.mm(dz.t(), X[rows], out=self.dW[cols])
