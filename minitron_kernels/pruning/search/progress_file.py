"""A search on disk: one JSON with the scores so far, replaced as a whole after each, and what they are of."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._files import write_text
from minitron_kernels._tensors import bytes_of
from minitron_kernels.pruning.families.configs import as_dict
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

FORMAT = "minitron_kernels.search"
VERSION = 1
_OF_THE_TARGET = ("parameters", "made_with", "candidates")  # of a plan's JSON: not of the model it makes


class ProgressFile:
    """The scores of a search that may be killed and go on: {digest of a plan: score}.

    Args:
        path: of the file; None to keep the scores in memory alone.
        identity: what the scores are of, by name: a file that was written for anything else is refused.

    Raises:
        ValueError: the file is damaged, or of another search; says which part of the identity differs.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, str]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = dict(identity)
        self.scores: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            self.scores = self._read(self.path)
        self._write()  # before hours of work it is seen whether that is possible

    def _read(self, path: Path) -> dict[str, float]:
        again = "take another progress_file, or delete this one to begin anew"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is not the JSON of a search ({error}): {again}") from None
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path}: is not the progress of a search, {FORMAT} version {VERSION}: {again}")
        identity, scores = data.get("identity"), data.get("scores")
        if not isinstance(identity, dict) or not isinstance(scores, dict):
            raise ValueError(f"{path}: lacks its identity or its scores: {again}")
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise ValueError(
                    f"{path}: holds scores of another {name}: {identity.get(name)!r}, where this search has "
                    f"{value!r}: {again}"
                )
        if unknown := set(identity) - set(self.identity):
            raise ValueError(f"{path}: holds scores of another kind of search ({min(unknown)}): {again}")
        for key, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
                raise ValueError(f"{path}: the score of {key} must be a finite number, got {score!r}")
        return {key: float(score) for key, score in scores.items()}

    def add(self, key: str, score: float) -> None:
        """Keeps a score; on disk when this returns."""
        self.scores[key] = score
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            data = {"format": FORMAT, "version": VERSION, "identity": self.identity, "scores": self.scores}
            write_text(self.path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def plan_digest(plan: PruningPlan) -> str:
    """A SHA-256 of what a plan makes of a model; plans for other targets that make the same have the same."""
    made = {name: value for name, value in plan.to_dict().items() if name not in _OF_THE_TARGET}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """A SHA-256 of a model's class, config and weights. All weights are read: some seconds for 10 GB.

    What modules keep beside tensors (`_extra_state`, as those of Transformer Engine) counts as pickle writes
    it: where that differs, the model is another.

    Raises:
        ValueError: a weight is offloaded, sharded or quantised, or such a state cannot be pickled; names it.
    """
    whole = hashlib.sha256()
    config = {
        key: value
        for key, value in as_dict(model.config).items()
        if key != "transformers_version" and not key.startswith("_")
    }
    whole.update(f"{type(model).__name__} {json.dumps(config, sort_keys=True)}".encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            whole.update(f"{name} ".encode() + _pickled(name, tensor))
            continue
        if tensor.is_meta or type(tensor.data) is not Tensor:
            raise ValueError(f"{name} is offloaded, sharded or quantised: load the whole model on one device")
        _add(whole, name, tensor)
    return whole.hexdigest()


def _pickled(name: str, state: Any) -> bytes:
    """A module's extra state as bytes."""
    if isinstance(state, io.BytesIO):
        return state.getvalue()
    try:
        return pickle.dumps(state, protocol=4)
    except Exception as error:  # of the state's own class
        raise ValueError(
            f"{name} cannot be pickled ({error}), by which a model is known again: leave progress_file out"
        ) from error


def tables_digest(tables: Any) -> str:
    """A SHA-256 of the tables of scores, nested by names."""
    whole = hashlib.sha256()

    def add(name: str, table: Any) -> None:
        if isinstance(table, Mapping):
            for key in table:
                add(f"{name}/{key}", table[key])
        else:
            _add(whole, name, torch.as_tensor(table, device="cpu"))

    add("", tables)
    return whole.hexdigest()


def _add(whole: Any, name: str, tensor: Tensor) -> None:
    whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for piece in bytes_of(tensor.detach()):
        whole.update(piece)
