"""A recipe's TOML: tables of stages, and [compare.NAME], what a variant changes. Everything is checked here.

[recipe]
teacher = "SmolLM2-135M"
out = "smaller"

[plan]
intermediate_size = 1152

[compare.random]
plan.by = "random"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.cli.config import near, parse_toml, toml_of
from minitron_kernels.distillation.cli.job import check_warmup
from minitron_kernels.distillation.recipe.tables import (
    AGGREGATIONS,
    LENGTHS,
    SHARED,
    TABLES,
    TARGETS,
    TOGETHER,
    options_of,
)

OTHERS = ("teacher_config", "compare")
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """The recipe itself, or what it is compared with.

    Args:
        name: of [compare.NAME]; "" for the recipe itself.
        tables: {table: {key: value}}, complete; None where a key is not set.
        changes: what the TOML says of it: {table: {key: value}}.
    """

    name: str
    tables: Tables
    changes: Tables

    def __getitem__(self, table: str) -> dict[str, Any]:
        return self.tables[table]

    @property
    def title(self) -> str:
        """For people."""
        return self.name or "the recipe"


@dataclass(frozen=True)
class Recipe:
    """What a TOML says.

    Args:
        file: that was read.
        variants: the recipe itself first.
        teacher_config: entries of the teacher's config.json, for --dry-run where its folder is not there yet.
    """

    file: Path
    variants: tuple[Variant, ...]
    teacher_config: dict[str, Any]

    @property
    def base(self) -> Variant:
        """The recipe itself."""
        return self.variants[0]

    @property
    def out(self) -> Path:
        """The folder for all results."""
        return Path(self.base["recipe"]["out"])


def load(file: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        file: a TOML.
        settings: "table.key=value", which win over the file.

    Raises:
        OSError, ValueError: it cannot be read; an unknown table or key (names the nearest one), a value of
            another type or out of range, something that is lacking, keys that contradict each other.
    """
    raw = parse_toml(file)
    for setting in settings:
        _set(raw, setting)
    for name, table in raw.items():
        if name not in TABLES and name not in OTHERS:
            raise ValueError(f"{file}: has no table for {name!r}{_advice(name, [*TABLES, *OTHERS])}")
        if not isinstance(table, dict):
            raise ValueError(f"{file}: {name} must be a table, [{name}], got {table!r}")
    given = {name: _read(name, raw[name], f"{file}: [{name}]") for name in TABLES if name in raw}
    variants = [_variant("", given, {}, str(file))]
    for name, changes in raw.get("compare", {}).items():
        where = f"{file}: [compare.{name}]"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{where}: must be named by letters, digits, '.', '_' and '-'")
        if not isinstance(changes, dict):
            raise ValueError(f"{where} must be a table, got {changes!r}")
        variants.append(_variant(name, given, _changes(changes, where), where))
    for option in ("teacher", "out"):
        if not variants[0]["recipe"][option]:
            raise ValueError(f"{file}: [recipe] needs {option}")
    return Recipe(file, tuple(variants), raw.get("teacher_config", {}))


def _set(raw: dict[str, Any], setting: str) -> None:
    """Puts "table.key=value" into what a TOML says; a value that is not TOML is a string."""
    name, equals, text = setting.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not tables or not key:
        raise ValueError(f"--set must be TABLE.KEY=VALUE, got {setting!r}")
    try:
        value = toml_of(f"value = {text}")["value"]
    except ValueError:
        value = text
    at = raw
    for table in tables:
        at = at.setdefault(table, {})
        if not isinstance(at, dict):
            raise ValueError(f"--set {setting}: {table} is not a table")
    at[key] = value


def _advice(name: str, known: Sequence[str]) -> str:
    owners = [table for table in TABLES if name.replace("-", "_") in options_of(table)]
    if owners:
        return f"; it is a key, and goes below [{owners[0]}]"
    return f": tables are {', '.join(known)}{near(name, known)}"


def _read(table: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that a table gives, checked."""
    options, found = options_of(table), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in options:
            owners = [other for other in TABLES if name in options_of(other)]
            advice = f"; it is one of [{owners[0]}]" if owners else near(name, options)
            raise ValueError(f"{where} has an unknown key {key}{advice}")
        if name in found:
            raise ValueError(f"{where} has {name} twice, with - and with _")
        found[name] = options[name].read(value, f"{where} {key}")
    return found


def _changes(changes: Mapping[str, Any], where: str) -> Tables:
    """What a variant changes, checked."""
    found: Tables = {}
    for name, table in changes.items():
        if name not in TABLES or name in ("recipe", "estimate"):
            known = [table for table in TABLES if table not in ("recipe", "estimate")]
            raise ValueError(f"{where} has no table for {name!r}{_advice(name, known)}")
        if not isinstance(table, dict):
            raise ValueError(f"{where} {name} must be a table, as {name}.KEY = VALUE, got {table!r}")
        found[name] = _read(name, table, f"{where} {name}")
    if not found:
        raise ValueError(f'{where} changes nothing: give what differs, as plan.by = "random"')
    return found


def _variant(name: str, given: Tables, changes: Tables, where: str) -> Variant:
    """A complete configuration: defaults, keys of [recipe] for all stages, tables, changes."""
    merged = {table: dict(given.get(table, {})) for table in TABLES}
    for table, values in changes.items():
        for group in TOGETHER.get(table, ()):
            if any(key in values for key in group):
                merged[table] = {key: value for key, value in merged[table].items() if key not in group}
        merged[table] |= values
    shared = merged["recipe"]
    tables: Tables = {}
    for table in TABLES:
        options = options_of(table)
        tables[table] = {key: option.default for key, option in options.items()}
        if table != "recipe":
            tables[table] |= {key: shared[key] for key in SHARED if key in shared and key in options}
        if table == "evaluate":
            tables[table]["data"] = shared.get("held_out")
        tables[table] |= merged[table]
    there = {table for table in TABLES if table in given or table in changes}
    _settle(tables, there)
    _check(tables, where)
    return Variant(name, tables, changes)


def _settle(tables: Tables, there: set[str]) -> None:
    """Which stages run."""
    evaluate = tables["evaluate"]
    defaults = {
        "correct": "correct" in there,
        "distill": True,
        "evaluate": bool(evaluate["data"] or evaluate["tasks"]),
    }
    for table, default in defaults.items():
        if tables[table]["enabled"] is None:
            tables[table]["enabled"] = default


def _check(tables: Tables, where: str) -> None:
    """What can be seen to be wrong before anything is read.

    Raises:
        ValueError: something is lacking, or keys contradict each other; names them.
    """
    plan = tables["plan"]
    if all(plan[key] in (None, []) for key in TARGETS):
        raise ValueError(
            f"{where}: [plan] needs what stays: sizes (hidden_size, intermediate_size, ...), ratio, "
            "drop_layers, or a budget (params, active_params, memory)"
        )
    if plan["rounds"] > 1 and plan["drop_layers"]:
        raise ValueError(f"{where}: [plan] drop_layers names layers of the teacher: it goes with rounds = 1")
    if plan["layers_by"] == "loss" and plan["num_hidden_layers"] is None:
        raise ValueError(f'{where}: [plan] layers_by = "loss" needs num_hidden_layers, how many stay')
    if plan["layers_by"] == "loss" and plan["rounds"] > 1:
        raise ValueError(f'{where}: [plan] layers_by = "loss" goes with rounds = 1')
    if plan["batch"] not in AGGREGATIONS:
        raise ValueError(
            f"{where}: [plan] batch must be one of {', '.join(AGGREGATIONS)}, got {plan['batch']!r}"
        )
    if plan["seq"] not in tables["score"]["seq"]:
        raise ValueError(
            f"{where}: [plan] seq must be one that [score] seq collects "
            f"({', '.join(tables['score']['seq'])}), got {plan['seq']!r}"
        )
    reads = ["score", *(["plan"] if plan["layers_by"] == "loss" else [])]
    reads += [table for table in ("correct", "distill") if tables[table]["enabled"]]
    for table in reads:
        if not tables[table]["data"]:
            raise ValueError(f"{where}: [{table}] needs data: give it there, or in [recipe] for all stages")
    evaluate = tables["evaluate"]
    for key in ("tasks_path", "datasets"):
        if evaluate[key] and not evaluate["tasks"]:
            raise ValueError(f"{where}: [evaluate] {key} needs tasks: the names of those that are run")
    if evaluate["enabled"] and evaluate["tasks"]:
        _check_tasks(evaluate, f"{where}: [evaluate]")
    if evaluate["enabled"] and not evaluate["data"] and not evaluate["tasks"]:
        raise ValueError(f"{where}: [evaluate] needs data (or held_out in [recipe]), or tasks")
    for table in ("correct", "distill"):
        if tables[table]["enabled"]:
            _check_training(tables[table], f"{where}: [{table}]", tables["recipe"]["processes"])


def _check_tasks(evaluate: Mapping[str, Any], where: str) -> None:
    from minitron_kernels.evaluation.choice import written

    try:
        choices = written(evaluate["tasks"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {error}") from None
    running = [one.name for one in choices if one.benchmark is not None and one.benchmark.runs_code]
    if running and evaluate["run_code"] is None:
        raise ValueError(
            f"{where} tasks: {', '.join(running)} run code that the model wrote: say run_code = true, or "
            "false to leave them out"
        )


def _check_training(config: Mapping[str, Any], where: str, processes: int) -> None:
    given = [name for name in LENGTHS if config[name] is not None]
    if len(given) > 1:
        raise ValueError(f"{where} needs one of steps, tokens and epochs, got {' and '.join(given)}")
    if config["lr_min"] >= config["lr"] and config["lr_schedule"] != "constant":
        raise ValueError(f"{where} lr_min must be below lr {config['lr']:g}, got {config['lr_min']:g}")
    if config["fsdp"] and processes < 2:
        raise ValueError(f"{where} fsdp = true shards over processes: [recipe] needs more than {processes}")
    steps = steps_of(config, processes)
    if steps is not None:
        try:
            check_warmup(config, steps)
        except ValueError as error:
            raise ValueError(f"{where} {str(error).removeprefix('--')}") from None


def steps_of(config: Mapping[str, Any], processes: int) -> int | None:
    """Optimizer steps of a training stage; None where the length of its text says how many."""
    if config["steps"] is not None:
        return int(config["steps"])
    if config["tokens"] is None:
        return None
    return -(-int(config["tokens"]) // tokens_of_step(config, processes))


def tokens_of_step(config: Mapping[str, Any], processes: int) -> int:
    """Tokens of an optimizer step of all processes."""
    return int(config["batch_size"] * config["accumulation"] * config["seq_len"] * processes)
