"""Progress bars of functions that take long, by tqdm where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def tqdm_for(progress: bool | None) -> Callable[..., Any] | None:
    """tqdm, to be called as ever; None where no bar is wanted, or tqdm is not installed.

    Args:
        progress: whether a bar is shown; None: where standard error is a terminal.

    Raises:
        ImportError: a bar is asked for, and tqdm is not installed.
    """
    if progress is False:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        return None
    return functools.partial(tqdm, disable=None if progress is None else False)
