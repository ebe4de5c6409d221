"""Launches of importance's Triton kernels, for the tools that look at them without a GPU.

tools/offline_triton.py compiles them for GPUs that are not here, tools/triton_traffic.py counts their bytes,
tools/triton_recompiles.py sees whether another size compiles anew.
"""

from unittest import mock

import torch

from minitron_kernels.ops.importance import kernel_triton as k


def to_compile(target_name):
    """(name, call) of every kernel and dtype; for one target with all kinds, else with few."""
    B, S, C, HEADS = 4, 2048, 14336, 32
    DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    out = []

    def add(name, call, *arguments):
        out.append((name, lambda: call(*arguments)))

    mask, borders = empty(B, S, dtype=torch.bool), empty(B + 1, dtype=torch.int64)
    for name, dtype in DTYPES.items():
        x = empty(B, S, C, dtype=dtype)
        for kinds in range(1, 8) if target_name == "sm_90" else (1, 7):
            add(f"moments {name} {kinds}", k.importance_moments, x, None, None, 0, kinds)
        for kinds in (1, 7):
            add(f"masked {name} {kinds}", k.importance_moments, x, mask, None, 0, kinds)
            add(f"packed {name} {kinds}", k.importance_moments, x[0], None, borders, 0, kinds)
        heads = empty(B, S, HEADS * 128, dtype=dtype)
        add(f"heads {name}", k.importance_moments, heads, mask, None, HEADS, 1)
        rows = empty(B * S, 4096, dtype=dtype)
        add(f"rows {name}", k.importance_rows, rows, None)
        add(f"pairs {name}", k.importance_rows, rows, rows)
    return out


def measure(counting):
    """Bytes of each tensor that each kernel moves, at shapes small enough for the interpreter."""
    B, S, C, HEADS = 2, 40, 1280, 10
    MADE = ("moments", "counts", "partial", "piece_counts")  # by importance_moments, in this order

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


# of inputs that differ in size alone: the first is what the others are compared with
SIZES = ((2, 64), (1, 1), (1, 16), (3, 1), (3, 1037), (16, 33), (1, 5000))  # B, S
KERNELS = {"importance_pieces_kernel", "importance_finish_kernel", "importance_rows_kernel"}


def launch(size):
    """Every launch of the op on an input of this size."""
    C, HEADS = 1024, 8

    B, S = size
    x, borders = torch.zeros(B, S, C, dtype=torch.bfloat16), torch.tensor([0, B * S])
    start = S % 2  # a mask that is aligned for the first size, and for others not
    mask = torch.ones(B * S + start, dtype=torch.bool)[start:]
    for heads in (0, HEADS):
        k.importance_moments(x, None, None, heads, 7)
        k.importance_moments(x, mask.view(B, S), None, heads, 7)
        k.importance_moments(x.view(-1, C), mask, borders, heads, 7)
    k.importance_rows(x.view(-1, C), None)
    k.importance_rows(x.view(-1, C), x.view(-1, C))
