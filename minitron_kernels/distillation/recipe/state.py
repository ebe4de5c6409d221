"""recipe.json: which stages are done, of which configuration and inputs, and what they made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.cli.record import (
    CONFIG,
    PICTURE,
    RECORD,
    now,
    take_lock,
    versions,
    write_text,
)
from minitron_kernels.distillation.recipe.files import changed, digest_of, listing
from minitron_kernels.distillation.recipe.graph import Node

FILE, _LOCK = "recipe.json", ".recipe.lock"
FORMAT, VERSION = "minitron-recipe", 1
# what is to be done with a stage
DONE, GO_ON, AGAIN, NEW = "done", "goes on", "again", "new"


class State:
    """The entries of recipe.json in the folder of a recipe.

    An entry: digest (of configuration and inputs), config and inputs themselves, made_of (what the stages
    that it reads had made, as hashes), status ("begun", "done"), files {name: hash}, times in UTC, seconds.

    Raises:
        ValueError: the file is damaged, or of another program or release.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / FILE
        self.lock: int | None = None  # the open file of locked()
        self.entries: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path}: is damaged: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
            raise ValueError(f"{self.path}: is not the state of a recipe of this release")
        self.entries = found["stages"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder.

        Raises:
            ValueError: another one is in it.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / _LOCK).open("w") as stream:
            take_lock(stream.fileno(), self.out)
            self.lock = stream.fileno()
            try:
                yield
            finally:
                self.lock = None

    def verdict(self, node: Node) -> tuple[str, str]:
        """(DONE, GO_ON, AGAIN or NEW, why it is done again)."""
        entry = self.entries.get(node.path)
        if entry is None or entry["status"] == "removed":
            return NEW, ""
        if entry["digest"] != node.digest:
            return AGAIN, _difference(entry, node)
        if why := self.remade(node):
            return AGAIN, why
        if entry["status"] != "done":
            return GO_ON, ""
        what = changed(self.out / node.path, entry["files"])
        return (DONE, "") if what is None else (AGAIN, what)

    def remade(self, node: Node) -> str:
        """Which stages' results are others than those that a stage was made of; empty: none.

        The same configuration and inputs need not make the same bits: on another device, by another release.
        """
        made = self.entries.get(node.path, {}).get("made_of", {})
        now_ = self._made_of(node)
        names = [name for name in now_ if now_[name] is not None and made.get(name) not in (None, now_[name])]
        return ", ".join(f"{name} was made again, and is another" for name in names)

    def _made_of(self, node: Node) -> dict[str, str | None]:
        """{what a stage reads of others: a hash of what these made; None while they are not done}."""
        found: dict[str, str | None] = {}
        for name, given in node.inputs.items():
            if isinstance(given, Node):
                files = self.entries.get(given.path, {}).get("files", {})
                # the times and places of a run are no part of what it made
                about = (RECORD, CONFIG, PICTURE)
                whole = {file: digest for file, digest in files.items() if file not in about}
                found[name] = digest_of(whole) if whole else None
        return found

    def begin(self, node: Node) -> None:
        """Notes that a stage is at work."""
        self.entries[node.path] = {
            "digest": node.digest,
            "config": node.matters,
            "inputs": {name: given.digest for name, given in node.inputs.items()},
            "made_of": self._made_of(node),
            "status": "begun",
            "begun": now(),
        }
        self._write()

    def finish(self, node: Node, seconds: float) -> None:
        """Notes that a stage is done, and what it made."""
        entry = self.entries[node.path]
        before = entry.get("seconds", 0.0)
        entry |= {
            "status": "done",
            "finished": now(),
            "seconds": round(before + seconds, 3),
            "files": listing(self.out / node.path),
            "versions": versions(),
        }
        self._write()

    def spent(self, node: Node, seconds: float) -> None:
        """Adds the time of a stage that was interrupted."""
        entry = self.entries[node.path]
        entry["seconds"] = round(entry.get("seconds", 0.0) + seconds, 3)
        self._write()

    def forget(self, node: Node) -> None:
        """Notes that the files of a stage are being removed."""
        self.entries[node.path] = {"digest": "", "status": "removed", "config": {}, "inputs": {}}
        self._write()

    def _write(self) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, "stages": self.entries}, indent=1)
        write_text(self.path, text + "\n")


def _difference(entry: dict[str, Any], node: Node) -> str:
    """What differs between an entry and what is wanted now."""
    before, now_ = entry["config"], node.matters
    found = [
        f"{key} {_short(before.get(key))} → {_short(now_.get(key))}"
        for key in sorted({*before, *now_})
        if before.get(key) != now_.get(key)
    ]
    found += [
        f"other {name}" for name, given in node.inputs.items() if entry["inputs"].get(name) != given.digest
    ]
    found += [f"no {name}" for name in entry["inputs"] if name not in node.inputs]
    return ", ".join(found) or "another release of minitron-recipe"


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
