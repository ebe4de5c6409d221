"""LayerPlan: what stays of one layer, and its form in a plan's JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.plan.selection import Keep, KeptHeads, format_runs, parse_runs

# fields that are one list of what is kept
LISTS = ("mlp", "experts", "conv", "mamba_heads", "mamba_dim", "delta_heads", "delta_keys")


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer.

    Args:
        layer: its index in the source.
        heads: kept heads; None in a layer without attention.
        mlp: kept neurons; None in a layer without an MLP, such as most layers with experts.
        experts: kept experts; None in a layer without experts.
        expert_mlp: kept neurons of each kept expert; None in a layer without experts.
        conv: kept channels of a short convolution; None in a layer without one.
        mamba_heads: kept heads of a state space, equally many of each group; None in a layer without one.
        mamba_dim: kept channels of each of these heads; None in a layer without a state space.
        delta_keys: kept key heads of a gated delta net; None in a layer without one.
        delta_heads: its kept value heads, equally many of each key head, in the order of these; None in a
            layer without one.
    """

    layer: int
    heads: KeptHeads | None
    mlp: Keep | None = None
    experts: Keep | None = None
    expert_mlp: tuple[Keep, ...] | None = None
    conv: Keep | None = None
    mamba_heads: Keep | None = None
    mamba_dim: Keep | None = None
    delta_heads: Keep | None = None
    delta_keys: Keep | None = None


def typed(value: Any, kind: type, where: str) -> Any:
    """`value`, checked to be of this type."""
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, got {value!r:.80}")
    return value


def fields_of(data: Any, where: str, names: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """`data`, checked to be a dict with these keys and no others than the optional ones."""
    typed(data, dict, where)
    if missing := names - set(data):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := set(data) - names - optional:
        raise ValueError(f"{where} has an unknown field {', '.join(sorted(unknown))}")
    return data


def runs_of(text: Any, where: str) -> Keep:
    """parse_runs() with `where` in its error message."""
    try:
        return parse_runs(text)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def layer_to_dict(entry: LayerPlan) -> dict[str, Any]:
    """A layer as a plan's JSON file holds it."""
    data: dict[str, Any] = {"layer": entry.layer}
    if entry.heads is not None:
        kv = entry.heads.kv
        single = all(len(sources) == 1 for sources in kv)
        data["heads"] = format_runs(entry.heads.query)
        data["kv_heads"] = format_runs([s[0] for s in kv]) if single else [format_runs(s) for s in kv]
        if entry.heads.merged:
            data["merged_heads"] = [f"{kept},{dropped}" for kept, dropped in entry.heads.merged]
    for name in LISTS:
        if (keep := getattr(entry, name)) is not None:
            data[name] = format_runs(keep)
    if entry.expert_mlp is not None:
        data["expert_mlp"] = [format_runs(keep) for keep in entry.expert_mlp]
    return data


def layer_from_dict(data: Any, where: str) -> LayerPlan:
    """The layer that layer_to_dict() wrote; a ValueError names the wrong field."""
    optional = {"heads", "kv_heads", "merged_heads", "expert_mlp", *LISTS}
    data = fields_of(data, where, {"layer"}, optional)
    expert_mlp = data.get("expert_mlp")
    return LayerPlan(
        layer=typed(data["layer"], int, f"{where}.layer"),
        heads=_heads_from_dict(data, where),
        **{name: runs_of(data[name], f"{where}.{name}") for name in LISTS if name in data},
        expert_mlp=None
        if expert_mlp is None
        else tuple(
            runs_of(text, f"{where}.expert_mlp[{i}]")
            for i, text in enumerate(typed(expert_mlp, list, f"{where}.expert_mlp"))
        ),
    )


def _heads_from_dict(data: dict[str, Any], where: str) -> KeptHeads | None:
    """The heads of a layer; None where none of their fields is there. One of them alone is an error."""
    names = {"heads", "kv_heads", "merged_heads"}
    if not names & set(data):
        return None
    fields_of({name: data[name] for name in names if name in data}, where, names - {"merged_heads"}, names)
    if isinstance(data["kv_heads"], list):
        kv = tuple(runs_of(text, f"{where}.kv_heads[{i}]") for i, text in enumerate(data["kv_heads"]))
    else:
        kv = tuple((head,) for head in runs_of(data["kv_heads"], f"{where}.kv_heads"))
    merged = []
    for i, text in enumerate(typed(data.get("merged_heads", []), list, f"{where}.merged_heads")):
        pair = runs_of(text, f"{where}.merged_heads[{i}]")
        if len(pair) != 2:
            raise ValueError(f'{where}.merged_heads[{i}] must be "kept,dropped", got {text!r}')
        merged.append((pair[0], pair[1]))
    return KeptHeads(runs_of(data["heads"], f"{where}.heads"), kv, tuple(merged))
