"""Scores the smaller models that plans make, one at a time; the source and all RNGs stay as they were."""

from __future__ import annotations

import contextlib
import gc
import math
import numbers
import random
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._command.progress import tqdm_for
from minitron_kernels.pruning.cut.model import prune_model
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
from minitron_kernels.pruning.search.progress_file import ProgressFile, plan_digest

ScoreFunc = Callable[[Any], Any]


@dataclass(frozen=True)
class Outcome:
    """What came of scoring one model.

    Args:
        score: a finite number; None where there is none.
        failure: why there is none; None where there is.
    """

    score: float | None = None
    failure: str | None = None


def name_of(score_func: ScoreFunc, given: str | None, *, must_tell: bool) -> str:
    """The name of a score function: as given, its own `name`, or that of the function.

    Args:
        score_func: the function.
        given: score_name=, or None.
        must_tell: whether the name must tell it from others, since scores are kept in a file.

    Raises:
        TypeError: `score_func` cannot be called, or a name is not a string.
        ValueError: the function has no name that tells it from others.
    """
    if not callable(score_func):
        raise TypeError(f"score_func must be a function of a model, got {type(score_func).__name__}")
    name = getattr(score_func, "name", None) if given is None else given
    if name is None:
        name = getattr(score_func, "__qualname__", None)
        if name is not None:
            name = f"{score_func.__module__}.{name}"
        if must_tell and (name is None or "<" in name):
            raise ValueError(
                "score_name must be given with a progress_file, for a lambda, an inner function or an object "
                "without a name: it tells which scores may be read from the file"
            )
        name = name or type(score_func).__name__
    if not isinstance(name, str) or not name:
        raise TypeError(f"score_name must be a string, got {name!r}")
    return name


class Scorer:
    """Scores models of plans that are cut from one model.

    Each model is handed to the function in eval mode, with gradients on and all RNGs (torch's, NumPy's,
    Python's) seeded alike, so that a function that draws numbers, or trains, gives the same score after a
    resume as without. Afterwards RNGs are as before.

    Args:
        model: the source.
        score_func: (model) -> a finite number.
        file: where scores are kept.
        seed: of the RNGs.

    Attributes:
        resumed: the plans, by digest, whose scores an earlier run had put into the file.
        first_error: what the function raised first.
    """

    def __init__(self, model: nn.Module, score_func: ScoreFunc, file: ProgressFile, seed: int) -> None:
        self.model, self.score_func, self.file, self.seed = model, score_func, file, seed
        self.resumed: set[str] = set()
        self.first_error: Exception | None = None
        self._old = set(file.scores)
        self._last: weakref.ref[Any] | None = None

    def __call__(self, plan: PruningPlan, what: str) -> Outcome:
        """The score of the model that a plan makes. An error of the function becomes a warning and a failure.

        Args:
            plan: of the model.
            what: the model, for the warning.
        """
        key = plan_digest(plan)
        if key in self.file.scores:
            self.resumed |= {key} & self._old
            return Outcome(self.file.scores[key])
        with _seeded(self.seed):
            try:
                score = self._score(plan)
            except _Failed as failed:
                failure = str(failed)
                if self.first_error is None:
                    self.first_error = failed.error
                warnings.warn(f"score_func failed for {what}: {failure}", stacklevel=3)
                return Outcome(failure=failure)
            finally:
                if self._last is not None and self._last() is not None:
                    gc.collect()  # it is in a reference cycle, and models must not pile up in memory
        self.file.add(key, score)
        return Outcome(score)

    def _score(self, plan: PruningPlan) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="every parameter of the model is frozen")
            smaller = prune_model(self.model, plan)
        smaller.eval()
        self._last = weakref.ref(smaller)
        try:
            with torch.enable_grad():
                return _number(self.score_func(smaller))
        except Exception as error:
            del smaller
            text = " ".join(f"{type(error).__name__}: {error}".split())
            traceback.clear_frames(error.__traceback__)  # their variables hold the model
            raise _Failed(text, error) from None

    def raise_if_nothing(self, outcomes: list[Outcome]) -> None:
        """Raises ValueError if no model has a score."""
        if all(outcome.score is None for outcome in outcomes):
            reasons = {outcome.failure for outcome in outcomes}
            raise ValueError(
                f"score_func gave no score for any of {len(outcomes)} models; the first: "
                f"{next(outcome.failure for outcome in outcomes)}"
                + ("" if len(reasons) == 1 else f" ({len(reasons) - 1} other reasons)")
            ) from self.first_error


class _Failed(Exception):
    """A score function that raised, or gave no finite number."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__(text)
        self.error = error


def _number(value: Any) -> float:
    """The score as a float.

    Raises:
        TypeError, ValueError: it is not a number, or not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"score_func must return a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"score_func must return a finite number, got {float(value)}")
    return float(value)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All RNGs seeded; as before afterwards."""
    numpy: Any = sys.modules.get("numpy")
    mine, theirs = random.getstate(), numpy.random.get_state() if numpy else None
    with contextlib.ExitStack() as stack:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            devices = range(torch.accelerator.device_count())
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=accelerator.type))
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(mine)
            if numpy:
                numpy.random.set_state(theirs)


@contextlib.contextmanager
def bar(progress: bool | None, total: int) -> Iterator[Callable[[], object]]:
    """A progress bar over models; yields what to call after each."""
    tqdm = tqdm_for(progress)
    if tqdm is None:
        yield lambda: None
        return
    with tqdm(total=total, desc="search", unit="model") as shown:
        yield shown.update
