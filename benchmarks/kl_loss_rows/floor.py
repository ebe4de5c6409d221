"""The floor: only the GEMMs that every implementation needs, by torch.mm.

These are the teacher's logits, the student's logits, the gradient of the hidden states and the gradient of
the head, in blocks of rows and of vocabulary entries, into buffers that are allocated beforehand.
"""

from __future__ import annotations

import torch

from kl_loss_rows.cases import Case, Inputs

# rows and vocabulary entries of a block: small enough for a CPU's caches, large enough to fill a GPU
BLOCKS = {"cpu": (512, 4096), "cuda": (8192, 16384)}


def gemm_flops(case: Case, teacher: bool = True) -> int:
    """The flops of the four GEMMs: 2 N V (3 H + Ht); of three, for a loss without a teacher."""
    return 2 * case.N * case.V * (3 * case.H + case.Ht * teacher)


class Floor:
    """Calling it runs the four GEMMs once, on operands and buffers of `dtype` (the inputs' unless given).

    Without `teacher` only the student's three.
    """

    def __init__(self, inputs: Inputs, dtype: torch.dtype | None = None, teacher: bool = True) -> None:
        self.teacher = teacher
        self.X, self.W, self.Y, self.U = (
            operand.detach() if dtype is None else operand.detach().to(dtype) for operand in inputs.operands
        )
        self.blocks = BLOCKS[self.X.device.type]
        rows, tile = min(self.blocks[0], len(self.X)), min(self.blocks[1], len(self.W))
        self.student_logits = self.X.new_empty(rows, tile)
        self.teacher_logits = self.X.new_empty(rows, tile)
        self.dX = torch.empty_like(self.X)
        self.dW = torch.empty_like(self.W)

    def __call__(self) -> None:
        X, W, Y, U = self.X, self.W, self.Y, self.U
        block_n, block_v = self.blocks
        for n in range(0, len(X), block_n):
            rows = slice(n, min(n + block_n, len(X)))
            for v in range(0, len(W), block_v):
                cols = slice(v, min(v + block_v, len(W)))
                size = (slice(0, rows.stop - rows.start), slice(0, cols.stop - cols.start))
                dz = self.student_logits[size]  # the values do not matter for the time of dense GEMMs
                if self.teacher:
                    torch.mm(Y[rows], U[cols].t(), out=self.teacher_logits[size])
                torch.mm(X[rows], W[cols].t(), out=dz)
                torch.mm(dz, W[cols], out=self.dX[rows])
                torch.mm(dz.t(), X[rows], out=self.dW[cols])
