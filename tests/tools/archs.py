"""The CUDA architectures that compiled code is looked at for: MINITRON_TEST_ARCHS=80,90,100, or sm_90 alone.

Most of what a change breaks shows on every architecture, and each takes minutes: the others are for changes
of kernels and for releases.
"""

from __future__ import annotations

import os
from collections.abc import Iterable


def chosen_archs(known: Iterable[int | str]) -> list[int]:
    """Those of `known` that are asked for."""
    wanted = [int(arch) for arch in os.environ.get("MINITRON_TEST_ARCHS", "90").split(",")]
    known = {int(arch) for arch in known}
    if unknown := sorted(set(wanted) - known):
        raise ValueError(f"MINITRON_TEST_ARCHS: there are gates for {sorted(known)}, not for {unknown}")
    return wanted
