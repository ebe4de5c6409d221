"""What is set while lm-evaluation-harness works, and is afterwards as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # asked for by the library that runs the code
# what lm-eval says of every model that it did not load itself
_ALWAYS_SAID = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")
# of a generation_config, what is the model's and no way of writing
_OF_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation")
# ways of sampling, which a task says for itself, and what is no way of writing
_NOT_SAID = (
    *("do_sample", "temperature", "top_p", "top_k", "_from_model_config", "transformers_version"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
)


@contextlib.contextmanager
def plain_generation(model: Any) -> Iterator[dict[str, Any]]:
    """Answers are written as the tasks say, whatever the checkpoint's generation_config.json would have.

    A repetition penalty in it would change greedy answers, and `max_new_tokens` cut them. Gives what is left
    out, except for ways of sampling.
    """
    before = getattr(model, "generation_config", None)
    if before is None:
        yield {}
        return
    given = before.to_diff_dict()
    kept = {name: getattr(before, name, None) for name in _OF_MODEL[:-1]}
    model.generation_config = type(before)(
        **{name: value for name, value in kept.items() if value is not None}
    )
    try:
        yield {name: value for name, value in given.items() if name not in (*_OF_MODEL, *_NOT_SAID)}
    finally:
        model.generation_config = before


@contextlib.contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """Sets what the library that runs code asks for."""
    before = os.environ.get(ALLOW_CODE)
    if allowed:
        os.environ[ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if allowed:
            os.environ.pop(ALLOW_CODE)
            if before is not None:
                os.environ[ALLOW_CODE] = before


@contextlib.contextmanager
def warnings_of_lm_eval() -> Iterator[Counter[str]]:
    """Collects the warnings of lm-eval's loggers, each text once, instead of printing them."""
    found: Counter[str] = Counter()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if not text.startswith(_ALWAYS_SAID):
                found[re.sub(r"\d+", "#", text)] += 1  # of numbers one example is enough

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds what tasks and generation draw from; afterwards all generators are as they were."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def bars_shown(shown: bool) -> Iterator[None]:
    """Leaves out the bar over prompts, for which lm-eval has no option."""
    import lm_eval.api.task as module

    bar: Callable[..., Any] | None = getattr(module, "tqdm", None)
    if shown or bar is None:
        yield
        return
    module.tqdm = lambda items, *args, **options: items
    try:
        yield
    finally:
        module.tqdm = bar
