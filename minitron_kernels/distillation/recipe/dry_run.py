"""`--dry-run`: what each stage reads and makes, how large it is, and how long it takes at a given rate.

No weights are read, and neither the teacher nor any text must be there: sizes come from configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_kernels._command.messages import few
from minitron_kernels._command.progress import duration
from minitron_kernels.distillation.cli.estimate import size_text
from minitron_kernels.distillation.recipe import costs
from minitron_kernels.distillation.recipe.config import Recipe, steps_of, tokens_of_step
from minitron_kernels.distillation.recipe.graph import Given, Graph, Line, Node
from minitron_kernels.distillation.recipe.run import Verdicts
from minitron_kernels.distillation.recipe.scores import even_tables
from minitron_kernels.distillation.recipe.stages import read_config
from minitron_kernels.distillation.recipe.state import AGAIN
from minitron_kernels.distillation.recipe.targets import preview, round_arguments
from minitron_kernels.pruning import PruningPlan, make_plan

MEMORY_NOTE = (
    "memory: of each process of minitron-distill train: with fsdp = true its shard of both models, and what",
    "  is gathered; else all of student and teacher (DDP), whatever `processes` is. sharded: of each GPU,",
    "  where FSDP2 divides both over the GPUs of [estimate]",
)


@dataclass(frozen=True)
class Sizes:
    """The configs of all models of a recipe.

    Args:
        teacher: its config.
        plans: {variant: its plan, with made-up scores}.
        pruned: {path of a stage: config of the model that it makes}.
    """

    teacher: dict[str, Any]
    plans: dict[str, PruningPlan]
    pruned: dict[str, dict[str, Any]]

    def of(self, model: Node | Given) -> dict[str, Any]:
        """The config of what a stage makes, or of the teacher."""
        if isinstance(model, Given):
            return self.teacher
        if model.stage == "prune":
            return self.pruned[model.path]
        return self.of(model.inputs["student" if model.stage == "distill" else "model"])


def check_targets(recipe: Recipe, graph: Graph) -> Sizes:
    """The sizes of all models; checks that each variant's target is possible, before hours of work.

    Raises:
        ValueError: a target is not possible; [teacher_config] says something else than the teacher's folder.
        FileNotFoundError: neither a folder nor [teacher_config] says what the teacher is.
    """
    teacher = _teacher_config(recipe, graph)
    plans, pruned = {}, {}
    for line in graph.lines:
        name, table = line.variant.name, line.variant["plan"]
        where = f"[compare.{name}] plan" if name else "[plan]"
        try:
            plans[name] = preview(table, teacher)
            for plan in line.plans:
                made = plans[name]
                if "round" in plan.config:
                    arguments = round_arguments(table, teacher, plan.config["round"])
                    made = make_plan(even_tables(teacher), teacher, **{**arguments, "rescale_norms": False})
                for node in graph.nodes:
                    if node.inputs.get("plan") is plan:
                        pruned[node.path] = made.target_config
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
    return Sizes(teacher, plans, pruned)


def _teacher_config(recipe: Recipe, graph: Graph) -> dict[str, Any]:
    folder, said = graph.teacher.paths[0], recipe.teacher_config
    if graph.teacher.lacking:
        if not said:
            raise FileNotFoundError(
                2, "there is no such checkpoint; for --dry-run without it, give [teacher_config]", str(folder)
            )
        return said
    found = read_config(folder)
    differ = [f"{key} {found[key]!r}, not {value!r}" for key, value in said.items()
              if key in found and found[key] != value]  # fmt: skip
    if differ:
        raise ValueError(
            f"{folder}: has {few(differ)}, as [teacher_config] says: it is another model than the "
            "recipe is for"
        )
    return found


def describe(recipe: Recipe, graph: Graph, verdicts: Verdicts, sizes: Sizes) -> str:
    """All stages, with what they read, make and need."""
    base = recipe.base
    lines = [f"{recipe.file}: into {recipe.out}; nothing is done"]
    if base["recipe"]["about"]:
        lines.append(f"  {base['recipe']['about']}")
    lines.append(f"  teacher     {costs.described(sizes.teacher)}")
    for line in graph.lines:
        plan = sizes.plans[line.variant.name]
        share = plan.parameters_after / plan.parameters_before
        name = "student" if not line.variant.name else line.variant.name
        lines.append(f"  {name:<11} {costs.described(plan.target_config)}, {share:.1%} of the teacher's")
    total = 0.0
    sharded = False
    for node in graph.nodes:
        what, why = verdicts[node.path]
        note = f"{what}: {why}" if what == AGAIN and why else what
        lines += ["", f"{node.path}  ({note})"]
        facts, seconds = _facts(node, recipe, sizes)
        lines += [f"  {name:<9} {text}" for name, text in facts]
        sharded |= "sharded" in dict(facts)
        if what != "done":
            total += seconds or 0.0
    if sharded:
        lines += ["", *MEMORY_NOTE]
    lines += ["", f"{len(graph.nodes)} stages" + (f", about {duration(total)} to go" if total else "")]
    lines += _differences(graph)
    return "\n".join(lines)


def _facts(node: Node, recipe: Recipe, sizes: Sizes) -> tuple[list[tuple[str, str]], float | None]:
    """([(name, text)], seconds or None) of a stage."""
    estimate = recipe.base["estimate"]
    facts = [("reads", ", ".join(f"{name} {_named(given)}" for name, given in node.inputs.items()))]
    if node.stage in ("correct", "distill"):
        more, seconds = _training(node, recipe, sizes, estimate)
    elif node.stage == "prune":
        more, seconds = _pruning(node, sizes, estimate)
    elif node.stage == "plan":
        more, seconds = [("by", node.config["by"])], None
    else:
        more, seconds = _forward(node, sizes, estimate)
    facts += more
    if seconds is not None:
        facts.append(("time", f"about {duration(seconds)}, at the rate of [estimate]"))
    return facts, seconds


def _named(given: Node | Given) -> str:
    if isinstance(given, Node):
        return given.path
    names = few([str(path) for path in given.paths])
    return f"{names} (not there yet)" if given.lacking else names


def _forward(
    node: Node, sizes: Sizes, estimate: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], float | None]:
    """A stage that runs a model over text."""
    config, model = node.config, sizes.of(node.inputs["model"])
    facts = []
    if config["data"]:
        windows = f"{config['samples']:,} windows of" if config["samples"] else "all windows of"
        tokens = (config["samples"] or 0) * config["seq_len"]
        facts.append(
            ("text", f"{windows} {config['seq_len']:,}" + (f" = {tokens:,} tokens" if tokens else ""))
        )
    if node.stage == "evaluate" and config["tasks"]:
        facts.append(("tasks", ", ".join(config["tasks"])))
    facts.append(("memory", f"{size_text(costs.weight_bytes(model, config['dtype']))} of weights"))
    if not config["data"] or not config["samples"] or estimate["tflops"] is None:
        return facts, None
    return facts, costs.forward_operations(model, tokens, config["seq_len"]) / (estimate["tflops"] * 1e12)


def _pruning(
    node: Node, sizes: Sizes, estimate: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], float | None]:
    before, after = sizes.of(node.inputs["model"]), sizes.of(node)
    read, written = (costs.weight_bytes(config, "auto") for config in (before, after))
    facts = [
        ("makes", costs.described(after)),
        ("disk", f"{size_text(read)} read, {size_text(written)} written, in pieces of a few MiB"),
    ]
    return facts, (read + written) / estimate["disk_rate"] if estimate["disk_rate"] else None


def _training(
    node: Node, recipe: Recipe, sizes: Sizes, estimate: Mapping[str, Any]
) -> tuple[list[tuple[str, str]], float | None]:
    config, processes = node.config, node.config["processes"]
    student = sizes.of(node)
    teacher = sizes.of(node.inputs["teacher"]) if "teacher" in node.inputs else None
    steps, each = steps_of(config, processes), tokens_of_step(config, processes)
    length = f"{config['epochs'] or 1:g} passes over the text"
    if steps is not None:
        length = f"{steps:,} steps of {each:,} tokens = {steps * each:,} tokens"
    of = f" of {processes} processes" if processes > 1 else ""
    facts = [
        ("length", f"{length}{of}"),
        (
            "lr",
            f"{config['lr']:g}, {config['lr_schedule']} to {config['lr_min']:g}, "
            f"warm-up {config['warmup']:,}",
        ),
        ("loss", costs.loss_text(node)),
    ]
    facts += costs.training_memory(node, student, teacher, estimate)
    if steps is None or estimate["tflops"] is None:
        return facts, None
    operations = costs.training_operations(config, student, teacher, steps * each)
    return facts, operations / (estimate["tflops"] * 1e12 * estimate["gpus"])


def _differences(graph: Graph) -> list[str]:
    """What variants change, and which stages they have for themselves."""
    lines = []
    for line in graph.lines[1:]:
        own = [node.path for node in graph.nodes if node.variant == line.variant.name]
        lines.append(f"  {line.variant.name}: {changes_text(line)}; {len(own)} stages of its own")
    return ["compared with the recipe:", *lines] if lines else []


def changes_text(line: Line) -> str:
    """What a variant changes, in one line."""
    return ", ".join(
        f"{table}.{key} = {value}"
        for table, values in line.variant.changes.items()
        for key, value in values.items()
    )
