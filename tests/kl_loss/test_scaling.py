"""kl_scale_grad_: C++ on the CPU, and the CUDA kernel run on the host by the shim. Triton's is in
triton_cases.py.
"""

import pytest
import torch

from kl_loss.faults import CUDA_SCALE
from kl_loss.scaling_cases import FACTORS, assert_scaled, check, values
from minitron_kernels.ops.kl_loss.scaling import scale_grad_
from tools.faults import some
from tools.host_shim import (
    REVERSE,
    WITHOUT_BFLOAT16,
    WITHOUT_HALF,
    assert_fault_is_found,
    load,
    missing_tool,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_shim = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


def on_cpu(grad, factor):
    scale_grad_(grad, factor, "native")


@pytest.fixture(scope="module", name="shim")
def shim_fixture():
    return load("kl_loss")


@pytest.mark.native
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_on_the_cpu(simd_level, dtype):
    check(on_cpu, dtype)
    for factor in FACTORS:
        check(on_cpu, dtype, sizes=(77,), factors=(factor,))


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 3])
def test_several_tasks(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(on_cpu, torch.bfloat16, sizes=((1 << 16) - 1, 1 << 16, (3 << 16) + 5), factors=(0.7,))
    finally:
        torch.set_num_threads(before)


@pytest.mark.native
def test_a_factor_of_one_writes_nothing():
    """Not even the same bits: the memory may be read only, as that of a mapped file is."""
    grad = values(1000, torch.bfloat16)
    version = grad._version
    on_cpu(grad, torch.ones(()))
    assert_scaled(grad, values(1000, torch.bfloat16), torch.ones(()))
    assert grad._version == version + 1


@pytest.mark.native
def test_bad_input():
    good, one = torch.zeros(4, 4), torch.ones(())
    for grad, factor, message in (
        (good.t()[:, :2], one, "grad must be contiguous"),
        (good, torch.ones(1), "factor must have no dimensions"),
        (good, one.double(), "factor must be a contiguous float32"),
        (good.double(), one, "factor must be a contiguous float64"),
        (good.long(), one, "grad must be float64, float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.minitron_kernels.kl_scale_grad_(grad, factor)


@pytest.mark.native
def test_opcheck():
    op = torch.ops.minitron_kernels.kl_scale_grad_.default
    torch.library.opcheck(op, (torch.randn(5, 3), torch.tensor(0.5)))


# ---- CUDA, on the host

TURN = {torch.float32: 4096, torch.bfloat16: 8192, torch.float16: 8192}  # elements of a block's turn


def check_values(shim, dtypes=DTYPES):
    for dtype in dtypes:
        check(shim.ops.kl_scale_grad_, dtype)
        sizes = (TURN[dtype], TURN[dtype] + 1, 3 * TURN[dtype] + 77)
        check(shim.ops.kl_scale_grad_, dtype, sizes=sizes, factors=(0.7, -3.0))


def check_many_turns(shim):
    """More turns than there are blocks."""
    n = 2049 * TURN[torch.float32] + 9
    check(shim.ops.kl_scale_grad_, torch.float32, sizes=(n,), factors=(0.7,), starts=(1,))


def check_traffic(shim, dtype=torch.float32):
    """Once read and once written, by 16 bytes; nothing where the factor is 1."""
    factor, size = torch.tensor(0.7), 2 * TURN[dtype] + 1024
    for one in (False, True):
        grad = values(size, dtype)
        value = torch.ones(()) if one else factor
        with shim.trace(grad=grad, factor=value[None]) as trace:
            shim.ops.kl_scale_grad_(grad, value)
            loads, stores = trace.loads("grad"), trace.take_stores(grad)
        expected = 0 if one else size * grad.element_size()
        assert (loads.bytes, stores.bytes) == (expected, expected), "bytes of grad"
        assert (loads.narrow, stores.narrow, stores.twice, stores.elsewhere) == (0, 0, 0, 0), "narrow"


def check_bounds(shim):
    for start, n in ((0, 4096), (1, 5000), (3, 9)):
        whole = values(6000, torch.float32)
        grad, factor = whole[start : start + n], torch.tensor(0.7)
        with shim.trace(grad=grad, factor=factor[None]) as trace:
            shim.ops.kl_scale_grad_(grad, factor)
            stores = trace.take_stores(grad)
        assert stores.never == stores.twice == stores.elsewhere == 0


CHECKS = {
    "values": lambda shim: check_values(shim, [torch.float32]),
    "many turns": check_many_turns,
    "traffic": check_traffic,
    "bounds": check_bounds,
}


@needs_shim
def test_values_of_cuda(shim):
    check_values(shim)
    check_many_turns(shim)
    with shim.order(REVERSE):
        check_values(shim, [torch.bfloat16])


@needs_shim
@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_of_cuda(shim, dtype):
    check_traffic(shim, dtype)
    check_bounds(shim)


@needs_shim
def test_bad_input_of_cuda(shim):
    good, one = torch.zeros(4, 4), torch.ones(())
    for grad, factor, message in (
        (good.t()[:, :2], one, "grad must be contiguous"),
        (good, torch.ones(1), "factor must be float32 without dimensions"),
        (good, one.double(), "factor must be float32 without dimensions"),
        (good.double(), one, "grad must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            shim.ops.kl_scale_grad_(grad, factor)


@needs_shim
@pytest.mark.parametrize("name", some(CUDA_SCALE))
def test_planted_fault_is_found(shim, name):
    key, fault, message = CUDA_SCALE[name]
    broken = load("kl_loss", fault, WITHOUT_HALF, WITHOUT_BFLOAT16)
    assert_fault_is_found(CHECKS[key], shim, broken, message)
