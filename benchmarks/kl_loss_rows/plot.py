"""Draws time against error, with memory as the size of a dot, in one panel for each table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from kl_loss_rows.report import title

MIB = 2**20
LEGEND_INCHES = 0.85
INK, FAINT = "#26323c", "#c9d1d6"
COLOURS = {
    "minitron": "#d1495b",
    "PyTorch": "#4f6d7a",
    "torch.compile": "#8f6bb1",
    "Liger": "#2a9d8f",
    "torchtune": "#e09f3e",
    "TRL": "#3d7dca",
    "quack": "#8c8c3a",
}
SHORT = {
    "naive": "naive",
    "naive-float": "naive, .float()",
    "compile": "torch.compile",
    "liger": "Liger",
    "liger-compiled": "Liger, compiled",
    "torchtune": "torchtune",
    "trl": "TRL chunked",
    "trl-gkd": "TRL GKD",
    "store": "minitron store",
    "recompute": "minitron recompute",
    "liger-jsd": "Liger FusedLinearJSD",
    "liger-jsd-cute": "Liger FusedLinearJSD, CuTe",
    "liger-ce": "Liger cross-entropy",
    "quack-ce": "quack cross-entropy",
    "torch-ce": "F.linear_cross_entropy",
    "liger-kl": "Liger FusedLinearKLDiv",
    "native-store": "minitron CUDA C++ store",
    "native-recompute": "minitron CUDA C++ recompute",
    "triton-store": "minitron Triton store",
    "triton-recompute": "minitron Triton recompute",
    **{
        f"{prefix}{key}": f"minitron {name}{what}"
        for prefix, name in (("", ""), ("native-", "CUDA C++ "), ("triton-", "Triton "))
        for key, what in (("record", "KL + CE, record"), ("sparse", "sparse teacher"), ("ce", "CE alone"))
    },
}
POINTS_PER_ROOT_MIB = 0.62  # radius of a dot per √MiB: its area is proportional to the memory


def _radius(row: dict[str, Any]) -> float:
    """The radius of a dot in points; small where memory is unknown."""
    return max(3.0, POINTS_PER_ROOT_MIB * math.sqrt((row["extra_peak_bytes"] or 0) / MIB))


def _points(run: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """(the kind of input shown, if possible "close"; the rows that have all three figures)."""
    kind = next((kind for kind in ("close", "real", "far") if kind in run["errors"]), "far")
    points = []
    for row in run["rows"]:
        if row["status"] == "ok" and row["key"] in SHORT and row["errors"].get(kind):
            point = {"x": row["ratio"]["median"], "y": row["errors"][kind]["dW"], "radius": _radius(row)}
            points.append(row | point)
    return kind, points


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The common area of two boxes (x0, y0, x1, y1), as a share of the smaller one."""
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return common / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _label(axes: Axes, rows: list[dict[str, Any]], size: float = 8.0) -> None:
    """Writes each name beside its dot, where it covers the least. The layout must be final."""
    renderer = axes.figure.canvas.get_renderer()
    point = axes.figure.dpi / 72
    frame = tuple(axes.get_window_extent().extents)
    centres = [tuple(axes.transData.transform((row["x"], row["y"]))) for row in rows]
    line = axes.transData.transform((1.0, 1.0))[0]  # the floor
    taken = [(line - 2 * point, frame[1], line + 2 * point, frame[3])]
    for (x, y), row in zip(centres, rows, strict=True):
        r = row["radius"] * point
        taken.append((x - r, y - r, x + r, y + r))
    for (x, y), row in sorted(zip(centres, rows, strict=True), key=lambda item: -item[0][1]):
        bold = "bold" if row["family"] == "minitron" else "normal"
        font = FontProperties(size=size, weight=bold)
        width, height, _ = renderer.get_text_width_height_descent(SHORT[row["key"]], font, False)
        width, height = width + 9 * point, height + 3 * point
        choices = []
        for reach in range(0, 90, 5):
            away = (row["radius"] + reach) * point
            for turn in range(16):
                angle = math.pi * turn / 8
                cx = x + math.cos(angle) * (away + width / 2)
                cy = y + math.sin(angle) * (away + height / 2)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                cost = sum(_overlap(box, other) for other in taken) + 4 * (1 - _overlap(box, frame))
                cost += 0.01 * reach
                choices.append((cost, reach, turn, box, (cx, cy)))
        _, reach, _, box, centre = min(choices)
        taken.append(box)
        axes.annotate(
            SHORT[row["key"]],
            (row["x"], row["y"]),
            xytext=axes.transData.inverted().transform(centre),
            ha="center",
            va="center",
            fontproperties=font,
            color=COLOURS[row["family"]],
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.8, "shrinkA": 1} if reach > 5 else None,
            zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def _percent(value: float, _position: int | None = None) -> str:
    return f"{value * 100:g} %" if value >= 1e-4 else f"$10^{{{round(math.log10(value))}}}$"


def _panel(axes: Axes, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Draws everything but the names of points; returns the points."""
    kind, rows = _points(run)
    axes.set_title(title(run).replace(": ", "\n", 1), fontsize=9, color=INK, loc="left")
    if not rows:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color=INK)
        return rows
    axes.set_xscale("log")
    axes.set_yscale("log")
    xs, ys = [row["x"] for row in rows], [row["y"] for row in rows]
    axes.set_xlim(min(0.75, min(xs) * 0.75), max(2.0, max(xs) * 1.35))
    axes.set_ylim(min(ys) / 3.5, max(ys) * 4)
    axes.axvline(1.0, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
    for row in run["rows"]:
        if row["key"] == "floor-fp32" and row["status"] == "ok":  # faster than bf16 on some CPUs
            at = row["ratio"]["median"]
            axes.axvline(at, color=INK, lw=0.8, ls=":", zorder=1)
            axes.set_xlim(left=min(axes.get_xlim()[0], at * 0.85))
            transform = axes.get_xaxis_transform()
            axes.text(
                at, 0.5, " in fp32", transform=transform, fontsize=7, color=INK, rotation=90, ha="right"
            )
    for row in sorted(rows, key=lambda row: -row["radius"]):
        colour = COLOURS[row["family"]]
        axes.plot(
            row["x"], row["y"], "o", ms=2 * row["radius"], mfc=colour, mec="white", alpha=0.45, zorder=2
        )
        axes.plot(row["x"], row["y"], "o", ms=3, mfc=colour, mec="none", zorder=3)
    axes.xaxis.set_major_locator(plt.FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=FAINT, lw=0.5, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    busy = "CPU time" if run["device"] == "cpu" else "GPU time"
    axes.set_xlabel(f"{busy} ÷ bare GEMMs in {run['dtype']} (dashed)", fontsize=8, color=INK)
    about = (
        f"inputs {kind}"
        if kind == "real"
        else f"student {kind} to teacher"
        if kind == "close"
        else "random inputs"
    )
    axes.set_ylabel(f"error of dW, {about}, KL {run['errors'][kind]['kl']:.2g}", fontsize=8, color=INK)
    return rows


def _legend(figure: Any) -> None:
    """Draws the legend, dots of known memory, on a strip below the panels."""
    strip = figure.add_axes((0, 0, 1, 1), zorder=-1)
    strip.set_axis_off()
    width, height = figure.get_size_inches()
    strip.set_xlim(0, width * 72)
    strip.set_ylim(0, height * 72)
    x, y = 24.0, 30.0
    for size in (64, 256, 1024):
        radius = POINTS_PER_ROOT_MIB * math.sqrt(size)
        x += radius
        strip.plot(x, y, "o", ms=2 * radius, mfc=FAINT, mec="none")
        strip.text(x + radius + 3, y, f"{size} MiB", fontsize=8, color=INK, va="center")
        x += radius + 52
    strip.text(
        x,
        y,
        "extra peak memory, gradients included\nleft, low and small is better",
        fontsize=8,
        color=INK,
        va="center",
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of all tables of `result`, three in a line."""
    runs = result["runs"]
    columns = min(3, max(1, len(runs)))
    lines = max(1, math.ceil(len(runs) / columns))
    width, height = 4.6 * columns, 3.9 * lines + LEGEND_INCHES
    figure, grid = plt.subplots(lines, columns, figsize=(width, height), dpi=150, squeeze=False)
    below = LEGEND_INCHES / height
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))
    panels = list(zip(grid.flat, runs, strict=False))
    points = [_panel(axes, run) for axes, run in panels]
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # freezes the layout, which the positions of the names depend on
    for (axes, _), rows in zip(panels, points, strict=True):
        _label(axes, rows)
    _legend(figure)
    figure.savefig(path)
    plt.close(figure)
