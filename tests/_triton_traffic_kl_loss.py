"""Launches of kl_loss's Triton kernels, for _triton_traffic.py to count."""

import torch

from minitron_kernels.ops.kl_loss import kernel_triton as k

ROWS, VOCAB, H, HT = 3, 512, 64, 96
BLOCKS = k.LinearBlocks(16, 128, 32)


def measure(counting):
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
