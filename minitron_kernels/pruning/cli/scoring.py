"""`minitron-prune score`: calibration text -> scores, kept now and then, so that a killed one goes on."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_kernels import __version__
from minitron_kernels._command.documents import expand
from minitron_kernels._command.messages import say, show
from minitron_kernels._command.models import check_free, check_model, device_of, load_model
from minitron_kernels._command.progress import tqdm_for
from minitron_kernels.pruning.cli.estimate import say_estimate
from minitron_kernels.pruning.cli.targets import windows_of

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 60.0  # of work that a kill may cost
_KEY = "command.json"
_OPTIONS = (
    "samples",
    "seq_len",
    "batch_size",
    "seed",
    "axes",
    "seq",
    "mlp_tap",
    "head_score",
    "expert_score",
)


def score(args: argparse.Namespace) -> None:
    """Calibration text -> scores folder."""
    check_free(args.output, args.overwrite, folder=True)
    check_model(args.model)
    expand(args.text)
    device = None if args.device == "auto" else device_of(args.device)
    from minitron_kernels.pruning.score.collect import collect_importance

    windows = windows_of(args)
    batches = list(windows.split(args.batch_size))
    say_estimate(args.model, args.dtype, args.device, windows.numel())
    kept = Kept(args, windows)
    scores, done = kept.load(args.batch_size * args.seq_len)
    if done:
        say("minitron-prune", "resumed", f"batch {done} of {len(batches)} is done")
    if device is None:
        model = load_model(args.model, args.dtype, device_map="auto")
    else:
        model = load_model(args.model, args.dtype).to(device)
    with _bar(args.quiet, len(batches), done) as advance:
        while done < len(batches):
            part = Part(batches[done:], advance)
            scores = collect_importance(
                model,
                part,
                args.axes,
                seq=args.seq,
                mlp_tap=args.mlp_tap,
                head_score=args.head_score,
                expert_score=args.expert_score,
                resume_from=scores,
                progress=False,
            )
            done += part.count
            if done < len(batches):
                kept.save(scores)
    scores.save(args.output)
    kept.remove()
    show(f"{args.output}: {scores.tokens:,} tokens, {', '.join(scores.axes)}")


class Part:
    """Batches for a minute's work, at least one.

    Attributes:
        count: how many were taken.
    """

    def __init__(self, batches: Sequence[Tensor], advance: Callable[[int], object]) -> None:
        self._batches, self._advance, self.count = batches, advance, 0

    def __iter__(self) -> Iterator[Tensor]:
        end, self.count = time.monotonic() + SECONDS, 0
        for batch in self._batches:
            yield batch
            self.count += 1
            self._advance(1)
            if time.monotonic() >= end:
                return


class Kept:
    """The scores so far of a command, in a hidden folder beside its output.

    How many batches they are of follows from their tokens, so that no count can disagree with the sums.
    """

    def __init__(self, args: argparse.Namespace, windows: Tensor) -> None:
        self.folder = kept_folder(args.output)
        weights = sorted(path for end in ("safetensors", "bin") for path in args.model.glob(f"*.{end}"))
        files = [args.model / "config.json", *weights]
        about = {
            "versions": [__version__, *map(importlib.metadata.version, ("torch", "transformers"))],
            # of the tokens themselves: text, tokenizer, template and drawing are in them
            "windows": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
            "files": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            **{name: getattr(args, name) for name in (*_OPTIONS, "dtype", "device", "text_key")},
        }
        text = json.dumps(about)
        self._key = {"command": hashlib.sha256(text.encode()).hexdigest()}

    def load(self, tokens: int) -> tuple[Any, int]:
        """(the scores so far, batches of `tokens` that they are of); (None, 0) where there are none of it."""
        from minitron_kernels.pruning.score.scores import ImportanceScores

        try:
            if json.loads((self.folder / _KEY).read_text()) != self._key:
                raise ValueError("another command's")
            scores = ImportanceScores.load(self.folder)
        except (OSError, ValueError):
            self.remove()
            return None, 0
        done, rest = divmod(scores.tokens, tokens)
        if rest or not done:
            self.remove()
            return None, 0
        return scores, done

    def save(self, scores: Any) -> None:
        """Keeps them; not those of experts alone, which do not tell their tokens."""
        if not scores.tokens:
            return
        if not (self.folder / _KEY).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _KEY).write_text(json.dumps(self._key))
        scores.save(self.folder)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def kept_folder(output: Path) -> Path:
    """Where the scores so far are kept."""
    return output.with_name(f".{output.name}.so-far")


@contextlib.contextmanager
def _bar(quiet: bool, total: int, done: int) -> Iterator[Callable[[int], object]]:
    tqdm = tqdm_for(False if quiet else None)
    if tqdm is None:
        yield lambda count: None
        return
    with tqdm(total=total, initial=done, desc="scoring", unit="batch") as bar:
        yield bar.update
