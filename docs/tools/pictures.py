"""Draws the pictures of the documentation: boxes and arrows, as SVG files beside the pages.

`python docs/tools/pictures.py` writes docs/pictures/*.svg; a test says when they are out of date. A box
stands at a column and a row of a grid; an arrow goes from the edge of a box to that of another.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
COLUMN, ROW, MARGIN, LEGEND = 212, 92, 16, 34  # pixels
WIDTH, HEIGHT = 156, 52  # of a box
LETTER = 6.3  # pixels of a letter, on average, at 12 pixels

# kind of a box -> fill, line, and what the legend says
KINDS = {
    "memory": ("#eceff1", "#607d8b", "in memory"),
    "cache": ("#fff8e1", "#ffa000", "in cache only"),
    "kernel": ("#e3f2fd", "#1976d2", "computed"),
    "result": ("#e8f5e9", "#388e3c", "handed out"),
}


class Box(NamedTuple):
    """A box of one to three lines at a place of the grid; halves are allowed."""

    column: float
    row: float
    text: str
    kind: str

    @property
    def centre(self) -> tuple[float, float]:
        """In pixels."""
        return MARGIN + self.column * COLUMN + WIDTH / 2, MARGIN + self.row * ROW + HEIGHT / 2


class Picture(NamedTuple):
    """What a file shows: boxes by name, and arrows (from, to, label)."""

    title: str
    boxes: dict[str, Box]
    arrows: list[tuple[str, str, str]]


def _towards(box: Box, x: float, y: float) -> tuple[float, float]:
    """Where the line from the box's centre to (x, y) leaves the box."""
    cx, cy = box.centre
    dx, dy = x - cx, y - cy
    share = min(
        WIDTH / 2 / abs(dx) if dx else float("inf"),
        HEIGHT / 2 / abs(dy) if dy else float("inf"),
    )
    return cx + dx * share, cy + dy * share


def _box(box: Box) -> list[str]:
    fill, line, _ = KINDS[box.kind]
    x, y = box.centre
    lines = box.text.split("\n")
    if len(lines) > 3 or max(map(len, lines)) * LETTER > WIDTH - 4:
        raise ValueError(f"text does not fit its box: {box.text!r}")
    place = f'x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}"'
    drawn = [f'<rect {place} rx="6" fill="{fill}" stroke="{line}"/>']
    for number, text in enumerate(lines):
        weight = ' font-weight="600"' if number == 0 else ""
        at = y + 4 + 15 * (number - (len(lines) - 1) / 2)
        drawn.append(f'<text x="{x:g}" y="{at:g}"{weight}>{escape(text)}</text>')
    return drawn


def _arrow(start: Box, end: Box, label: str) -> list[str]:
    x1, y1 = _towards(start, *end.centre)
    x2, y2 = _towards(end, *start.centre)
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    drawn = [f'<line {ends} stroke="#455a64" marker-end="url(#arrow)"/>']
    if label:
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        width = len(label) * 5.6 + 6
        place = f'x="{x - width / 2:.1f}" y="{y - 8:.1f}" width="{width:.1f}" height="15"'
        style = 'font-size="11" fill="#455a64"'
        drawn.append(f'<rect {place} fill="#fff"/>')
        drawn.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" {style}>{escape(label)}</text>')
    return drawn


def svg(picture: Picture) -> str:
    """The picture as SVG; the same input gives the same bytes."""
    boxes = picture.boxes.values()
    width = MARGIN * 2 + max(box.column for box in boxes) * COLUMN + WIDTH
    height = MARGIN * 2 + max(box.row for box in boxes) * ROW + HEIGHT + LEGEND
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, sans-serif" font-size="12" '
        'text-anchor="middle">',
        f"<title>{escape(picture.title)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#455a64"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#fff"/>',
    ]
    for start, end, label in picture.arrows:
        drawn += _arrow(picture.boxes[start], picture.boxes[end], label)
    for box in boxes:
        drawn += _box(box)
    x = MARGIN
    for kind in KINDS:
        if any(box.kind == kind for box in boxes):
            fill, line, text = KINDS[kind]
            y = height - MARGIN - 14
            drawn.append(f'<rect x="{x:g}" y="{y:g}" width="14" height="14" fill="{fill}" stroke="{line}"/>')
            drawn.append(f'<text x="{x + 20:g}" y="{y + 11:g}" text-anchor="start">{text}</text>')
            x += 40 + len(text) * LETTER
    return "\n".join([*drawn, "</svg>", ""])


PICTURES = {
    "recipe": Picture(
        "The recipe: score, plan, cut, distil",
        {
            "teacher": Box(0, 0, "teacher\na Hugging Face model", "memory"),
            "text": Box(0, 1, "calibration text\n1024 windows", "memory"),
            "score": Box(1, 0.5, "collect_importance\nforward passes only", "kernel"),
            "plan": Box(2, 0.5, "make_plan\nsizes or a budget", "kernel"),
            "cut": Box(2, 1.5, "prune_model\nprune_checkpoint", "kernel"),
            "distil": Box(3, 0.5, "step\nDistillationTrainer", "kernel"),
            "student": Box(3, 1.5, "student\na stock model", "result"),
        },
        [
            ("teacher", "score", ""),
            ("text", "score", ""),
            ("score", "plan", "scores"),
            ("plan", "cut", ""),
            ("cut", "student", ""),
            ("student", "distil", ""),
        ],
    ),
    "layer_taps": Picture(
        "Where a decoder layer is scored",
        {
            "in": Box(0, 0, "layer's input", "memory"),
            "norm1": Box(1, 0, "norm", "kernel"),
            "attention": Box(2, 0, "attention", "kernel"),
            "o": Box(3, 0, "o_proj", "kernel"),
            "hidden1": Box(1, 1, "hidden channels\nthe norm's output", "result"),
            "heads": Box(2.5, 1, "heads\no_proj's input", "result"),
            "norm2": Box(3, 2, "norm", "kernel"),
            "up": Box(2, 2, "gate_proj, up_proj", "kernel"),
            "down": Box(1, 2, "down_proj", "kernel"),
            "out": Box(0, 2, "layer's output", "memory"),
            "hidden2": Box(3, 3, "hidden channels\nthe norm's output", "result"),
            "mlp": Box(1.5, 3, "MLP neurons\ndown_proj's input", "result"),
            "layers": Box(0, 3, "layer\n1 − cos(in, out)", "result"),
        },
        [
            ("in", "norm1", ""),
            ("norm1", "attention", ""),
            ("attention", "o", ""),
            ("norm1", "hidden1", ""),
            ("attention", "heads", ""),
            ("o", "norm2", "+ input"),
            ("norm2", "up", ""),
            ("up", "down", ""),
            ("down", "out", ""),
            ("norm2", "hidden2", ""),
            ("up", "mlp", ""),
            ("out", "layers", ""),
        ],
    ),
    "linear_kl_loss": Picture(
        "linear_kl_loss: what is in memory and what is not",
        {
            "xs": Box(0, 0, "student_hidden\n[N, H]", "memory"),
            "ws": Box(0, 1, "student_head\n[V, H]", "memory"),
            "xt": Box(0, 2, "teacher_hidden\n[N, Ht]", "memory"),
            "wt": Box(0, 3, "teacher_head\n[V, Ht]", "memory"),
            "zs": Box(1, 0.5, "student logits\na tile, fp32", "cache"),
            "zt": Box(1, 2.5, "teacher logits\na tile, fp32", "cache"),
            "stats": Box(2, 1, "statistics\nmax, Σ exp a token", "kernel"),
            "grad": Box(2, 2, "loss and dz\nof the tile", "cache"),
            "loss": Box(3, 0, "loss, parts\n[N] or a number", "result"),
            "dx": Box(3, 1.5, "gradient to\nstudent_hidden", "result"),
            "dw": Box(3, 2.75, "gradient to\nstudent_head", "result"),
        },
        [
            ("xs", "zs", "GEMM"),
            ("ws", "zs", ""),
            ("xt", "zt", "GEMM"),
            ("wt", "zt", ""),
            ("zs", "stats", ""),
            ("zt", "stats", ""),
            ("stats", "grad", ""),
            ("grad", "loss", ""),
            ("grad", "dx", "GEMM"),
            ("grad", "dw", "GEMM"),
        ],
    ),
    "kl_loss": Picture(
        "kl_loss: two looks at each row of logits",
        {
            "zs": Box(0, 0, "student_logits\n[N, V]", "memory"),
            "zt": Box(0, 1, "teacher_logits\n[N, V]", "memory"),
            "stats": Box(1, 0, "first look\nmax, Σ exp a row", "kernel"),
            "grad": Box(1, 1, "second look\nloss, dz", "kernel"),
            "loss": Box(2, 0, "loss, parts", "result"),
            "dz": Box(2, 1, "gradient to\nstudent_logits", "result"),
        },
        [
            ("zs", "stats", ""),
            ("zt", "stats", ""),
            ("zs", "grad", ""),
            ("zt", "grad", ""),
            ("stats", "grad", ""),
            ("grad", "loss", ""),
            ("grad", "dz", ""),
        ],
    ),
    "linear_sparse_kl_loss": Picture(
        "linear_sparse_kl_loss: k known tokens and a tail",
        {
            "x": Box(0, 0, "student_hidden\n[N, H]", "memory"),
            "w": Box(0, 1, "student_head\n[V, H]", "memory"),
            "t": Box(0, 2, "ids, logprobs\n[N, k], log_tail [N]", "memory"),
            "z": Box(1, 0.5, "student logits\na tile, fp32", "cache"),
            "at": Box(2, 0, "statistics\nΣ exp, k logits, tail", "kernel"),
            "grad": Box(2, 1.5, "loss and dz\nof k + 1 outcomes", "cache"),
            "loss": Box(3, 0.5, "loss, parts", "result"),
            "dx": Box(3, 1.5, "gradient to\nstudent_hidden", "result"),
            "dw": Box(3, 2.5, "gradient to\nstudent_head", "result"),
        },
        [
            ("x", "z", "GEMM"),
            ("w", "z", ""),
            ("z", "at", ""),
            ("t", "grad", ""),
            ("at", "grad", ""),
            ("grad", "loss", ""),
            ("grad", "dx", "GEMM"),
            ("grad", "dw", "GEMM"),
        ],
    ),
    "importance": Picture(
        "accumulate_importance_: one read, small sums",
        {
            "x": Box(0, 0, "activations\n[B, S, C] bf16", "memory"),
            "mask": Box(0, 1, "mask or cu_seqlens\nwhich tokens count", "memory"),
            "moments": Box(1, 0.5, "Σ|x|, Σx², Σx\na sequence, fp32", "cache"),
            "a": Box(2, 0.5, "mean, L2 or var\nof each sequence", "kernel"),
            "state": Box(3, 0.5, "state: Σ a, Σ a²\n[C] float64", "result"),
        },
        [
            ("x", "moments", "read once"),
            ("mask", "moments", ""),
            ("moments", "a", ""),
            ("a", "state", "added"),
        ],
    ),
    "gather": Picture(
        "gather_channels: both axes in one pass",
        {
            "w": Box(0, 0, "weight [R, C]", "memory"),
            "rows": Box(0, 1, "rows [K_r], cols [K_c]\nchecked once", "memory"),
            "run": Box(1, 0.5, "runs of neighbours\n16 bytes at a time", "kernel"),
            "out": Box(2, 0.5, "kept [K_r, K_c]\nwritten once", "result"),
        },
        [("w", "run", "kept bytes"), ("rows", "run", ""), ("run", "out", "")],
    ),
    "cache": Picture(
        "A teacher's cache: found by the tokens of a sequence",
        {
            "teacher": Box(0, 0, "teacher\nruns once", "memory"),
            "tokens": Box(0, 1, "token ids\nof a sequence", "memory"),
            "tier": Box(1, 0, "sampled, top-k + tail\nor hidden states", "kernel"),
            "key": Box(1, 1, "SHA-256\nof the ids", "kernel"),
            "shards": Box(2, 0.5, "shards on disk\nsafetensors", "memory"),
            "signal": Box(3, 0.5, "CachedTeacher\nin any batch, order", "result"),
        },
        [
            ("teacher", "tier", ""),
            ("tokens", "key", ""),
            ("tier", "shards", ""),
            ("key", "shards", ""),
            ("shards", "signal", ""),
        ],
    ),
    "verification": Picture(
        "What is compared with what, without a GPU",
        {
            "oracle": Box(1.5, 0, "oracle\nNumPy, float64", "kernel"),
            "cpu": Box(0, 1, "CPU C++\nevery SIMD level", "kernel"),
            "cuda": Box(1, 1, "CUDA sources\nin a host shim", "kernel"),
            "triton": Box(2, 1, "Triton kernels\nunder ttsem", "kernel"),
            "torch": Box(3, 1, "PyTorch reference\nin each dtype", "kernel"),
            "objects": Box(1, 2, "nvcc: registers,\nspills, wide loads", "kernel"),
            "ptx": Box(2, 2, "Triton's compiler:\nthe same, AMD too", "kernel"),
        },
        [
            ("oracle", "cpu", ""),
            ("oracle", "cuda", ""),
            ("oracle", "triton", ""),
            ("oracle", "torch", ""),
            ("cuda", "objects", ""),
            ("triton", "ptx", ""),
        ],
    ),
}


def main() -> None:
    """Writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(svg(picture), encoding="utf-8")


if __name__ == "__main__":
    main()
