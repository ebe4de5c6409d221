"""accelerate keeps the settings of its first Accelerator for the whole process."""

import contextlib
import os


def reset():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def forget_accelerator():
    """Settings of earlier tests do not hold within, nor those made here afterwards (environment included)."""
    before = dict(os.environ)
    reset()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset()
