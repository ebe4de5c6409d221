"""The stages of a recipe and its variants, each once: what each reads, and a digest of all it depends on.

Variants share stages that depend on the same: a comparison of losses shares scores, plan and pruned model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_kernels._command.models import check_model
from minitron_kernels._files import sha256_of_folder
from minitron_kernels.distillation.recipe.config import Recipe, Variant
from minitron_kernels.distillation.recipe.files import digest_of, digest_of_files, digest_of_model
from minitron_kernels.distillation.recipe.tables import options_of

# to be raised where a stage gives something else for the same configuration and inputs
VERSIONS = {"correct": 1, "score": 1, "plan": 1, "prune": 1, "distill": 2, "evaluate": 1}
TRAINED = ("correct", "distill")  # stages whose results take long
_NOT_IN_RESULTS = ("enabled", "data", "eval_data", "about", "models")
_FOR_LOSS = ("samples", "seq_len", "batch_size", "dtype", "device")  # of plan, for layers_by = "loss"


@dataclass(frozen=True)
class Given:
    """Something that no stage makes: the teacher, files of text.

    Args:
        paths: of it.
        digest: of what is there; of the paths, where something is not there.
        lacking: paths that are not there, which only --dry-run allows.
    """

    paths: tuple[Path, ...]
    digest: str
    lacking: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Node:
    """A stage with its configuration.

    Args:
        stage: its name.
        path: of its results, below the recipe's folder.
        config: of the stage, complete.
        matters: what of it the results depend on, as JSON types.
        inputs: {what it reads: a stage's results, or what is given}.
        variant: that it was first made for.
    """

    stage: str
    path: str
    config: Mapping[str, Any]
    matters: dict[str, Any]
    inputs: dict[str, Node | Given]
    variant: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash of all that the results depend on."""
        inputs = {name: given.digest for name, given in self.inputs.items()}
        return digest_of([self.stage, VERSIONS[self.stage], self.matters, inputs])


@dataclass
class Line:
    """The stages of one variant, by what they make.

    Args:
        variant: of the recipe.
        models: {teacher, corrected, pruned, distilled: where it comes from}.
        plans: of all rounds.
        evaluations: {model: its evaluation}.
    """

    variant: Variant
    models: dict[str, Node | Given] = field(default_factory=dict)
    plans: list[Node] = field(default_factory=list)
    evaluations: dict[str, Node] = field(default_factory=dict)


@dataclass
class Graph:
    """All stages, in the order in which they run, and those of each variant."""

    nodes: list[Node]
    lines: list[Line]
    teacher: Given


def graph_of(recipe: Recipe, *, dry: bool = False) -> Graph:
    """The stages of a recipe.

    Args:
        recipe: as loaded.
        dry: whether models and text may be lacking.

    Raises:
        FileNotFoundError, ValueError: a model or a text is not there.
    """
    maker = _Maker(recipe, dry)
    lines = [maker.line(variant) for variant in recipe.variants]
    return Graph(list(maker.nodes.values()), lines, maker.teacher)


class _Maker:
    def __init__(self, recipe: Recipe, dry: bool) -> None:
        self.dry = dry
        self.nodes: dict[str, Node] = {}  # by digest
        self.texts: dict[tuple[tuple[str, ...], bool], Given] = {}  # by files, and whether names count
        folder = Path(recipe.base["recipe"]["teacher"])
        if (folder / "config.json").is_file() or not dry:
            check_model(folder)
            self.teacher = Given((folder,), digest_of_model(folder))
        else:
            self.teacher = Given((folder,), digest_of(str(folder)), (folder,))

    def line(self, variant: Variant) -> Line:
        """The stages of a variant; those that are there already are shared."""
        line, teacher = Line(variant, {"teacher": self.teacher}), self.teacher
        source: Node | Given = teacher
        if variant["correct"]["enabled"]:
            source = self._node(
                variant, "correct", "correct", {"model": teacher, **self._text(variant, "correct")}
            )
            line.models["corrected"] = source
        rounds, model = variant["plan"]["rounds"], source
        for number in range(1, rounds + 1):
            end = f"-{number}" if rounds > 1 else ""
            inputs = {"model": model, **self._text(variant, "score")}
            scores = self._node(variant, "score", f"score{end}", inputs)
            more = {}
            if rounds > 1:
                more = {"round": number, "seed": seed_of_round(variant["plan"]["seed"], number)}
            inputs = {"scores": scores, "model": model}
            if rounds > 1:
                inputs["first"] = source
            if variant["plan"]["layers_by"] == "loss":
                inputs |= self._text(variant, "plan")
            plan = self._node(variant, "plan", f"plan{end}", inputs, more)
            line.plans.append(plan)
            model = self._node(variant, "prune", f"prune{end}", {"model": model, "plan": plan})
        line.models["pruned"] = model
        if variant["distill"]["enabled"]:
            inputs = {"student": model, "teacher": source, **self._text(variant, "distill")}
            if not needs_teacher(variant["distill"]):
                del inputs["teacher"]
            line.models["distilled"] = self._node(variant, "distill", "distill", inputs)
        self._evaluate(line)
        return line

    def _evaluate(self, line: Line) -> None:
        config = line.variant["evaluate"]
        if not config["enabled"]:
            return
        for name in config["models"]:
            if name in line.models:
                inputs = {"model": line.models[name]}
                more = {"lm_eval": version_of_harness()} if config["tasks"] else None
                if config["data"]:
                    inputs |= self._text(line.variant, "evaluate", named=True)
                if config["tasks_path"] and config["tasks"]:
                    inputs["tasks"] = self._folder("tasks_path", config["tasks_path"])
                if config["datasets"] and config["tasks"]:
                    inputs["datasets"] = self._folder("datasets", config["datasets"])
                path = f"evaluate/{name}"
                line.evaluations[name] = self._node(line.variant, "evaluate", path, inputs, more)

    def _node(
        self,
        variant: Variant,
        stage: str,
        path: str,
        inputs: dict[str, Node | Given],
        more: dict[str, Any] | None = None,
    ) -> Node:
        config = {**variant[stage], **(more or {})}
        if stage in TRAINED:
            config["processes"] = variant["recipe"]["processes"]
        path = f"compare/{variant.name}/{path}" if variant.name else path
        node = Node(stage, path, config, _what_matters(stage, config), inputs, variant.name)
        return self.nodes.setdefault(node.digest, node)

    def _folder(self, key: str, folder: str) -> Given:
        path = Path(folder)
        if path.is_dir():  # in hidden folders downloads keep what is their own
            return Given((path,), sha256_of_folder(path, hidden=key != "datasets"))
        if not self.dry:
            raise FileNotFoundError(2, f"there is no such folder ([evaluate] {key})", folder)
        return Given((path,), digest_of(folder), (path,))

    def _text(self, variant: Variant, stage: str, *, named: bool = False) -> dict[str, Node | Given]:
        files = tuple(variant[stage]["data"])
        if (files, named) not in self.texts:
            paths = tuple(map(Path, files))
            lacking = tuple(path for path in paths if not path.is_file())
            if lacking and not self.dry:
                reason = "is a folder: give its files" if lacking[0].is_dir() else "there is no such file"
                raise FileNotFoundError(2, f"{reason} ([{stage}] data)", str(lacking[0]))
            digest = digest_of(files) if lacking else digest_of_files(paths, files if named else ())
            self.texts[files, named] = Given(paths, digest, lacking)
        return {"data": self.texts[files, named]}


def seed_of_round(seed: int, number: int) -> int:
    """By which one of several rounds draws: each anew, and the first as if it were the only one."""
    if number == 1:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "little")


def version_of_harness() -> str | None:
    """The version of lm-eval, on which the results of its tasks depend; None: it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def needs_teacher(config: Mapping[str, Any]) -> bool:
    """Whether a training stage compares with a teacher, or reads its text alone."""
    return bool(config["kl_weight"] or config["hidden_layers"])


def _what_matters(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, without what the results do not depend on."""
    options = options_of(stage)
    idle = {name for name, option in options.items() if option.may_change} | set(_NOT_IN_RESULTS)
    if stage == "plan" and config["layers_by"] != "loss":
        idle |= set(_FOR_LOSS)
        idle |= {"seed"} if config["by"] != "random" else set()
    if stage == "plan" and config.get("round", 0) == 0:
        idle |= {"rounds"}
    return {name: value for name, value in config.items() if name not in idle}


def folder_of(given: Node | Given, out: Path) -> Path:
    """Where something is."""
    return out / given.path if isinstance(given, Node) else given.paths[0]


def check_out(recipe: Recipe) -> None:
    """Checks that results do not go into the teacher's folder, or above it."""
    out, teacher = (os.path.realpath(path) for path in (recipe.out, recipe.base["recipe"]["teacher"]))
    if out == teacher or teacher.startswith(out + os.sep):
        raise ValueError(
            f"out must be another folder than the teacher's, and not around it, got {recipe.out}"
        )
