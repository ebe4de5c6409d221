"""Metrics and cross-entropy by the CUDA kernels, run on the host by the shim: the cases of every backend, what
is read and written, the order of threads; and planted faults, which these must find.
"""

import pytest

from kl_loss.metric_cases import *  # noqa: F403
from kl_loss.shim_tiles import (  # noqa: F401
    kernels_fixture,
    poisoned_memory_fixture,
    shim_fixture,
    without_cublas_fixture,
)
from tools.host_shim import missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
