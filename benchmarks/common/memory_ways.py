"""Ways to read and to copy memory on the CPU, and which of them is the fastest.

A floor that is not the fastest way to move the bytes is not a floor: which way that is depends on the
processor (its prefetchers, the size of its buffers), on the size of the pages and on the number of threads.
So the ways are timed in turns, on the memory that the measured row reads, and the winner is the floor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import torch

from common.harness import quantile, timer

Ways = Mapping[str, Callable[[], object]]

KEEP, PASS = 1, 2  # hints of csrc/common/cpu/memory_floor.h: prefetch into all caches, or past them
STORES = {"plain stores": 0, "streaming stores": 1, "memcpy": 2, "rep movsb": 3}
PAGE = 4096
PREFETCHES = [(0, 0), *((ahead, KEEP) for ahead in (256, 512, 1024, 2048, 4096)), (1024, PASS), (4096, PASS)]


def _patterns(threads: int) -> list[tuple[str, tuple[int, int, int, int, bool]]]:
    """(name, (streams, bytes between them, bytes prefetched ahead, hint, whether each thread has one
    stretch)) of every combination.
    """
    made = []
    layouts = [(1, PAGE), *itertools.product((2, 4, 8), (PAGE, 16 * PAGE))]
    for (streams, apart), (ahead, hint), stretches in itertools.product(
        layouts, PREFETCHES, (True, False) if threads > 1 else (True,)
    ):
        name = "one stream" if streams == 1 else f"{streams} streams {apart >> 10} KiB apart"
        if ahead:
            name += f", prefetched {ahead} bytes ahead" + " past the caches" * (hint == PASS)
        if threads > 1:
            name += ", a stretch for each thread" if stretches else ", a MiB at a time"
        made.append((name, (streams, apart, ahead, hint, stretches)))
    return made


def ways_to_read(x: torch.Tensor) -> Ways:
    """name -> a call that reads all of x, contiguous and on the CPU, with torch's threads."""
    import minitron_kernels  # noqa: F401  registers the op

    read = torch.ops.minitron_kernels.read_floor
    return {name: functools.partial(read, x, *way) for name, way in _patterns(torch.get_num_threads())}


def ways_to_copy(out: torch.Tensor, x: torch.Tensor) -> Ways:
    """name -> a call that copies all of x to `out`, both contiguous and on the CPU, with torch's threads."""
    import minitron_kernels  # noqa: F401  registers the op

    copy, made = torch.ops.minitron_kernels.copy_floor_, {}
    for (name, way), (store, number) in itertools.product(_patterns(torch.get_num_threads()), STORES.items()):
        streams, apart, ahead, hint, _ = way
        if store.endswith("stores"):
            if streams <= 4 and apart == PAGE and hint != PASS:
                made[f"{store}, {name}"] = functools.partial(copy, out, x, number, *way)
        elif (streams, ahead) == (1, 0):
            made[name.replace("one stream", store)] = functools.partial(copy, out, x, number, *way)
    return made


def fastest(ways: Ways, device: str, *, finalists: int = 8, rounds: int = 5) -> str:
    """The name of the way whose median of busy seconds is the least.

    All ways take turns; the slower half goes after each round. Once there are at most `finalists`, a round
    takes `rounds` samples of each.
    """
    if not ways:
        raise ValueError("ways must have at least one way to move the memory, got none")
    timers = {name: timer(call, device) for name, call in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    left = list(ways)
    if len(left) > 1:
        timers[left[0]].sample()  # what only the first call does: wake threads, look up pages
    while len(left) > 1:
        for _ in range(rounds if len(left) <= finalists else 1):
            for name in left:
                samples[name].append(timers[name].sample().busy_s)
        left = sorted(left, key=lambda name: quantile(samples[name], 0.5))[: math.ceil(len(left) / 2)]
    return left[0]
