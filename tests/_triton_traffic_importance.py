"""Launches of importance's Triton kernels, for _triton_traffic.py to count."""

from unittest import mock

import torch

from minitron_kernels.ops.importance import kernel_triton as k

B, S, C, HEADS = 2, 40, 1280, 10
MADE = ("moments", "counts", "partial", "piece_counts")  # by importance_moments, in this order


def measure(counting):
    k.FINISH_BLOCK = 512  # few programs: the interpreter is slow
    report = {}

    def count(name, made, function, *arguments, **tensors):
        """Of a second call, which is handed the tensors that the first one made."""
        first, new_empty = [], torch.Tensor.new_empty

        def make(*shape, **options):
            x = new_empty(*shape, **options)
            if "dtype" in options:  # else it is the interpreter's own
                first.append(x)
            return x

        def hand_out(*shape, **options):
            return first.pop(0) if "dtype" in options else new_empty(*shape, **options)

        with mock.patch.object(torch.Tensor, "new_empty", make):
            function(*arguments)
        tensors |= dict(zip(made, first, strict=True))
        with mock.patch.object(torch.Tensor, "new_empty", hand_out), counting(**tensors) as report[name]:
            function(*arguments)

    mask = torch.arange(B * S).reshape(B, S) >= 0
    borders = torch.tensor([0, 17, 64, B * S])
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(B, S, C).to(dtype)
        flat, y = x.view(B * S, C), torch.randn(B * S, C).to(dtype)
        for kinds in (1, 7):
            count(f"moments {name} {kinds}", MADE, k.importance_moments, x, None, None, 0, kinds, x=x)
        count(f"masked {name}", MADE, k.importance_moments, x, mask, None, 0, 1, x=x, mask=mask)
        count(f"packed {name}", MADE, k.importance_moments, flat, None, borders, 0, 1, x=x, borders=borders)
        count(f"heads {name}", ("norms", *MADE), k.importance_moments, x, None, None, HEADS, 1, x=x)
        count(f"rows {name}", ("out",), k.importance_rows, flat, None, x=x)
        count(f"pairs {name}", ("out",), k.importance_rows, flat, y, x=x, y=y)
    return report
