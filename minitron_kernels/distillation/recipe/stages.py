"""What each stage does: from the folders of others to its own, for which the runner gives it a place."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_kernels._command.models import load_model
from minitron_kernels._command.progress import tqdm_for
from minitron_kernels.distillation.cli.data import read_windows
from minitron_kernels.distillation.cli.job import device_for
from minitron_kernels.distillation.cli.record import write_text
from minitron_kernels.distillation.recipe.graph import Node, folder_of
from minitron_kernels.distillation.recipe.perplexity import mean_loss
from minitron_kernels.distillation.recipe.scores import magnitude_tables, random_tables
from minitron_kernels.distillation.recipe.targets import arguments_of, round_arguments
from minitron_kernels.pruning import (
    ImportanceScores,
    LMLoss,
    PruningPlan,
    collect_importance,
    make_plan,
    prune_checkpoint,
    search_layers,
)

PLAN, EVALUATION, LAYERS, TASKS = "plan.json", "evaluation.json", "layers.json", "tasks.json"
Say = Callable[[str, object], None]


@dataclass(frozen=True)
class Context:
    """What all stages get.

    Args:
        out: folder of the recipe.
        say: prints a line: what kind, and the message.
        quiet: no progress.
        lock: the open file that keeps other runs out, which processes of training hold too.
    """

    out: Path
    say: Say
    quiet: bool = False
    lock: int | None = None

    @property
    def progress(self) -> bool | None:
        """As functions of the library take it."""
        return False if self.quiet else None

    def folder(self, node: Node, name: str) -> Path:
        """Where one of a stage's inputs is."""
        return folder_of(node.inputs[name], self.out)


def score(node: Node, into: Path, context: Context) -> str:
    """A model and text -> its scores."""
    config, model_folder = node.config, context.folder(node, "model")
    windows = windows_of(node, model_folder, context)
    model = load_model(model_folder, config["dtype"]).to(device_for(config["device"]))
    scores = collect_importance(
        model,
        list(windows.split(config["batch_size"])),
        config["axes"],
        seq=config["seq"],
        mlp_tap=config["mlp_tap"],
        head_score=config["head_score"],
        expert_score=config["expert_score"],
        progress=context.progress,
    )
    scores.save(into)
    return f"{scores.tokens:,} tokens, {', '.join(scores.axes)}"


def plan(node: Node, into: Path, context: Context) -> str:
    """Scores -> plan.json: what stays."""
    config, scores = node.config, ImportanceScores.load(context.folder(node, "scores"))
    model_folder = context.folder(node, "model")
    tables = scores.tables(batch=config["batch"], seq=config["seq"])
    if config["by"] == "random":
        tables = random_tables(tables, config["seed"])
    elif config["by"] == "magnitude":
        tables = magnitude_tables(load_model(model_folder, "auto"), tables)
    if "round" in config:
        first = read_config(context.folder(node, "first"))
        target = round_arguments(config, first, config["round"])
    else:
        target = arguments_of(config, scores.config)
    if config["layers_by"] == "loss":
        found = _layers_by_loss(node, scores, context)
        found.save(into / LAYERS)
        target = {**target, "drop_layers": found.drop_layers}
    made = make_plan(tables, scores.config, **target)
    about = {"scores": config["by"], "batch": config["batch"], "seq": config["seq"]}
    made = dataclasses.replace(made, made_with={**made.made_with, **about})
    made.save(into / PLAN)
    return made.summary()


def _layers_by_loss(node: Node, scores: ImportanceScores, context: Context) -> Any:
    """The block of layers without which the loss on text is least."""
    config, model_folder = node.config, context.folder(node, "model")
    windows = windows_of(node, model_folder, context)
    model = load_model(model_folder, config["dtype"], with_head=True).to(device_for(config["device"]))
    loss = LMLoss(list(windows.split(config["batch_size"])))
    return search_layers(model, config["num_hidden_layers"], loss, scores=scores, progress=context.progress)


def prune(node: Node, into: Path, context: Context) -> str:
    """A checkpoint and its plan -> a smaller checkpoint."""
    config = node.config
    done = prune_checkpoint(
        context.folder(node, "model"),
        into,
        PruningPlan.load(context.folder(node, "plan") / PLAN),
        max_shard_bytes=config["max_shard_size"],
        threads=config["threads"],
        leave_out=config["leave_out"] or (),
        progress=context.progress,
    )
    return (
        f"{done.parameters_before:,} → {done.parameters_after:,} parameters, {done.nbytes / 1e9:.3g} GB in "
        f"{len(done.files)} file{'s' * (len(done.files) > 1)}"
    )


def evaluate(node: Node, into: Path, context: Context) -> str:
    """A model -> its loss and perplexity on each held-out file, and lm-eval's tasks."""
    config, folder = node.config, context.folder(node, "model")
    device, found = device_for(config["device"]), {}
    if config["data"]:
        model = load_model(folder, config["dtype"], otherwise="evaluated", with_head=True).to(device)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        found["perplexity"] = {}
        for file in config["data"]:
            data = read_windows(
                [file],
                str(folder),
                seq_len=config["seq_len"],
                samples=config["samples"],
                seed=config["seed"],
                option="[evaluate] data",
                text_key=config["text_key"],
            )
            batches = [data.windows[index] for index in data.chosen]
            split = torch.stack(batches).split(config["batch_size"])
            bar = tqdm_for(context.progress)
            loss, tokens = mean_loss(
                model, split if bar is None else bar(split, desc=node.path, unit="batch")
            )
            found["perplexity"][file] = {
                "loss": loss,
                "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
                "tokens": tokens,
            }
        del model
    if config["tasks"]:
        found["tasks"] = _tasks(folder, config, device, into, context)
    write_text(into / EVALUATION, json.dumps(found, indent=1) + "\n")
    said = [f"perplexity {entry['perplexity']:.4g}" for entry in found.get("perplexity", {}).values()]
    said += [f"{name} {entry['value']:.4g}" for name, entry in found.get("tasks", {}).items()]
    return ", ".join(said)


def harness() -> Any:
    """What runs lm-eval's tasks; imported where a recipe names some."""
    return importlib.import_module("minitron_kernels.evaluation")


def _tasks(
    folder: Path, config: Mapping[str, Any], device: str, into: Path, context: Context
) -> dict[str, Any]:
    """lm-eval's results for a checkpoint; those that an interrupted run left are gone on with."""
    call = functools.partial(
        harness().evaluate,
        str(folder),
        config["tasks"],
        tasks_path=config["tasks_path"],
        datasets=config["datasets"],
        batch_size=config["batch_size"],
        device=device,
        dtype=config["dtype"],
        limit=config["limit"],
        run_code=config["run_code"],
        output=into / TASKS,
        progress=context.progress,
    )
    try:
        return dict(call().tasks)
    except harness().OtherResultsError:  # of another release, say: they are of use to nobody
        return dict(call(overwrite=True).tasks)


def windows_of(node: Node, model_folder: Path, context: Context) -> torch.Tensor:
    """The windows of text of a stage, [windows, seq_len]."""
    config = node.config
    data = read_windows(
        config["data"],
        str(model_folder),
        seq_len=config["seq_len"],
        samples=config["samples"],
        seed=config["seed"],
        option=f"[{node.stage}] data",
        text_key=config["text_key"],
    )
    if config["samples"] is not None and len(data) < config["samples"]:
        context.say(
            "warning",
            f"[{node.stage}] data has {len(data)} windows of {config['seq_len']}, not {config['samples']}",
        )
    return torch.stack([data.windows[index] for index in data.chosen])


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


WRITERS: dict[str, Callable[[Node, Path, Context], str]] = {
    "score": score,
    "plan": plan,
    "prune": prune,
    "evaluate": evaluate,
}
