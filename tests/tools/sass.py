"""Reads NVIDIA machine code as cuobjdump -sass prints it: which loads wait for each other.

From Volta to Blackwell an instruction has 128 bits, and bits 105 to 125 say how it is scheduled. A load names
one of six scoreboards that is busy until its data is there, and an instruction has a mask of the scoreboards
that must be free before it starts. So loads overlap if no instruction between them waits for one of them.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

_CODE = re.compile(
    r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
_GLOBAL = re.compile(r"(LDG|LD|STG|ST)\.E\b")
_WIDE = re.compile(r"\.(128|256)\b")
_NONE = 7  # the number of no scoreboard


@dataclass(frozen=True)
class Instruction:
    """One of a kernel's instructions.

    Attributes:
        address: in the kernel, in bytes.
        guard: "@P0", "@!UP1", ...; "" where it runs in any case.
        name: with its suffixes: LDG.E.128.CONSTANT.
        operands: the rest of the line.
        sets: the scoreboard that is busy until the result is there, or None.
        waits: the scoreboards that must be free.
    """

    address: int
    guard: str
    name: str
    operands: str
    sets: int | None
    waits: frozenset[int]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.name.split(".")[0] in ("BRA", "JMP") and found else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction does not follow from here."""
        if self.guard not in ("", "@PT"):
            return False
        kind = self.name.split(".")[0]
        if kind == "BRA":  # BRA.U UP0, 0x10 and BRA.DIV ~URZ, 0x10 have a condition among the operands
            return "," not in self.operands
        return kind in ("EXIT", "RET", "JMP", "BRX", "JMX")


def instructions(text: str) -> list[Instruction]:
    """The instructions of one kernel."""
    out = []
    for address, line, high in _CODE.findall(text):
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, _, operands = rest.strip().partition(" ")
        control = int(high, 16) >> 41
        sets = control >> 5 & 7
        waits = {board for board in range(6) if control >> 11 + board & 1}
        if name.startswith("DEPBAR"):  # waits by name
            waits |= {int(board) for board in re.findall(r"\bSB(\d)", operands)}
        out.append(
            Instruction(
                int(address, 16), guard, name, operands, None if sets == _NONE else sets, frozenset(waits)
            )
        )
    return out


def accesses(text: str) -> dict[str, int]:
    """Instructions that load from and store to global memory by 128 bits and by less.

    Keys: loads_128, narrow_loads, stores_128, narrow_stores.
    """
    counts = dict.fromkeys(("loads_128", "narrow_loads", "stores_128", "narrow_stores"), 0)
    for name in (one.name for one in instructions(text)):
        if _GLOBAL.match(name):
            kind = "loads" if name.startswith("LD") else "stores"
            counts[f"{kind}_128" if _WIDE.search(name) else f"narrow_{kind}"] += 1
    return counts


def loads_together(text: str) -> int:
    """How many 128-bit loads of global memory a thread has under way at once, in the worst main loop.

    Every loop's figure is the most on the best way through it: a way that handles a bias or a row's end loads
    no more. Of the loops, and of the code outside of them, those count that hold at least half as many wide
    loads as the one that holds most, and the least of them is the kernel's figure: a second pass cannot hide
    behind the first, and a loop over what is left of a row need not have as many. 0 without wide loads.
    """
    return _Graph(instructions(text)).loads_together()


class _Graph:
    """A kernel's basic blocks, and which loop each is in."""

    def __init__(self, code: list[Instruction]) -> None:
        addresses = {one.address for one in code}
        starts = {one.target for one in code} & addresses
        starts |= {b.address for a, b in itertools.pairwise(code) if a.target is not None or a.ends}
        self.blocks: list[list[Instruction]] = []
        for one in code:
            if not self.blocks or one.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(one)
        at = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.before: list[list[int]] = [[] for _ in self.blocks]
        self.after: list[list[int]] = [[] for _ in self.blocks]
        for i, block in enumerate(self.blocks):
            last = block[-1]
            to = {at[last.target]} if last.target in at else set()
            if not last.ends and i + 1 < len(self.blocks):
                to.add(i + 1)
            for j in to:
                self.after[i].append(j)
                self.before[j].append(i)

    @functools.cached_property
    def order(self) -> list[int]:
        """The blocks, each after those that lead to it, but for the ends of loops."""
        seen: set[int] = set()
        out: list[int] = []
        for root in range(len(self.blocks)):  # code that only a call reaches is a root too
            stack = [(root, iter(self.after[root]))] if root not in seen else []
            seen.add(root)
            while stack:
                block, rest = stack[-1]
                following = next((j for j in rest if j not in seen), None)
                if following is None:
                    out.append(block)
                    stack.pop()
                else:
                    seen.add(following)
                    stack.append((following, iter(self.after[following])))
        return out[::-1]

    @functools.cached_property
    def loops(self) -> dict[int, set[int]]:
        """{first block: blocks} of each loop."""
        rank = {block: i for i, block in enumerate(self.order)}
        everything = (1 << len(self.blocks)) - 1
        dominators = [everything] * len(self.blocks)
        changed = True
        while changed:
            changed = False
            for block in self.order:
                common = everything if self.before[block] else 0
                for other in self.before[block]:
                    common &= dominators[other]
                mine = common | 1 << block
                if all(rank[other] >= rank[block] for other in self.before[block]):
                    mine = 1 << block  # the kernel's first block, or a root
                if mine != dominators[block]:
                    dominators[block], changed = mine, True
        found: dict[int, set[int]] = {}
        for block, following in enumerate(self.after):
            for head in following:
                if dominators[block] >> head & 1:
                    body, left = found.setdefault(head, {head}), [block]
                    while left:
                        other = left.pop()
                        if other not in body:
                            body.add(other)
                            left += self.before[other]
        return found

    def loads_together(self) -> int:
        home = {}  # block: the innermost loop that it is in, None outside of all
        for block in range(len(self.blocks)):
            around = [head for head, body in self.loops.items() if block in body]
            home[block] = min(around, key=lambda head: len(self.loops[head]), default=None)
        rank = {block: i for i, block in enumerate(self.order)}
        under_way: dict[int, dict[int, int]] = {}  # at the end of each block: {scoreboard: wide loads}
        count: dict[int | None, int] = {}
        most: dict[int | None, int] = {}
        for block in self.order:
            earlier = [under_way[other] for other in self.before[block] if rank[other] < rank[block]]
            now = dict(max(earlier, key=lambda state: sum(state.values()), default={}))
            for one in self.blocks[block]:
                for board in one.waits:
                    now.pop(board, None)
                if one.name.startswith("LDG.E") and _WIDE.search(one.name) and one.sets is not None:
                    now[one.sets] = now.get(one.sets, 0) + 1
                    loop = home[block]
                    count[loop] = count.get(loop, 0) + 1
                    most[loop] = max(most.get(loop, 0), sum(now.values()))
            under_way[block] = now
        full = max(count.values(), default=0)
        return min((most[loop] for loop in count if 2 * count[loop] >= full), default=0)
