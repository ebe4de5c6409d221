"""PruningPlan: which channels, heads, experts and layers stay; checked, printed, stored as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_kernels._files import write_text
from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.checks import check_plan
from minitron_kernels.pruning.plan.counts import EXPERTS_PER_TOKEN, count_usage
from minitron_kernels.pruning.plan.find_sizes import Candidate
from minitron_kernels.pruning.plan.layer_plan import (
    LayerPlan,
    fields_of,
    layer_from_dict,
    layer_to_dict,
    runs_of,
    typed,
)
from minitron_kernels.pruning.plan.runtimes import new_notes
from minitron_kernels.pruning.plan.selection import Keep, format_runs
from minitron_kernels.pruning.plan.sizes import size_names

FORMAT = 1


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """What stays of a model, and the config of the smaller one. make_plan() makes plans.

    Args:
        source_config, target_config: as in config.json.
        hidden: kept channels of the residual stream.
        layers: the layers that stay, in their order.
        order: of the kept channels of an axis: "original" or "importance".
        norm_factors: {norm's name in the source: factor of its gain}; {} for none.
        made_with: the target and the options that make_plan() was called with.
        candidates: other sizes for the same parameter budget, best first.

    Raises:
        ValueError: fields contradict each other; names one.
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
        check_plan(
            source_config=self.source_config,
            target_config=self.target_config,
            hidden=self.hidden,
            layers=self.layers,
            order=self.order,
            norm_factors=self.norm_factors,
        )

    def __repr__(self) -> str:
        """One line, since the lists of what is kept are too long for a notebook."""
        sizes = ", ".join(f"{name} {old} -> {new}" for name, old, new in self._sizes() if old != new)
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        kind = type(self).__name__
        return f"<{kind} for {self.source_config['model_type']}: {sizes or 'nothing is cut'}; {counts}>"

    def _sizes(self) -> list[tuple[str, int, int]]:
        """(name in the config, before, after) of each size that can be pruned."""
        family = family_of(self.source_config)
        before, after = family.sizes(self.source_config), family.sizes(self.target_config)
        names = size_names(family, self.source_config)
        text = family.text(self.source_config)
        there = {name: axis for name, axis in names.items() if name in text}
        return [(name, before[axis], after[axis]) for name, axis in there.items()]

    @property
    def parameters_before(self) -> int:
        """The number of parameters of the source; a tied head counts once."""
        return family_of(self.source_config).count_parameters(self.source_config)

    @property
    def parameters_after(self) -> int:
        """The number of parameters of the smaller model; a tied head counts once."""
        return family_of(self.target_config).count_parameters(self.target_config)

    @property
    def dropped_layers(self) -> tuple[int, ...]:
        """The layers of the source that do not stay."""
        kept = {entry.layer for entry in self.layers}
        layers = family_of(self.source_config).sizes(self.source_config)["layers"]
        return tuple(layer for layer in range(layers) if layer not in kept)

    def summary(self) -> str:
        """A table of sizes and parameters before and after, with warnings and notes on what else is done."""
        family = family_of(self.source_config)
        rows = [(name, f"{old:,}", f"{new:,}", f"{new / old:.1%}") for name, old, new in self._sizes()]
        counts = []
        for embeddings in (True, False):
            old = family.count_parameters(self.source_config, embeddings=embeddings)
            new = family.count_parameters(self.target_config, embeddings=embeddings)
            name = "parameters" if embeddings else "without embeddings"
            counts.append((name, f"{old:,}", f"{new:,}", f"{new / old:.1%}"))
        if "experts" in family.sizes(self.source_config) and family.value(
            self.source_config, EXPERTS_PER_TOKEN
        ):
            old, new = (count_usage(c).active_parameters for c in (self.source_config, self.target_config))
            counts.append(("active parameters", f"{old:,}", f"{new:,}", f"{new / old:.1%}"))
        table = [("", "before", "after", "kept"), *rows, *counts]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))]).rstrip()
            for row in table
        ]
        return "\n".join(
            [f"Plan for {self.source_config['model_type']}", *lines, *self._warnings(family), *self._notes()]
        )

    def _warnings(self, family: Family) -> list[str]:
        before, after = family.sizes(self.source_config), family.sizes(self.target_config)
        found = []
        if before == after:
            found.append("nothing is cut")
        widths = [sizes["head_dim"] * sizes["heads"] for sizes in (before, after)]
        if widths[0] == before["hidden"] and widths[1] != after["hidden"]:
            found.append(
                f"warning: {after['heads']} heads of {after['head_dim']} are no longer hidden_size "
                f"{after['hidden']}: runtimes that take head_dim to be hidden_size / num_attention_heads "
                "cannot run it"
            )
        there = size_names(family, self.source_config).values()
        cut = {axis for axis in there if before[axis] != after[axis]}
        said = dict.fromkeys(what for axis, what in family.approximates.items() if axis in cut)
        found += [f"approximate: {what}" for what in said]
        found += [f"runtime: {text}" for text in new_notes(self.source_config, self.target_config)]
        if self.made_with.get("layers_by") == "importance":
            found.append(
                "warning: layers were chosen by importance, a weak guide: compare the model's loss without "
                "other blocks, and give block_losses"
            )
        return found

    def _notes(self) -> list[str]:
        notes = []
        if self.dropped_layers:
            notes.append(f"layers dropped: {format_runs(self.dropped_layers)}")
        heads = [entry.heads for entry in self.layers if entry.heads is not None]
        if any(len(sources) > 1 for each in heads for sources in each.kv):
            notes.append("KV heads are the mean of those they replace")
        if any(each.merged for each in heads):
            notes.append("query heads take over what dropped ones lack: 2 · kept - dropped")
        if self.norm_factors:
            factors = self.norm_factors.values()
            notes.append(f"norms' gains are multiplied by {min(factors):.4g} to {max(factors):.4g}")
        if self.order == "importance":
            notes.append("what is kept is ordered by importance")
        for candidate in self.candidates[:5]:
            sizes = ", ".join(f"{name} {size}" for name, size in candidate.sizes.items())
            counted = f"{candidate.parameters:,} parameters"
            if candidate.active_parameters not in (None, candidate.parameters):
                counted += f" ({candidate.active_parameters:,} active)"
            if candidate.memory_bytes is not None and "memory_bytes" in self.made_with:
                counted += f" in {candidate.memory_bytes / 1e9:.3f} GB"
            notes.append(f"candidate: {counted} with {sizes}")
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
            "layers": [layer_to_dict(entry) for entry in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """The plan that to_dict() wrote.

        Raises:
            ValueError: a field is missing or unknown, or fields contradict each other; names one.
        """
        top = fields_of(
            data,
            "the plan",
            {"format", "parameters", "order", "made_with", "candidates"}
            | {"source_config", "target_config", "norm_factors", "hidden", "layers"},
        )
        if top["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {top['format']!r}")
        for name in ("source_config", "target_config", "norm_factors", "made_with"):
            typed(top[name], dict, name)
        candidates = []
        for index, entry in enumerate(typed(top["candidates"], list, "candidates")):
            where = f"candidates[{index}]"
            optional = {"active_parameters", "memory_bytes"}
            candidates.append(
                Candidate(**fields_of(entry, where, {"sizes", "parameters", "spread"}, optional))
            )
        layers = typed(top["layers"], list, "layers")
        plan = cls(
            source_config=top["source_config"],
            target_config=top["target_config"],
            hidden=runs_of(top["hidden"], "hidden"),
            layers=tuple(layer_from_dict(entry, f"layers[{i}]") for i, entry in enumerate(layers)),
            order=top["order"],
            norm_factors=top["norm_factors"],
            made_with=top["made_with"],
            candidates=tuple(candidates),
        )
        counted = {"before": plan.parameters_before, "after": plan.parameters_after}
        if top["parameters"] != counted:
            raise ValueError(
                f"parameters must be {counted}, as counted from the configs, got {top['parameters']}"
            )
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON. A file that was at `path` stays until the new one is complete."""
        write_text(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads what save() wrote, and checks it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a plan; names the file and the field.
        """
        if not Path(path).exists():
            raise FileNotFoundError(2, "there is no such file; make_plan(...).save() writes it", str(path))
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
