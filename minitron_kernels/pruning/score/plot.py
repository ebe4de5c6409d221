"""plot_importance(): a picture for each axis, which shows how much can be cut, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.pruning.score.scores import AXES, ImportanceScores

INK, FAINT, LINE, WARM = "#26323c", "#d5dce0", "#2a6f97", "#d1495b"
TITLES = {
    "hidden": ("Residual channels", "channel"),
    "mlp": ("MLP neurons", "neuron"),
    "heads": ("Attention heads", "head"),
    "layers": ("Layers", "layer"),
    "experts": ("Experts", "expert"),
    "expert_mlp": ("Neurons of experts", "neuron"),
    "conv": ("Channels of short convolutions", "channel"),
    "mamba": ("Channels of state spaces, head after head", "channel"),
    "delta": ("Value heads of gated delta nets", "head"),
}
MOST_LINES = 400  # curves in one frame
MOST_SAMPLES = 1_000_000  # scores from which the colour scale is computed


def plot_importance(
    scores: ImportanceScores, path: str | Path, *, batch: str = "L2", seq: str = "mean"
) -> list[Path]:
    """Draws one PNG for each axis that was scored.

    Channels and neurons: sorted scores, a line for each layer, with the share of the total that the best ones
    hold; and a heatmap of the sorted scores by layer, relative to the layer's mean. Heads and experts: a
    heatmap in the model's order. Layers: bars of block importance.

    Args:
        scores: of collect_importance().
        path: "scores.png" gives scores_hidden.png, scores_mlp.png, ...; a folder that exists, hidden.png, ...
        batch, seq: see ImportanceScores.tables().

    Returns:
        The files written.

    Raises:
        TypeError: scores are not ImportanceScores.
        ValueError: `batch` or `seq` is not an aggregation, or was not collected.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(scores, ImportanceScores):
        raise TypeError(f"scores must be ImportanceScores, got {type(scores).__name__}")
    tables = scores.tables(batch, seq)
    path = Path(path)
    about = f"{scores.config.get('model_type', 'model')}, {scores.tokens:,} tokens"
    how = f"({batch}, {seq})"
    written = []
    for axis in (name for name in AXES if name in tables):
        file = path / f"{axis}.png" if path.is_dir() else path.with_name(f"{path.stem}_{axis}.png")
        figure = _figure(axis, scores, tables[axis], about, how, batch, seq)
        figure.savefig(file, dpi=150)
        written.append(file)
    return written


def _figure(
    axis: str, scores: ImportanceScores, table: Any, about: str, how: str, batch: str, seq: str
) -> Any:
    # a Figure without pyplot leaves the caller's global state alone, and opens no window
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = axis not in ("layers", "heads", "experts", "delta")
    figure = Figure(figsize=(10, 4.2) if wide else (6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    name, item = TITLES[axis]
    how = {"layers": "block importance", "experts": f"mean {scores.options.expert_score}"}.get(axis, how)
    figure.suptitle(f"{name}, {how}  ·  {about}", fontsize=11, color=INK, x=0.01, ha="left")
    if axis == "layers":
        _bars(figure.subplots(), table)
    elif axis in ("heads", "experts", "delta"):
        _heatmap(figure, figure.subplots(), _matrix(table), list(table), item, sort=False)
    else:
        left, right = figure.subplots(1, 2)
        if axis == "hidden":
            by_norm = scores.norms(batch, seq)
            _curves(left, table[None], item, {"all norms": 0})
            short = [".".join(name.split(".")[-2:]) for name in by_norm]  # layer and norm
            _heatmap(figure, right, _matrix(by_norm), short, item, sort=False, order=table)
            right.set_ylabel("norm, from first to last", fontsize=9, color=INK)
        else:
            rows, row_names = _matrix(table), list(table)
            if axis == "expert_mlp":
                experts = next(iter(table.values())).shape[0]
                row_names = [f"{layer}.{expert}" for layer in row_names for expert in range(experts)]
            kind = "expert" if axis == "expert_mlp" else "layer"
            labels = {f"{kind} {row_names[i]}": i for i in _few(rows)}
            _curves(left, rows, item, labels)
            _heatmap(figure, right, rows, row_names, item, sort=True)
            if axis == "expert_mlp":
                right.set_ylabel("layer.expert", fontsize=9, color=INK)
    return figure


def _matrix(table: dict[Any, Tensor]) -> Tensor:
    """[layers or norms, items]; for the neurons of experts, a row for each expert of each layer."""
    rows = torch.stack(list(table.values()))
    return rows.reshape(-1, rows.shape[-1])


def _few(rows: Tensor) -> list[int]:
    """The first, middle and last row, for the legend."""
    return sorted({0, rows.shape[0] // 2, rows.shape[0] - 1})


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=8, colors=INK)


def _log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _curves(axes: Any, rows: Tensor, item: str, labels: dict[str, int]) -> None:
    """Sorted scores of each row, and the share of the total that the best hold."""
    from matplotlib import colormaps

    ordered = rows.sort(dim=1, descending=True).values.clamp(min=0)
    count = ordered.shape[1]
    at = torch.arange(1, count + 1, device=rows.device) / count * 100
    named = {i: label for label, i in labels.items()}
    shown = torch.linspace(0, len(ordered) - 1, min(len(ordered), MOST_LINES)).long().tolist()
    for i in dict.fromkeys([*shown, *named]):
        shade = 0.15 + 0.7 * i / max(len(ordered) - 1, 1)
        colour = LINE if len(ordered) == 1 else colormaps["viridis"](shade)
        strong = i in named
        axes.plot(
            at.numpy(),
            ordered[i].numpy(),
            color=colour,
            lw=1.6 if strong else 0.7,
            alpha=1 if strong else 0.45,
        )
        if strong:
            axes.plot([], [], color=colour, lw=1.6, label=named[i])
    positive = ordered[ordered > 0]
    if len(positive) and float(positive.max() / positive.min()) > 10:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{item}s, best first, % of {count}", fontsize=9, color=INK)
    axes.set_ylabel("importance", fontsize=9, color=INK)
    axes.grid(color=FAINT, lw=0.5, alpha=0.7)
    _tidy(axes)
    shares = (ordered.cumsum(1) / ordered.sum(1, keepdim=True).clamp(min=1e-300)).mean(0) * 100
    twin = axes.twinx()
    twin.plot(at.numpy(), shares.numpy(), color=WARM, lw=1.2, ls=(0, (4, 2)))
    axes.plot([], [], color=WARM, lw=1.2, ls=(0, (4, 2)), label="share of the total (right)")
    twin.set_ylim(0, 103)
    twin.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    twin.tick_params(labelsize=8, colors=WARM)
    for side in twin.spines.values():
        side.set_visible(False)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="center right")


def _heatmap(
    figure: Any,
    axes: Any,
    rows: Tensor,
    row_names: list[Any],
    item: str,
    *,
    sort: bool,
    order: Tensor | None = None,
) -> None:
    """Each row relative to its mean; sorted, or in the order of other scores."""
    from matplotlib.colors import LogNorm, Normalize

    if sort:
        rows = rows.sort(dim=1, descending=True).values
    elif order is not None:
        rows = rows[:, order.argsort(descending=True)]
    relative = (rows / rows.mean(1, keepdim=True).clamp(min=1e-300)).clamp(min=0)
    sample = relative.flatten()[:: max(relative.numel() // MOST_SAMPLES, 1)].sort().values
    dark, bright = (float(sample[int(share * (len(sample) - 1))]) for share in (0.01, 0.99))
    log = dark > 0 and bright / dark > 4
    norm = LogNorm(dark, bright) if log else Normalize(dark, max(bright, dark + 1e-9))
    image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", interpolation="nearest", norm=norm)
    best_first = ", best first" if sort or order is not None else ""
    axes.set_xlabel(f"{item}{best_first}", fontsize=9, color=INK)
    axes.set_ylabel("layer", fontsize=9, color=INK)
    step = max(1, -(-len(row_names) // 12))
    axes.set_yticks(range(0, len(row_names), step), [str(name) for name in row_names[::step]])
    _tidy(axes)
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="both")
    if log:
        _log_ticks(bar.ax.yaxis)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label("times the row's mean", fontsize=8, color=INK)


def _bars(axes: Any, values: Tensor) -> None:
    least = set(values.argsort()[: max(1, len(values) // 4)].tolist())
    colours = [WARM if i in least else LINE for i in range(len(values))]
    axes.bar(range(len(values)), values.numpy(), color=colours, width=0.8)
    axes.set_xlabel("layer (red: the quarter that changes its input least)", fontsize=9, color=INK)
    axes.set_ylabel("1 − E[cos(input, output)]", fontsize=9, color=INK)
    axes.grid(axis="y", color=FAINT, lw=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.7, len(values) - 0.3)
    _tidy(axes)
