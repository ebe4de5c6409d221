"""Tables of text for the results of searches."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines with columns of equal width; the last `left` columns are aligned to the left, others right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    first_left = len(head) - left
    return [
        "  ".join(
            cell.ljust(width) if column >= first_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def score_text(score: float | None) -> str:
    """A score as tables show it."""
    return "failed" if score is None else f"{score:.6g}"
