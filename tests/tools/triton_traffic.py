"""Bytes that each Triton kernel loads and stores, tensor by tensor, counted in Triton's interpreter.

Run as a script with the name of an op, for the interpreter is chosen before triton is imported. Prints what
measure() of <op>/launches.py returns, {case: {tensor: [bytes loaded, stored, of the tensor]}}.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib
import json
import sys
from contextlib import contextmanager

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder as Builder


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


if __name__ == "__main__":
    op = importlib.import_module(f"{sys.argv[1]}.launches")
    json.dump(op.measure(counting), sys.stdout)
