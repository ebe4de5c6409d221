"""Recipes for the tiny models of distillation.cli_runs."""

import json

from distillation.cli_runs import save_models
from minitron_kernels.distillation.recipe.main import main

BASE = {
    "recipe": {"seq_len": 16, "seed": 0, "device": "cpu", "picture": False},
    "score": {"samples": 8, "batch_size": 4},
    "plan": {"hidden_size": 32, "intermediate_size": 48, "divisor": 16},
    "distill": {"steps": 4, "batch_size": 2, "accumulation": 2, "lr": 2e-3, "lr_min": 2e-4, "log_every": 1},
    "evaluate": {"batch_size": 2},
}


def models(folder):
    """A teacher with its tokenizer, and text."""
    save_models(folder)
    return folder


def tables(folder, out, **changes):
    """{table: {key: value}} of a recipe for models(folder), with changed tables; None removes a key."""
    found = {name: dict(table) for name, table in BASE.items()}
    found["recipe"] |= {
        "teacher": str(folder / "teacher"),
        "out": str(out),
        "data": [str(folder / "text.txt")],
        "held_out": [str(folder / "held.jsonl")],
    }
    for name, table in changes.items():
        found[name] = {**found.get(name, {}), **table}
    return {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in found.items()
    }


def key_of(name):
    return name if name.replace("-", "").replace("_", "").isalnum() else json.dumps(name)


def toml(table, where=""):
    """TOML of nested dicts."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    text = "\n".join([f"[{where}]", *lines]) if where else "\n".join(lines)
    return "\n".join(
        [text, *(toml(value, f"{where}.{key_of(key)}" if where else key) for key, value in inner.items())]
    )


def write(file, found):
    file.write_text(toml(found) + "\n")
    return file


def run(*arguments):
    return main([str(argument) for argument in arguments])


def error_of(capsys, *arguments, code=1):
    """The one line on standard error of a command that fails."""
    capsys.readouterr()
    got = run(*arguments)
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert got == code, (got, out, err)
    assert last.startswith("minitron-recipe: error: "), err
    return last.removeprefix("minitron-recipe: error: ")


def snapshot(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("report.") and path.name != ".recipe.lock"
    }
