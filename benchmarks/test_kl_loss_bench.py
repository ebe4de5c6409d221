"""The same cases under pytest-benchmark, at a tiny shape: `pytest benchmarks --benchmark-only`.

Use it to compare two versions of the library on one machine, with --benchmark-autosave and
--benchmark-compare; kl_loss.py compares it with other libraries.
"""

from __future__ import annotations

import pytest

from kl_loss_rows.cases import SHAPES, make_inputs
from kl_loss_rows.floor import Floor
from kl_loss_rows.implementation import step
from kl_loss_rows.peers import IMPLEMENTATIONS

KEYS = [key for key, row in IMPLEMENTATIONS.items() if not row.compiles and row.serves("cpu")]


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def inputs(request):
    return make_inputs(SHAPES["XS"], request.param)


@pytest.mark.parametrize("key", KEYS)
def test_forward_backward(benchmark, inputs, key):
    implementation = IMPLEMENTATIONS[key]
    if reason := implementation.absent("cpu"):
        pytest.skip(f"{implementation.package} is absent: {reason}")
    benchmark(step, implementation.build(), inputs)


def test_floor(benchmark, inputs):
    benchmark(Floor(inputs))
