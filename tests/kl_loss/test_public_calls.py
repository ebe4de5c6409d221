"""The steps that test_gpu.py takes on a GPU, on the CPU."""

import pytest

from kl_loss.public_calls import NAMES, Call, assert_as_reference


@pytest.mark.native
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_everything(name):
    call = Call(name, "cpu")
    assert_as_reference(call.step("native"), call.step("reference"))
