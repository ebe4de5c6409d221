"""What is done to a user's modules for a while, and undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that need no torch import this
    from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each module has the mode that it had, whatever was set inside.

    train() and eval() are not called: modules may do more in theirs than note the mode (merge adapters), and
    a mode for all is not what a model has of which parts are frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
