"""ImportanceScores: the result of calibration, and the tables that a plan is made from."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from minitron_kernels.ops.importance.op import head_scores_from_channels
from minitron_kernels.ops.importance.state import ImportanceState, TokenMeanState
from minitron_kernels.pruning.score import score_files

AXES = ("hidden", "mlp", "heads", "layers", "experts", "expert_mlp", "conv", "mamba", "delta")
ENERGY = "energy"  # collected with "hidden"; not one of the axes that a caller names
MLP_TAPS = ("down_proj_input", "up_proj_output")
HEAD_SCORES = ("norm", "channels")
EXPERT_SCORES = ("norm", "reap")

ModuleKey = int | str  # a layer's number, or a norm's name
State = ImportanceState | TokenMeanState


@dataclass(frozen=True)
class Options:
    """How scores were collected; the options of collect_importance()."""

    seq: tuple[str, ...] = ("mean",)
    mlp_tap: str = "down_proj_input"
    head_score: str = "norm"
    expert_score: str = "norm"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mlp_tap", MLP_TAPS),
            ("head_score", HEAD_SCORES),
            ("expert_score", EXPERT_SCORES),
        ):
            if getattr(self, name) not in allowed:
                wanted = " or ".join(repr(value) for value in allowed)
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


@dataclass(repr=False)
class Axis:
    """The state of one axis: an equal part of it for each layer or norm, in order.

    Args:
        state: of all modules together.
        modules: numbers of layers, or names of norms.
        experts: how many each layer has, where the axis has experts.
    """

    state: State
    modules: tuple[ModuleKey, ...]
    experts: int | None = None

    def __repr__(self) -> str:
        """One line, since the names of the modules are too long for a notebook."""
        experts = "" if self.experts is None else f", {self.experts} experts in each"
        return f"<Axis of {len(self.modules)} layers or norms{experts}: {self.state}>"

    def by_module(self, scores: Tensor) -> dict[Any, Tensor]:
        """{layer or norm: its scores}, [items], or [experts, neurons] for the neurons of experts."""
        shape: tuple[int, ...] = (len(self.modules), -1)
        if self.experts and isinstance(self.state, ImportanceState):
            shape = (len(self.modules), self.experts, -1)
        rows = scores.cpu().reshape(shape) if self.modules else ()
        return dict(zip(self.modules, rows, strict=True))


class ImportanceScores:
    """Scores of a model's channels, heads, neurons, experts and layers; made by collect_importance().

    They are kept as sums (ImportanceState, TokenMeanState), so that scores of different calibration data can
    be added, and calibration can go on where it stopped.

    Args:
        config: the model's configuration, as `config.to_dict()` gives it: a dict of JSON types.
        axes: the states, by name: some of AXES, and ENERGY.
        options: how they were collected.
        head_count: attention heads of a layer.

    Raises:
        ValueError: `axes` has another name.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        axes: Mapping[str, Axis],
        *,
        options: Options | None = None,
        head_count: int = 1,
    ) -> None:
        if unknown := set(axes) - {*AXES, ENERGY}:
            raise ValueError(f"axes must be of {', '.join((*AXES, ENERGY))}; got {sorted(unknown)}")
        self.config: dict[str, Any] = json.loads(json.dumps(config, default=str))
        self.axes = dict(axes)
        self.options = options or Options()
        self.head_count = head_count
        self.reduced = False

    def tables(self, batch: str = "L2", seq: str = "mean") -> dict[str, Any]:
        """The scores of each axis that was collected, float64 on the CPU.

            hidden      [hidden]                      the scores of all scored norms, summed
            mlp         {layer: [mlp]}                dense layers
            heads       {layer: [heads]}                  layers with attention
            conv        {layer: [hidden]}                 layers with a short convolution
            mamba       {layer: [heads · channels]}       layers with a state space, channel after channel
            delta       {layer: [value heads]}            layers with a gated delta net
            layers      [layers]                      block importance, 1 − E[cos(input, output)]
            experts     {layer: [experts]}            sparse layers
            expert_mlp  {layer: [experts, neurons]}   over the tokens routed to the expert
            energy      {norm: [hidden]}              Σ over tokens of the square of the norm's input

        Args:
            batch, seq: how sequences and tokens are aggregated, see ImportanceState.scores(). ("L2", "mean")
                is the paper's best. "layers", "experts" and "energy" do not depend on them.

        Raises:
            ValueError: `batch` or `seq` is not an aggregation, or was not collected.

        Source: Minitron (arXiv 2407.14679) section 2.2.
        """
        result: dict[str, Any] = {}
        for name, axis in self.axes.items():
            by_module = axis.by_module(self._scores(name, axis.state, batch, seq))
            if name == "hidden":
                result[name] = torch.stack(list(by_module.values())).sum(0)
            elif name == "layers":
                result[name] = torch.cat(list(by_module.values()))
            else:
                result[name] = by_module
        return result

    def norms(self, batch: str = "L2", seq: str = "mean") -> dict[str, Tensor]:
        """{norm: [hidden]}, whose sum is "hidden" in tables(); empty where "hidden" was not collected."""
        if "hidden" not in self.axes:
            return {}
        axis = self.axes["hidden"]
        return axis.by_module(self._scores("hidden", axis.state, batch, seq))

    def _scores(self, name: str, state: State, batch: str, seq: str) -> Tensor:
        if isinstance(state, TokenMeanState):
            return state.scores()
        if name == ENERGY:
            return state.squares[0].clone()  # of √Σx² per sequence
        scores = state.scores(batch=batch, seq=seq)
        if name == "heads" and self.options.head_score == "channels":
            layers = len(self.axes[name].modules)
            return head_scores_from_channels(scores, layers * self.head_count)
        return scores

    @property
    def tokens(self) -> int:
        """The number of valid calibration tokens."""
        counts = [
            axis.state.counts if isinstance(axis.state, TokenMeanState) else axis.state.tokens
            for name, axis in self.axes.items()
            if axis.experts is None
        ]
        return int(counts[0].flatten()[0]) if counts and counts[0].numel() else 0

    def merge_(self, other: ImportanceScores) -> ImportanceScores:
        """Adds the scores of other calibration data for the same model. Returns itself.

        Raises:
            TypeError, ValueError: `other` is of another model, or was collected with other options; nothing
                changes.
        """
        self.check_alike(other)
        for name, axis in self.axes.items():
            axis.state.merge_(other.axes[name].state)  # type: ignore[arg-type]
        self.reduced |= other.reduced
        return self

    def all_reduce_(self, group: ProcessGroup | None = None) -> ImportanceScores:
        """Adds the scores of data-parallel ranks, each of which saw other sequences. Returns itself.

        The states must be on a device that the group's backend serves: `scores.to("cuda")` for NCCL.

        Raises:
            ValueError: they have been added already; tokens would be counted once for each rank.
        """
        if self.reduced:
            raise ValueError(
                "these scores are already of all ranks; collect new ones, all_reduce_() them, merge_() them"
            )
        for axis in self.axes.values():
            axis.state.all_reduce_(group)
        self.reduced = True
        return self

    def check_alike(self, other: Any, name: str = "other") -> None:
        """Checks that `other` has the same model, axes and options, so that it can be added to this.

        Raises:
            TypeError, ValueError: it has not; says what differs.
        """
        if not isinstance(other, ImportanceScores):
            raise TypeError(f"{name} must be ImportanceScores, got {type(other).__name__}")
        if set(other.axes) != set(self.axes):
            raise ValueError(f"{name} must have the axes {', '.join(self.axes)}; got {', '.join(other.axes)}")
        if other.options != self.options:
            raise ValueError(f"{name} must be collected with {self.options}, got {other.options}")
        for axis, mine in self.axes.items():
            theirs = other.axes[axis]
            if mine.modules != theirs.modules or mine.experts != theirs.experts:
                raise ValueError(f"{name} must be of the same model: its {axis} has other layers or experts")
            for key, tensor in mine.state.state_dict().items():
                shape = tuple(theirs.state.state_dict()[key].shape)
                if shape != tuple(tensor.shape):
                    raise ValueError(
                        f"{name} must be of the same model: {axis}.{key} must be {tuple(tensor.shape)}, got "
                        f"{shape}"
                    )

    def clone(self) -> ImportanceScores:
        """A deep copy."""
        return copy.deepcopy(self)

    def to(self, device: torch.device | str) -> ImportanceScores:
        """Moves the sums. Returns itself."""
        for axis in self.axes.values():
            axis.state.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Writes the scores to a folder: safetensors for the sums, JSON for the rest; no pickle.

        Scores that are already in the folder are replaced in one step, when the new files are complete: a run
        that is killed while it saves leaves either the old scores or the new ones.

        Raises:
            OSError: the folder cannot be made or written.
        """
        about = {
            "options": asdict(self.options),
            "head_count": self.head_count,
            "reduced": self.reduced,
            "axes": {
                name: {
                    "kind": type(axis.state).__name__,
                    "places": list(axis.modules),
                    "experts": axis.experts,
                    "seq": list(axis.state.seq) if isinstance(axis.state, ImportanceState) else None,
                }
                for name, axis in self.axes.items()
            },
            "config": self.config,
        }
        tensors = {
            f"{name}.{key}": value.cpu().contiguous()
            for name, axis in self.axes.items()
            for key, value in axis.state.state_dict().items()
        }
        score_files.write(Path(folder), about, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> ImportanceScores:
        """The scores that save() wrote, on the CPU, bit for bit.

        Raises:
            FileNotFoundError: the folder holds no scores.
            ValueError: a file is damaged or holds something else; names the file and what is wrong.
        """
        path, about, tensors = score_files.read(Path(folder))
        try:
            axes = {name: _axis_of(name, entry, tensors) for name, entry in about["axes"].items()}
            options = about["options"] | {"seq": tuple(about["options"]["seq"])}
            scores = cls(
                about["config"], axes, options=Options(**options), head_count=int(about["head_count"])
            )
            scores.reduced = bool(about["reduced"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise score_files.not_scores(path, error) from None
        return scores

    def __repr__(self) -> str:
        return (
            f"ImportanceScores({self.config.get('model_type')!r}, axes={tuple(self.axes)}, "
            f"tokens={self.tokens}, {self.options})"
        )


def _axis_of(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Axis:
    """An axis from its JSON entry and the file's tensors."""
    stored = {
        key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
    }
    sums = stored["sums"]
    state: State
    if entry["kind"] == "ImportanceState":
        seq: Sequence[str] = tuple(entry["seq"])
        state = ImportanceState(sums.shape[-1], seq=seq, groups=stored["tokens"].numel())
    elif entry["kind"] == "TokenMeanState":
        state = TokenMeanState(sums.shape[0])
    else:
        raise ValueError(f"{name} is of an unknown kind {entry['kind']!r}")
    state.load_state_dict(stored)
    modules = tuple(entry["places"])
    if modules and sums.shape[-1] % len(modules):
        raise ValueError(f"{name} has {sums.shape[-1]} sums for {len(modules)} places")
    return Axis(state, modules, entry["experts"])
