"""--help, --version and info do not load torch, which takes seconds; public names come all the same."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("", ".pruning", ".distillation", ".distillation.cache")
SCRIPTS = re.findall(
    r'^minitron-\w+ = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
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

    prune, distill = (next(m for m in SCRIPTS if f".{name}.cli" in m) for name in ("pruning", "distillation"))
    plan_of(GQA, intermediate_size=64).save(tmp_path / "plan.json")
    save_tiny(tmp_path / "model", "llama")
    codes, printed, errors = codes_of(
        [prune, "info", tmp_path / "plan.json", tmp_path / "model"],
        [prune, "info", tmp_path / "nothing"],
        [distill, "info", tmp_path / "nothing"],
        [distill, "info", tmp_path / "model"],
    )
    assert codes == [0, 1, 1, 1], errors
    assert "Plan for" in printed and "checkpoint of a llama model" in printed
    assert "nothing: No such file or folder" in errors and "for a checkpoint: minitron-prune info" in errors


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
