"""Bytes that each Triton kernel loads and stores, tensor by tensor, counted in Triton's interpreter.

Run as a script, for the interpreter is chosen before triton is imported; prints JSON:
{case: {tensor: [bytes loaded, bytes stored, bytes of the tensor]}}.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from contextlib import contextmanager

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder as Builder

from minitron_kernels.ops.kl_loss import kernel_triton as k

ROWS, VOCAB, H, HT = 3, 512, 64, 96
BLOCKS = k.LinearBlocks(16, 128, 32)


@contextmanager
def counting(**tensors):
    """Yields {name: [loaded, stored, size]}, complete at the end of the block; other accesses raise."""
    spans = {
        name: (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), x.element_size())
        for name, x in tensors.items()
    }
    counts = {name: [0, 0, end - begin] for name, (begin, end, _) in spans.items()}
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def count(pointers, mask, direction):
        enabled = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[enabled].astype(np.uint64)
        known = 0
        for name, (begin, end, size) in spans.items():
            found = int(((addresses >= begin) & (addresses < end)).sum())
            counts[name][direction] += found * size
            known += found
        if known != addresses.size:
            raise IndexError(f"{addresses.size - known} accesses outside of the tensors")

    def counted_load(self, pointers, mask, *rest, **options):
        count(pointers, mask, 0)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self, pointers, value, mask, *rest, **options):
        count(pointers, mask, 1)
        return store(self, pointers, value, mask, *rest, **options)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    try:
        yield counts
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


def measure():
    k.FORWARD_BLOCK = k.GRAD_BLOCK = 256
    k.linear_blocks = lambda mixture: BLOCKS
    k.processors = lambda device: 2
    report = {}
    loss, stats, weight = torch.zeros(ROWS), torch.zeros(ROWS, k.NUM_STATS), torch.ones(ROWS)
    for beta, kind in ((0.0, "forward"), (1.0, "reverse"), (0.5, "jsd")):
        options = (beta, 1.0, 1.0, 0.0, 1.0, 0.0)
        for student_dtype, teacher_dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
        ):
            student = torch.randn(ROWS, VOCAB).to(student_dtype)
            teacher = torch.randn(ROWS, VOCAB).to(teacher_dtype)
            logits, grad = (student, teacher, None, None), torch.zeros_like(student)
            name = f"{kind} {student.element_size()} {teacher.element_size()}"
            with counting(student=student, teacher=teacher, loss=loss, stats=stats) as report[f"rows {name}"]:
                k.forward(logits, None, loss, stats, VOCAB, options)
            with counting(student=student, teacher=teacher, weight=weight, stats=stats, grad=grad) as counts:
                k.grad(logits, None, weight, stats, grad, VOCAB, options)
            report[f"grad {name}"] = counts
        student, teacher = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
        state, sums = torch.zeros(k.NUM_STATE, ROWS), torch.zeros(k.NUM_SUMS, ROWS)
        logits = (student, teacher, None, None)
        with counting(student=student, teacher=teacher, state=state) as report[f"tile_stats {kind}"]:
            k.tile_stats(logits, None, state, False, options)
        if kind == "jsd":
            with counting(student=student, teacher=teacher, stats=stats, sums=sums) as counts:
                k.tile_mixture(logits, None, stats, sums, False, options)
            report["tile_mixture jsd"] = counts
    return report


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
