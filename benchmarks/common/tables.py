"""Draws tables, for a terminal or in Markdown. Cells are strings; the first column is left-aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MIB = 2**20
MARK = " *"  # at the label of a row whose time on the GPU includes gaps
NOISY = " ‡"  # at the label of a row whose ratio varied too much to mean something
FAULT = " †"  # at a ratio, or the label of a row, that is below its floor
FAULTY = "† faster than its floor: a fault of the floor, which was not the fastest way to move these bytes"
VARIED = (
    "‡ a fifth of its ratios is more than twice another fifth: the machine was busy, or the run too short"
)
MARKED = "* the call waits for the GPU, or its launches take longer than its work: they are in its GPU time"


def is_noisy(summary: Mapping[str, float]) -> bool:
    """Whether a summary of measurements varied too much for its median to mean something."""
    return summary["p80"] > 2 * summary["p20"]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: float) -> str:
    return f"{value:.2f}"


def mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / MIB:.0f}"


def error(value: float | None) -> str:
    """An error of at least a thousandth in percent, a smaller one as a power of ten."""
    if value is None:
        return "–"
    if value >= 1e-3:
        return f"{value * 100:.2g} %" if value < 1 else f"{value * 100:.0f} %"
    return f"{value:.0e}"
