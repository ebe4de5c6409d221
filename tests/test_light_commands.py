"""--help, --version and info do not load torch, which takes seconds; public names come all the same."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("", ".pruning", ".distillation", ".distillation.cache")
SCRIPTS = re.findall(
    r'^minitron-\w+ = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
)
PRUNE, DISTILL, EVALUATE = (
    next(module for module in SCRIPTS if f".{name}" in module)
    for name in ("pruning.cli", "distillation.cli", "evaluation")
)
# runs [module, argument, ...] one after the other, and prints [exit code, ...]; torch cannot be imported
RUNNER = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
codes = []
for module, *arguments in json.loads(sys.argv[1]):
    try:
        codes.append(importlib.import_module(module).main(arguments))
    except SystemExit as stop:
        codes.append(stop.code)
print(json.dumps(codes))
"""


def codes_of(*commands):
    """Exit codes of commands in one process without torch, and what they printed."""
    given = json.dumps([[str(argument) for argument in command] for command in commands])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, given], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    *printed, codes = done.stdout.splitlines()
    return json.loads(codes), "\n".join(printed), done.stderr


def test_help_and_version_load_no_torch():
    assert len(SCRIPTS) == 4
    commands = [[module, option] for module in SCRIPTS for option in ("--help", "--version")]
    subs = {
        "pruning": "score plan search prune info",
        "distillation.cli": "train cache info",
        "recipe": "run",
    }
    for name, words in subs.items():
        module = next(module for module in SCRIPTS if f".{name}." in module)
        commands += [[module, word, "--help"] for word in words.split()]
    codes, printed, errors = codes_of(*commands)
    assert codes == [0] * len(commands), errors
    assert printed.count("usage: minitron-") == 4 + 9


def test_info_loads_no_torch(tmp_path):
    from pruning.checkpoints import save_tiny
    from pruning.plans import GQA, plan_of

    plan_of(GQA, intermediate_size=64).save(tmp_path / "plan.json")
    save_tiny(tmp_path / "model", "llama")
    codes, printed, errors = codes_of(
        [PRUNE, "info", tmp_path / "plan.json", tmp_path / "model"],
        [PRUNE, "info", tmp_path / "nothing"],
        [DISTILL, "info", tmp_path / "nothing"],
        [DISTILL, "info", tmp_path / "model"],
    )
    assert codes == [0, 1, 1, 1], errors
    assert "Plan for" in printed and "checkpoint of a llama model" in printed
    assert "nothing: No such file or folder" in errors and "for a checkpoint: minitron-prune info" in errors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models, text, scores and plan, a cache, and a folder with nothing."""
    from distillation.cli_runs import cache_of, run, save_models
    from minitron_kernels.pruning.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    save_models(folder)
    (folder / "empty").mkdir()
    text = ["--seq-len", "16", "--samples", "4", "--quiet"]
    assert main(["score", f"{folder}/teacher", f"{folder}/text.txt", "-o", f"{folder}/scores", *text]) == 0
    assert (
        main(["plan", f"{folder}/scores", "-o", f"{folder}/plan.json", "--ratio", "0.5", "--divisor", "8"])
        == 0
    )
    assert run(*cache_of(folder, folder / "cache", "--k", 8)) == 0
    return folder


def test_scores_and_caches_are_shown_without_torch(made, tmp_path):
    from minitron_kernels.distillation.cache import TeacherCache
    from minitron_kernels.pruning import ImportanceScores

    scores, cache = ImportanceScores.load(made / "scores"), TeacherCache(made / "cache")
    for name in ("scores", "cache"):
        shutil.copytree(made / name, tmp_path / name)
        path = next((tmp_path / name).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-5])
    codes, printed, errors = codes_of(
        [PRUNE, "info", made / "scores"],
        [DISTILL, "info", made / "cache"],
        [PRUNE, "info", tmp_path / "scores"],
        [DISTILL, "info", tmp_path / "cache"],
    )
    assert codes == [0, 0, 1, 1], errors
    assert f"scores of a llama model, {scores.tokens:,} tokens" in printed
    assert f"  scored: {', '.join(scores.axes)}\n  over tokens: mean; MLP at down_proj_input" in printed
    assert str(cache.summary()) in printed
    cut = [line for line in errors.splitlines() if ": error: " in line and "the file is damaged" in line]
    assert len(cut) == 2 and all(".safetensors: its header describes" in line for line in cut)


def test_what_is_cheap_is_looked_at_before_torch(made, tmp_path):
    teacher, student, text = made / "teacher", made / "student", made / "text.txt"
    nothing, out = tmp_path / "nothing", ["-o", tmp_path / "out"]
    train = [DISTILL, "train", "--student", student, "--teacher", teacher, "--data", text, *out]
    cache = [DISTILL, "cache", "--teacher", teacher, "--data", text, *out]
    said = {
        (PRUNE, "prune", teacher, tmp_path / "a", nothing): "nothing: there is no such file",
        (PRUNE, "prune", nothing, tmp_path / "a", made / "plan.json"): "nothing: src must be the folder",
        (PRUNE, "prune", teacher, student, made / "plan.json"): "student: is there already",
        (PRUNE, "plan", nothing, *out, "--ratio", 0.5): "importance.json: there is no such file",
        (PRUNE, "plan", made / "scores", *out): "give a target",
        (PRUNE, "score", teacher, nothing, *out): "nothing: there is no such file",
        (PRUNE, "score", teacher, made / "empty", *out): "empty: is a folder without",
        (PRUNE, "search", teacher, nothing, text, *out, "--ratio", 0.5): "importance.json: there is no such",
        (PRUNE, "search", teacher, made / "scores", nothing, *out, "--ratio", 0.5): "nothing: there is no",
        (PRUNE, "search", teacher, made / "scores", text, *out, "--table", out[1]): "--table must be another",
        (
            *(PRUNE, "search", teacher, made / "scores", text, *out),
            *("--progress-file", nothing / "a"),
        ): "there is no such folder to write --progress-file to",
        (*train, "--data", nothing): "nothing: there is no such file (--data)",
        (*train, "--eval-data", made / "empty"): "empty: is a folder without",
        (*train, "--steps", 3, "--tokens", 5): "give one of --steps, --tokens and --epochs",
        (*train, "--label-smoothing", 0.1): "give --ce-weight too",
        (*train, "--hidden-weight", 2): "give --hidden-layers",
        (*train[:4], "--cache", nothing, *train[6:]): "nothing: is not a folder; it is not a teacher's cache",
        (*train, "--student", nothing): "nothing: there is no such folder",
        (*cache, "--data", nothing): "nothing: there is no such file (--data)",
        (*cache, "--quantiser", "log9000"): "--quantiser must be one of fp32",
        (EVALUATE, "--beside", nothing): "nothing: ",
    }
    codes, _, errors = codes_of(*said)
    lines = [line for line in errors.splitlines() if ": error: " in line]
    assert codes == [1] * len(said) and len(lines) == len(said), errors
    for line, text in zip(lines, said.values(), strict=True):
        assert text in line, (text, line)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_where_a_type_checker_sees_them(package):
    path = ROOT.joinpath("minitron_kernels", *package.split("."), "__init__.py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    checked = next(node.body for node in body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in checked for alias in node.names}
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("_HOMES", "__all__", "_LAZY")
    }
    assert seen == constants["_HOMES"] and sorted(seen) == sorted(constants["__all__"])
    # a module of that name would take the place of what the package means by it
    inside = {entry.stem for entry in path.parent.iterdir()}
    assert not inside & {*seen, *constants.get("_LAZY", {})}


def test_names_come_when_they_are_asked_for():
    code = (
        "import sys\n"
        "import minitron_kernels as mk\n"
        "from minitron_kernels import distillation\n"
        "assert 'torch' not in sys.modules and 'kl_loss' in dir(mk) and 'step' in dir(distillation)\n"
        "import minitron_kernels.distillation.trainers.loop\n"
        "from minitron_kernels.distillation import layer_pairs, step\n"
        "assert callable(step) and callable(layer_pairs) and callable(mk.kl_loss)\n"
        "assert mk.kl_loss is vars(mk)['kl_loss']\n"
        "for module in (mk, distillation):\n"
        "    try: module.nothing\n"
        "    except AttributeError as error: assert \"has no attribute 'nothing'\" in str(error)\n"
        "    else: raise SystemExit('there is nothing')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
