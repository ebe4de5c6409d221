"""What a plan of linear_kl_loss says on every device; plan_cpu.py and plan_gpu.py make plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradient to a tensor of this dtype is made.

    fp16 gradients wait for the loss scale in fp32: p / N of a rare token is below fp16's smallest number.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True, kw_only=True)
class LinearKLPlan:
    """What linear_kl_loss does with a problem; made by plan_linear_kl_loss, shown by explain().

    Memory is in bytes, and all of it beyond the call's inputs and outputs.
    """

    schedule: str
    num_tokens: int
    vocab_size: int
    student_hidden_size: int
    teacher_hidden_size: int
    num_gemms: int
    flops: int
    chunk_rows: int
    tile: int
    budget_bytes: int
    part_bytes: tuple[int, ...]

    # Names of part_bytes
    PARTS: ClassVar[tuple[str, ...]] = ()

    @property
    def num_chunks(self) -> int:
        """Chunks of rows."""
        return -(-self.num_tokens // self.chunk_rows) if self.num_tokens else 0

    @property
    def total_bytes(self) -> int:
        """All bytes of the call beyond its inputs and outputs."""
        return sum(self.part_bytes)

    @property
    def accumulator_bytes(self) -> int:
        """Of fp32 gradients that wait for further parts: their size is the problem's, not the budget's."""
        raise NotImplementedError

    @property
    def workspace_bytes(self) -> int:
        """The bytes that the budget bounds: all but accumulator_bytes."""
        return self.total_bytes - self.accumulator_bytes

    def explain(self) -> str:
        """The plan as text for people: schedule, flops, each part's memory, and what is known of its time."""
        lines = [
            f"linear_kl_loss: {self.num_tokens} tokens, vocabulary {self.vocab_size}, hidden sizes "
            f"{self.student_hidden_size} (student) and {self.teacher_hidden_size} (teacher)",
            f"schedule   {self.schedule}: {self.num_gemms} GEMMs, {self.flops / 1e9:.1f} Gflop"
            f"{self._explain_operands()}",
            f"rows       {self.num_chunks} chunk(s) of {self.chunk_rows}",
            f"vocabulary tiles of {self.tile}{self._explain_kept()}",
        ]
        lines += [
            f"{_mib(nbytes)}  {name}"
            for name, nbytes in zip(self.PARTS, self.part_bytes, strict=True)
            if nbytes
        ]
        lines.append(f"{_mib(self.total_bytes)}  in all{self._explain_lifetime()}")
        lines.append(
            f"{_mib(self.workspace_bytes)}  of it counts towards workspace_bytes = {self.budget_bytes}"
        )
        lines.append(f"{_mib(self.num_tokens * self.vocab_size * 8)}  is what both fp32 logits would take")
        return "\n".join([*lines, *self._explain_more()])

    def _explain_operands(self) -> str:
        return ""

    def _explain_kept(self) -> str:
        return ""

    def _explain_lifetime(self) -> str:
        return ""

    def _explain_more(self) -> list[str]:
        return []


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:9.1f} MiB"
