"""`minitron-distill cache`: runs a teacher over the windows of text, and keeps what it says."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_kernels._command.documents import check_files, has_text
from minitron_kernels._command.messages import say, show
from minitron_kernels._command.models import check_free, check_model, load_model, tokenizer_if_any
from minitron_kernels._command.progress import Progress, without_bars
from minitron_kernels.distillation.cache.spec import SPEC_FILE, bits_of
from minitron_kernels.distillation.cli import config as configs
from minitron_kernels.distillation.cli.arguments import flags_of
from minitron_kernels.distillation.cli.interrupt import Interrupt, Stopped, exit_code
from minitron_kernels.distillation.cli.job import choose_device, own_device, rank, world_size

if TYPE_CHECKING:
    from minitron_kernels.distillation.cli.data import Chosen

_OF_TIER = {"k": "topk", "mass": "topk", "temperatures": "topk", "quantiser": "topk", "draws": "sampled"}


class Batches:
    """The batches of this process, until a signal comes; shows how far they are.

    Args:
        data: windows.
        batch_size: of a batch.
        interrupt: looked at before each batch.
        quiet: no progress.
    """

    def __init__(self, data: Chosen, batch_size: int, interrupt: Interrupt, *, quiet: bool) -> None:
        self._data, self._size, self._interrupt, self._quiet = data, batch_size, interrupt, quiet
        self._begins = range(rank() * batch_size, len(data), world_size() * batch_size)

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from minitron_kernels.distillation.cli.data import collate

        progress = Progress("caching", len(self), unit="batch", quiet=self._quiet or rank() > 0)
        begin, tokens = time.monotonic(), 0
        try:
            for first in self._begins:
                if self._interrupt.number is not None:
                    return
                samples = [self._data[i] for i in range(first, min(first + self._size, len(self._data)))]
                batch = collate(samples)
                yield {"input_ids": batch["input_ids"]}
                tokens += batch["input_ids"].numel()
                rate = tokens * world_size() / max(time.monotonic() - begin, 1e-9)
                progress.advance(1, {"tokens/s": rate})
        finally:
            progress.close()


def cache(args: argparse.Namespace) -> int:
    """Runs cache; returns the exit code."""
    config = configs.load("cache", args.config, flags_of(args))
    if args.print_config:
        show(configs.to_toml("cache", config).rstrip("\n"))
        return 0
    configs.check_required("cache", config)
    for name, tier in _OF_TIER.items():
        if config[name] is not None and config["tier"] != tier:
            raise ValueError(f"--{name} is for --tier {tier}, got --tier {config['tier']}")
    if config["k"] is not None and config["vocab_size"] is not None and config["k"] > config["vocab_size"]:
        raise ValueError(f"--k must be at most --vocab-size {config['vocab_size']}, got {config['k']}")
    if config["quantiser"] is not None:
        bits_of(config["quantiser"])
    out = Path(config["out"])
    if not args.dry_run:
        _check_out(out)
    check_model(Path(config["teacher"]))
    check_files(config["data"], "--data")
    from minitron_kernels.distillation.cli.data import read_windows  # torch, which is slow

    device = choose_device(config["device"])
    data = read_windows(
        config["data"],
        config["teacher"],
        seq_len=config["seq_len"],
        samples=config["samples"],
        seed=config["seed"],
        text_key=config["text_key"],
    )
    if config["samples"] is not None and len(data) < config["samples"] and rank() == 0:
        message = f"--data has {len(data)} windows of {config['seq_len']} tokens, not {config['samples']}"
        say("minitron-distill", "warning", message)
    if args.dry_run:
        from minitron_kernels.distillation.cli.estimate import of_cache

        show(of_cache(config, len(data), device))
        return 0
    return _fill(config, out, data, device)


def _fill(config: dict[str, Any], out: Path, data: Chosen, device: str) -> int:
    from minitron_kernels.distillation.cache import cache_teacher

    without_bars(config["quiet"])
    teacher = load_model(Path(config["teacher"]), config["dtype"], otherwise="a teacher", with_head=True)
    tokenizer = tokenizer_if_any(Path(config["teacher"]))
    if tokenizer is None and has_text([Path(file) for file in config["data"]]):
        raise ValueError(f"--teacher {config['teacher']}: has no tokenizer")
    more = {} if config["shard_size"] is None else {"shard_bytes": config["shard_size"]}
    interrupt = Interrupt(_say_wait)
    batches = Batches(data, config["batch_size"], interrupt, quiet=config["quiet"])
    again = "the same command goes on from here"
    try:
        with interrupt:
            done = cache_teacher(
                teacher.to(own_device(device)),
                batches,
                out,
                tier=config["tier"],
                k=config["k"],
                mass=config["mass"],
                samples=config["draws"],
                temperatures=config["temperatures"] or (),
                quantiser=config["quantiser"],
                vocab_size=config["vocab_size"],
                tokenizer=tokenizer,
                progress=False,
                **more,
            )
    except Stopped as stop:
        say("minitron-distill", "stopped", f"at once, without the shard that was being written; {again}")
        return exit_code(stop.number)
    there = f", {done.skipped:,} were there" if done.skipped else ""
    made = f"{done.added:,} windows cached{there}, {done.tokens:,} tokens in {done.seconds:.1f} s"
    if interrupt.number is not None:
        say("minitron-distill", "interrupted", f"{made}; {again}")
        return exit_code(interrupt.number)
    if rank() == 0:
        show(f"{made}\n{done.cache}")
    return 0


def _check_out(out: Path) -> None:
    """Checks that the cache's folder can be written: a new one, an empty one, or a cache."""
    # what is hidden may be the spec that another process is writing
    if out.is_dir() and (all(p.name.startswith(".") for p in out.iterdir()) or (out / SPEC_FILE).is_file()):
        check_free(out, True, folder=True, option="--out")
        return
    if out.exists():
        what = f"has other files than a cache's (no {SPEC_FILE})" if out.is_dir() else "is not a folder"
        raise FileExistsError(17, f"{what}: take another --out", str(out))
    check_free(out, False, folder=True, option="--out")


def _say_wait(number: int) -> None:
    # a handler runs inside whatever the process is doing, perhaps inside a write to stderr's buffer
    if rank() == 0:
        os.write(2, b"\nminitron-distill: stopping after this batch; once more to stop at once\n")
