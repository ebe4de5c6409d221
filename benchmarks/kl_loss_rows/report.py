"""Results of kl_loss.py as tables. results/README.md describes the dictionary that they are made from."""

from __future__ import annotations

from typing import Any

from common import tables
from common.machine import describe

LABEL = "forward + backward"


def title(run: dict[str, Any]) -> str:
    where = f"{run['threads']} thread" + ("s" if run["threads"] > 1 else "")
    shape = f"N {run['N']}, H {run['H']}, Ht {run['Ht']}, V {run['V']}"
    return f"{run['shape']}: {shape}, {run['dtype']}, {where if run['device'] == 'cpu' else run['device']}"


def floor_line(run: dict[str, Any]) -> str:
    if "floor" not in run:
        return "No implementation could be timed"
    busy, flops = run["floor"]["busy_s"], run["flops"]
    rate = flops / busy["median"]
    speed = f"{rate / 1e9:.0f} GFLOP/s a core" if run["device"] == "cpu" else f"{rate / 1e12:.0f} TFLOP/s"
    return (
        f"Floor: the four GEMMs alone by torch.mm in {run['dtype']}, {flops / 1e9:.0f} GFLOP in "
        f"{_spread(busy, tables.seconds)} {_busy(run)}, {speed}"
    )


def roofline_line(run: dict[str, Any]) -> str | None:
    """The roofline, which is measured on a GPU only."""
    if "roofline" not in run:
        return None
    best = run["roofline"]
    return (
        f"Roofline, by rates of the same run: {best['flops'] / 1e12:.4g} TFLOP at "
        f"{best['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s (one large torch.mm), {best['bytes'] / 1e9:.3g} GB "
        f"at {best['copy_bytes_per_s'] / 1e12:.2f} TB/s (a copy): {tables.seconds(best['seconds'])} s"
    )


def errors_line(run: dict[str, Any]) -> str | None:
    if not run["errors"]:
        return None
    kinds = ", ".join(f"{kind}: KL {errors['kl']:.2g}" for kind, errors in run["errors"].items())
    sizes = next((f"{errors['N']} rows × {errors['V']} tokens" for errors in run["errors"].values()), "")
    return (
        f"Errors are relative to float64 of the same inputs, {sizes} ({kinds}); dX, dW in the Frobenius norm"
    )


def _busy(run: dict[str, Any]) -> str:
    return "CPU s" if run["device"] == "cpu" else "GPU s"


def _spread(summary: dict[str, float], show: Any) -> str:
    """Median (p20–p80)."""
    if summary["n"] == 1:
        return show(summary["median"])
    return f"{show(summary['median'])} ({show(summary['p20'])}–{show(summary['p80'])})"


def _time_columns(run: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    extra, grads = row["extra_peak_bytes"], row["gradient_bytes"]
    beyond = None if extra is None else max(0, extra - grads)
    share = {}
    if "roofline" in run:  # each row's from the rates that its own process measured
        best = row["roofline"]["seconds"] / row["busy_s"]["median"] if "roofline" in row else None
        share["of roofline"] = "" if best is None else f"{100 * best:.0f} %"
    if run["device"] != "cpu":
        share["TFLOP/s"] = f"{row.get('flops', run['flops']) / row['busy_s']['median'] / 1e12:.0f}"
    return {
        LABEL: row["label"]
        + tables.MARK * bool(row.get("launches_seen"))
        + tables.NOISY * tables.is_noisy(row["ratio"]),
        _busy(run): _spread(row["busy_s"], tables.seconds),
        "÷ floor": _spread(row["ratio"], tables.ratio),
        **share,
        "wall s": tables.seconds(row["wall_s"]["median"]),
        "extra MiB": tables.mebibytes(extra) if row["family"] != "floor" else "",
        "beyond grads": tables.mebibytes(beyond) if row["family"] != "floor" else "",
    }


def _error_columns(run: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for kind in run["errors"]:
        errors = row.get("errors", {}).get(kind, {})
        for name in ("loss", "dX", "dW"):
            cells[f"{kind} {name}"] = tables.error(errors[name]) if name in errors else ""
    return cells


def _table_of(cells: list[dict[str, str]], draw: Any) -> str:
    return draw(list(cells[0]), [list(row.values()) for row in cells]) if cells else ""


def _measured(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in run["rows"] if row["status"] == "ok"]


def _remarks(run: dict[str, Any]) -> list[str]:
    """Below the table: what a mark means, which rows are of another loss."""
    rows = _measured(run)
    marked = [tables.MARKED] if any(row.get("launches_seen") for row in rows) else []
    marked += [tables.VARIED] if any(tables.is_noisy(row["ratio"]) for row in rows) else []
    others = [row["label"] for row in rows if "flops" in row]
    if not others:
        return marked
    apart = "no teacher, three GEMMs, which are also their floor and their flops"
    return [*marked, f"Another loss, for reference ({apart}): {', '.join(others)}"]


def _not_measured(run: dict[str, Any]) -> list[str]:
    return [
        f"{row['label']}: {row['status']}, {row['reason']}" for row in run["rows"] if row["status"] != "ok"
    ]


def _head(run: dict[str, Any]) -> list[str | None]:
    engine = f"Engine of the library's GEMMs: {run['engine']}" if "engine" in run else None
    return [title(run), run.get("about"), floor_line(run), engine, roofline_line(run), errors_line(run)]


def as_text(run: dict[str, Any], width: int = 200) -> str:
    """Text for a terminal of `width` columns; errors get a separate table if one table would be too wide."""
    rows = _measured(run)
    whole = _table_of([_time_columns(run, row) | _error_columns(run, row) for row in rows], tables.aligned)
    if len(whole.split("\n")[0]) <= width:
        drawn = [whole]
    else:
        with_errors = [row for row in rows if row.get("errors")]
        drawn = [
            _table_of([_time_columns(run, row) for row in rows], tables.aligned),
            _table_of(
                [{LABEL: row["label"]} | _error_columns(run, row) for row in with_errors], tables.aligned
            ),
        ]
    head = [*filter(None, _head(run))]
    below = "\n".join([*_remarks(run), *_not_measured(run)])
    return "\n\n".join(filter(None, ["\n".join(head), *drawn, below]))


def as_markdown(result: dict[str, Any]) -> str:
    parts = []
    for run in result["runs"]:
        parts.append("**" + ". ".join(filter(None, _head(run))).replace(". ", ".** ", 1) + ".")
        parts.append(
            _table_of(
                [_time_columns(run, row) | _error_columns(run, row) for row in _measured(run)],
                tables.markdown,
            )
        )
        parts += _remarks(run)
        if _not_measured(run):
            parts.append("Not measured: " + "; ".join(_not_measured(run)) + ".")
    parts.append(f"Measured on {describe(result['machine'])}.")
    return "\n\n".join(filter(None, parts)) + "\n"
