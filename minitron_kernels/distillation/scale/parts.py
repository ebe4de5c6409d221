"""What a plan is made of: parts of a rank's memory, and collectives with what a rank sends in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# moments of a micro-step; a plan's memory is that of the one that needs most
TEACHER, LOSS, BACKWARD, END = "teacher", "loss", "backward", "end"
MOMENTS = {
    TEACHER: "the teacher's forward",
    LOSS: "the loss",
    BACKWARD: "the backward of a layer",
    END: "the gradients of embedding and head",
}
ALWAYS = tuple(MOMENTS)


@dataclass(frozen=True)
class Part:
    """Bytes of a rank's memory, and the moments of a micro-step when they are needed."""

    name: str
    nbytes: int
    when: tuple[str, ...] = ALWAYS


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a training step.

    Args:
        name: what they are for.
        kind: "all-gather", "reduce-scatter" or "all-reduce".
        group: "tp" or "fsdp".
        ranks: of the group.
        count: of them in a step.
        nbytes: that a rank brings to all of them: its shard of an all-gather, the whole input of the others.
    """

    name: str
    kind: str
    group: str
    ranks: int
    count: int
    nbytes: int

    @property
    def sent_bytes(self) -> int:
        """What a rank sends in a step if they are rings: with R ranks and B = nbytes

        all-gather (R - 1) B, reduce-scatter (R - 1) / R B, all-reduce 2 (R - 1) / R B.
        """
        others = self.ranks - 1
        if self.kind == "all-gather":
            return others * self.nbytes
        return (2 if self.kind == "all-reduce" else 1) * others * self.nbytes // self.ranks


@dataclass(frozen=True)
class Way:
    """One way to distil: a rank's memory, and what it sends in a step."""

    name: str
    parts: tuple[Part, ...]
    collectives: tuple[Collective, ...]

    def bytes_at(self, moment: str) -> int:
        """Memory of a rank at one of MOMENTS."""
        return sum(part.nbytes for part in self.parts if moment in part.when)

    @property
    def peak_moment(self) -> str:
        """The one of MOMENTS that needs most memory."""
        return max(MOMENTS, key=self.bytes_at)

    @property
    def peak_bytes(self) -> int:
        """Memory of a rank: that of the moment that needs most."""
        return self.bytes_at(self.peak_moment)

    @property
    def sent_bytes(self) -> int:
        """What a rank sends in a step, by rings."""
        return sum(one.sent_bytes for one in self.collectives)

    def part(self, name: str) -> int:
        """Bytes of a part; 0 where it is not there."""
        return sum(part.nbytes for part in self.parts if part.name == name)

    def collective(self, name: str) -> Collective:
        """The collectives of this name.

        Raises:
            KeyError: there are none.
        """
        found: dict[str, Any] = {one.name: one for one in self.collectives}
        return found[name]


def size_text(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"
