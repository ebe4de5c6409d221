"""A pruning plan: which channels, heads, experts and layers stay; readable, checked, stored as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_kernels.pruning.families import PRUNED, family_of
from minitron_kernels.pruning.keep import ORDERS, Keep, KeptHeads, check_keep, format_runs, parse_runs
from minitron_kernels.pruning.sizes import Candidate, size_names

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer.

    Args:
        layer: its index in the source.
        heads: its heads.
        mlp: kept neurons; None in a layer of experts.
        experts: kept experts; None in a dense layer.
        expert_mlp: kept neurons of each kept expert; None in a dense layer.
    """

    layer: int
    heads: KeptHeads
    mlp: Keep | None = None
    experts: Keep | None = None
    expert_mlp: tuple[Keep, ...] | None = None


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model, and the config of what it becomes. make_plan() makes one.

    Args:
        source_config, target_config: as in config.json.
        hidden: kept channels of the residual stream.
        layers: the layers that stay, in their order.
        order: "original" or "importance": of what is kept on an axis.
        norm_factors: by what each norm's gain is multiplied, by the norm's name in the source; {} for none.
        made_with: the target and the options that make_plan() was called with.
        candidates: other sizes for the same parameter budget, best first.

    Raises:
        ValueError: it contradicts itself; names the field.
    """

    source_config: dict[str, Any]
    target_config: dict[str, Any]
    hidden: Keep
    layers: tuple[LayerPlan, ...]
    order: str = "original"
    norm_factors: dict[str, float] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        check_plan(self)

    @property
    def parameters_before(self) -> int:
        """Parameters of the source, a tied head once."""
        return family_of(self.source_config).count_parameters(self.source_config)

    @property
    def parameters_after(self) -> int:
        """Parameters of the smaller model, a tied head once."""
        return family_of(self.target_config).count_parameters(self.target_config)

    def summary(self) -> str:
        """A table of sizes and parameters before and after, and what else the plan does."""
        family = family_of(self.source_config)
        before, after = family.sizes(self.source_config), family.sizes(self.target_config)
        rows = [
            (name, f"{before[axis]:,}", f"{after[axis]:,}", f"{after[axis] / before[axis]:.1%}")
            for name, axis in size_names(family, self.source_config).items()
            if name in self.source_config
        ]
        counts = []
        for embeddings in (True, False):
            old = family.count_parameters(self.source_config, embeddings=embeddings)
            new = family.count_parameters(self.target_config, embeddings=embeddings)
            name = "parameters" if embeddings else "without embeddings"
            counts.append((name, f"{old:,}", f"{new:,}", f"{new / old:.1%}"))
        table = [("", "before", "after", "kept"), *rows, *counts]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))]).rstrip()
            for row in table
        ]
        return "\n".join(
            [f"Plan for {self.source_config['model_type']}", *lines, *self._notes(before["layers"])]
        )

    def _notes(self, layers: int) -> list[str]:
        notes = []
        kept = {entry.layer for entry in self.layers}
        dropped = [layer for layer in range(layers) if layer not in kept]
        if dropped:
            notes.append(f"layers dropped: {format_runs(dropped)}")
        if any(len(sources) > 1 for entry in self.layers for sources in entry.heads.kv):
            notes.append("KV heads are the mean of those they replace")
        if any(entry.heads.merged for entry in self.layers):
            notes.append("query heads take over what dropped ones lack: 2 · kept - dropped")
        if self.norm_factors:
            factors = self.norm_factors.values()
            notes.append(f"norms' gains are multiplied by {min(factors):.4g} to {max(factors):.4g}")
        if self.order == "importance":
            notes.append("what is kept is ordered by importance")
        for candidate in self.candidates[:5]:
            sizes = ", ".join(f"{name} {size}" for name, size in candidate.sizes.items())
            notes.append(f"candidate: {candidate.parameters:,} parameters with {sizes}")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "format": FORMAT,
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "order": self.order,
            "made_with": self.made_with,
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
            "source_config": self.source_config,
            "target_config": self.target_config,
            "norm_factors": self.norm_factors,
            "hidden": format_runs(self.hidden),
            "layers": [_layer_to_dict(entry) for entry in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """The plan that to_dict() wrote.

        Raises:
            ValueError: it lacks a field, has an unknown one, or contradicts itself; names the field.
        """
        top = _fields(
            data,
            "the plan",
            {"format", "parameters", "order", "made_with", "candidates"}
            | {"source_config", "target_config", "norm_factors", "hidden", "layers"},
        )
        if top["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {top['format']!r}")
        for name in ("source_config", "target_config", "norm_factors", "made_with"):
            _typed(top[name], dict, name)
        candidates = []
        for index, entry in enumerate(_typed(top["candidates"], list, "candidates")):
            where = f"candidates[{index}]"
            candidates.append(Candidate(**_fields(entry, where, {"sizes", "parameters", "spread"})))
        layers = _typed(top["layers"], list, "layers")
        plan = cls(
            source_config=top["source_config"],
            target_config=top["target_config"],
            hidden=_runs(top["hidden"], "hidden"),
            layers=tuple(_layer_from_dict(entry, f"layers[{i}]") for i, entry in enumerate(layers)),
            order=top["order"],
            norm_factors=top["norm_factors"],
            made_with=top["made_with"],
            candidates=tuple(candidates),
        )
        counted = {"before": plan.parameters_before, "after": plan.parameters_after}
        if top["parameters"] != counted:
            raise ValueError(
                f"parameters must be {counted}, what the configs count to, got {top['parameters']}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. What was at `path` stays until the new file is complete."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read what save() wrote, and check it.

        Raises:
            ValueError: it is no plan; names the file and the field.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be a {kind.__name__}, got {value!r:.80}")
    return value


def _fields(data: Any, where: str, names: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    _typed(data, dict, where)
    if missing := names - set(data):
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := set(data) - names - optional:
        raise ValueError(f"{where} has an unknown field {', '.join(sorted(unknown))}")
    return data


def _runs(text: Any, where: str) -> Keep:
    try:
        return parse_runs(text)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _layer_to_dict(entry: LayerPlan) -> dict[str, Any]:
    kv = entry.heads.kv
    single = all(len(sources) == 1 for sources in kv)
    data: dict[str, Any] = {
        "layer": entry.layer,
        "heads": format_runs(entry.heads.query),
        "kv_heads": format_runs([s[0] for s in kv]) if single else [format_runs(s) for s in kv],
    }
    if entry.heads.merged:
        data["merged_heads"] = [f"{kept},{dropped}" for kept, dropped in entry.heads.merged]
    if entry.mlp is not None:
        data["mlp"] = format_runs(entry.mlp)
    if entry.experts is not None:
        data["experts"] = format_runs(entry.experts)
    if entry.expert_mlp is not None:
        data["expert_mlp"] = [format_runs(keep) for keep in entry.expert_mlp]
    return data


def _layer_from_dict(data: Any, where: str) -> LayerPlan:
    optional = {"merged_heads", "mlp", "experts", "expert_mlp"}
    data = _fields(data, where, {"layer", "heads", "kv_heads"}, optional)
    if isinstance(data["kv_heads"], list):
        kv = tuple(_runs(text, f"{where}.kv_heads[{i}]") for i, text in enumerate(data["kv_heads"]))
    else:
        kv = tuple((head,) for head in _runs(data["kv_heads"], f"{where}.kv_heads"))
    merged = []
    for i, text in enumerate(_typed(data.get("merged_heads", []), list, f"{where}.merged_heads")):
        pair = _runs(text, f"{where}.merged_heads[{i}]")
        if len(pair) != 2:
            raise ValueError(f'{where}.merged_heads[{i}] must be "kept,dropped", got {text!r}')
        merged.append((pair[0], pair[1]))
    expert_mlp = data.get("expert_mlp")
    return LayerPlan(
        layer=_typed(data["layer"], int, f"{where}.layer"),
        heads=KeptHeads(_runs(data["heads"], f"{where}.heads"), kv, tuple(merged)),
        mlp=_runs(data["mlp"], f"{where}.mlp") if "mlp" in data else None,
        experts=_runs(data["experts"], f"{where}.experts") if "experts" in data else None,
        expert_mlp=None
        if expert_mlp is None
        else tuple(
            _runs(text, f"{where}.expert_mlp[{i}]")
            for i, text in enumerate(_typed(expert_mlp, list, f"{where}.expert_mlp"))
        ),
    )


def _sizes(config: Mapping[str, Any], where: str) -> dict[str, int]:
    try:
        return family_of(config).sizes(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_plan(plan: PruningPlan) -> None:
    """That a plan agrees with itself and with its configs.

    Raises:
        ValueError: it does not; names the field.
    """
    if plan.order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {plan.order!r}")
    before, after = (
        _sizes(config, name)
        for config, name in ((plan.source_config, "source_config"), (plan.target_config, "target_config"))
    )
    family = family_of(plan.source_config)
    if plan.target_config.get("model_type") != plan.source_config.get("model_type"):
        raise ValueError(
            f"target_config.model_type must be {plan.source_config['model_type']!r}, got "
            f"{plan.target_config.get('model_type')!r}"
        )
    for axis in (axis for axis in before if axis not in (*PRUNED, "layers")):
        if before[axis] != after.get(axis):
            raise ValueError(
                f"target_config must have the {axis} of the source, {before[axis]}, got {after.get(axis)}"
            )

    def check(keep: Keep, axis: str, where: str) -> None:
        try:
            check_keep(keep, after[axis], before[axis], plan.order)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error

    check(plan.hidden, "hidden", "hidden")
    kept = tuple(entry.layer for entry in plan.layers)
    try:
        check_keep(kept, after["layers"], before["layers"], "original")
    except ValueError as error:
        raise ValueError(f"layers {error}") from error
    for new, entry in enumerate(plan.layers):
        where = f"layers[{new}]"
        sparse = family.is_sparse(plan.source_config, entry.layer)
        if sparse != family.is_sparse(plan.target_config, new):
            raise ValueError(f"target_config says otherwise than source_config whether {where} has experts")
        for name, there in (("mlp", not sparse), ("experts", sparse), ("expert_mlp", sparse)):
            if (getattr(entry, name) is not None) != there:
                raise ValueError(
                    f"{where}.{name} must {'be there' if there else 'not be there'}: see source_config"
                )
        _check_heads(entry.heads, before, after, plan.order, where)
        if entry.mlp is not None:
            check(entry.mlp, "mlp", f"{where}.mlp")
        if entry.experts is not None and entry.expert_mlp is not None:
            check(entry.experts, "experts", f"{where}.experts")
            if len(entry.expert_mlp) != len(entry.experts):
                raise ValueError(
                    f"{where}.expert_mlp must have {len(entry.experts)} entries, got {len(entry.expert_mlp)}"
                )
            for expert, keep in enumerate(entry.expert_mlp):
                check(keep, "expert_mlp", f"{where}.expert_mlp[{expert}]")
    norms = {f"{family.layers}.{layer}.{norm}" for layer in kept for norm in family.taps.norms} | {
        family.final_norm
    }
    for name, factor in plan.norm_factors.items():
        if name not in norms:
            raise ValueError(f"norm_factors has {name!r}, which is no norm of a kept layer")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"norm_factors[{name}] must be a positive number, got {factor!r}")


def _check_heads(
    heads: KeptHeads, before: Mapping[str, int], after: Mapping[str, int], order: str, where: str
) -> None:
    sources = [head for group in heads.kv for head in group]
    joined = len(heads.kv[0]) if heads.kv else 0
    try:
        if len(heads.kv) != after["kv_heads"]:
            raise ValueError(f"must have {after['kv_heads']} entries, got {len(heads.kv)}")
        if any(len(group) != joined for group in heads.kv):
            raise ValueError("must join as many heads in every entry")
        check_keep(tuple(sources), len(heads.kv) * joined, before["kv_heads"], order)
    except ValueError as error:
        raise ValueError(f"{where}.kv_heads {error}") from error
    try:
        check_keep(heads.query, after["heads"], before["heads"], "importance")
        group, kept = before["heads"] // before["kv_heads"], after["heads"] // after["kv_heads"]
        for new, group_sources in enumerate(heads.kv):
            mine = heads.query[new * kept : (new + 1) * kept]
            for head in mine:
                if head // group not in group_sources:
                    raise ValueError(
                        f"must have {kept} heads of KV group {format_runs(group_sources)} from place "
                        f"{new * kept} on, got {head}"
                    )
            check_keep(mine, kept, before["heads"], order)
        pairs = [head for pair in heads.merged for head in pair]
        groups = {source: new for new, group_sources in enumerate(heads.kv) for source in group_sources}
        for stays, goes in heads.merged:
            if stays not in heads.query or goes in heads.query or not 0 <= goes < before["heads"]:
                raise ValueError(f"cannot merge {goes} into {stays}: the first must go, the second stay")
            if groups.get(stays // group) != groups.get(goes // group):
                raise ValueError(f"cannot merge {goes} into {stays}: they have other keys")
        if len(set(pairs)) != len(pairs):
            raise ValueError("cannot merge a head twice")
    except ValueError as error:
        raise ValueError(f"{where}.heads {error}") from error
