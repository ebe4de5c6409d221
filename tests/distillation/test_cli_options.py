"""minitron-distill: flags and TOML are one configuration; what is wrong is one line that names it."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distillation.cli_runs import one_line, run
from minitron_kernels._command.progress import Progress, duration
from minitron_kernels.distillation.cli.config import load, to_toml
from minitron_kernels.distillation.cli.main import main
from minitron_kernels.distillation.cli.tables import TABLES, options_of

if sys.version_info < (3, 11):
    pytest.importorskip("tomli", reason="TOML needs Python 3.11 or tomli")


def written(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_toml_and_toml_over_defaults(tmp_path, capsys):
    path = written(tmp_path, '[train]\nlr = 2e-4\nseq_len = 32\nhidden-layers = ["1:2"]\n[cache]\nk = 3\n')
    assert run("train", "--config", path, "--seq-len", 64, "--print-config") == 0
    printed = written(tmp_path, capsys.readouterr().out)
    config = load("train", printed, {})
    assert (config["lr"], config["seq_len"], config["batch_size"]) == (2e-4, 64, 1)
    assert config["hidden_layers"] == ["1:2"] and config["steps"] is None
    assert load("train", printed, {"lr": 1.0})["lr"] == 1.0


@pytest.mark.parametrize("command", list(TABLES))
def test_every_option_goes_through_toml_as_it_is(tmp_path, command):
    values = {str: 'é "x"\\\n\x7f', int: 3, float: 0.25, bool: True}
    config = {}
    for name, option in options_of(command).items():
        if option.metavar in ("PATH", "DIR", "FILE", "NAME"):
            value = values[str]
        elif "|" in option.metavar:
            value = option.metavar.split("|")[0]
        elif option.metavar == "STUDENT:TEACHER":
            value = "1:2"
        else:
            value = values[float if option.metavar == "X" else option.toml[0]]
        config[name] = [value, value] if option.many else value
    assert load(command, written(tmp_path, to_toml(command, config)), {}) == config
    unset = load(command, None, {})
    assert load(command, written(tmp_path, to_toml(command, unset)), {}) == unset


def test_a_length_or_a_teacher_of_the_flags_is_instead_of_that_of_the_file(tmp_path):
    path = written(tmp_path, '[train]\ntokens = "2K"\nteacher = "t"\n')
    config = load("train", path, {"steps": 3, "cache": "c"})
    assert (config["steps"], config["tokens"]) == (3, None)
    assert (config["cache"], config["teacher"]) == ("c", None)
    assert load("train", path, {})["tokens"] == 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nseq_length = 3", "[train] has an unknown key seq_length; did you mean seq_len?"),
        (
            "[trian]\nlr = 1.0",
            "no table for 'trian': tables are [train] and [cache]; did you mean train?",
        ),
        ("lr = 1.0", "it goes below [train]"),
        ("train = 1", "train must be a table"),
        ("[cache]\nk = 1", "has no table [train]"),
        ("[train]\nlr = ", "is not TOML"),
        ("[train]\nlr = true", "[train] lr must be a whole number or a number, got True"),
        ('[train]\nlr = "x"', "[train] lr must be a whole number or a number, got 'x'"),
        ("[train]\nlr = -1", "[train] lr must be a number above 0, got '-1'"),
        ("[train]\nlr = nan", "[train] lr must be a number above 0"),
        ("[train]\nseq_len = 16.0", "[train] seq_len must be a whole number, got 16.0"),
        ("[train]\nseq_len = 1", "[train] seq_len must be a whole number from 2 on"),
        ("[train]\nseq_len = [16]", "[train] seq_len must be one value, got a list"),
        ("[train]\nseq_len = 16\nseq-len = 17", "has seq_len twice"),
        ("[train]\ndata = []", "[train] data must not be an empty list"),
        ("[train]\ndata = [3]", "[train] data must be a string, got 3"),
        ("[train]\nquiet = 1", "[train] quiet must be true or false, got 1"),
        ('[train]\nlr_schedule = "cosin"', "[train] lr_schedule must be one of cosine, linear, constant"),
        ("[train]\ndivergence = 2", "[train] divergence must be forward_kl, reverse_kl, jsd or a number"),
        ('[train]\nhidden_layers = ["1"]', "[train] hidden_layers must be a student's and a teacher's layer"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, capsys, text, said):
    assert said in one_line(capsys, "train", "--config", written(tmp_path, text), "--print-config")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--seq-length", "3"], "there is no option --seq-length; did you mean --seq-len?"),
        (["train", "--seq", "3"], "there is no option --seq"),
        (["train", "--steps", "0"], "--steps must be a number such as 500M or 8.4B, got '0'"),
        (["train", "--tokens", "inf"], "--tokens must be a number such as"),
        (["train", "--epochs", "0"], "--epochs must be a number above 0, got '0'"),
        (["train", "--lr", "1e-4x"], "--lr must be a number above 0"),
        (["train", "--lr", "inf"], "--lr must be a number above 0"),
        (["train", "--beta1", "1"], "--beta1 must be a number at least 0 and at most 0.99999"),
        (["train", "--batch-size", "0"], "--batch-size must be a whole number from 1 on"),
        (["train", "--seq-len", "1"], "--seq-len must be a whole number from 2 on"),
        (["train", "--warmup", "-1"], "--warmup must be a whole number from 0 on"),
        (["train", "--divergence", "kl"], "--divergence must be forward_kl, reverse_kl, jsd or a number"),
        (["train", "--divergence", "1.5"], "--divergence must be"),
        (["train", "--hidden-layers", "a:b"], "--hidden-layers must be a student's and a teacher's layer"),
        (["train", "--loss-workspace", "9 bananas"], "--loss-workspace must be a size such as 256MiB"),
        (["train", "--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["train", "--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["train", "-o"], "expected one argument"),
        (["train", "--quiet=1"], "--quiet"),
        (["cache", "--tier", "top"], "--tier must be one of topk, sampled, hidden"),
        (["cache", "--temperatures", "1", "0"], "--temperatures must be a number above 0, got '0'"),
        (["cache", "--mass", "1.2"], "--mass must be a number above 0 and at most 1"),
        (["info"], "the following arguments are required: PATH"),
        (["cach"], "invalid choice: 'cach'"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line(capsys, arguments, said):
    assert said in one_line(capsys, *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "train needs --student, --data, --out"),
        (["cache", "-o", "x"], "cache needs --teacher, --data"),
        (["train", "--config", "nothing.toml"], "nothing.toml: No such file"),
        (["train", "--resume"], "--resume needs --out"),
        (
            ["train", "--resume", "-o", "nothing"],
            "nothing: has no distillation.toml: there is no run",
        ),
    ],
)
def test_what_is_given_nowhere(capsys, arguments, said):
    assert said in one_line(capsys, *arguments)


@pytest.mark.parametrize("command", [[], ["train"], ["cache"], ["info"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and f"minitron-distill {(command or ['train'])[0]}" in out
    for option in options_of(command[0]).values() if command and command[0] in TABLES else ():
        assert option.flag in out, option.flag


def test_the_script_that_pip_installs():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    module, function = re.search(r'^minitron-distill = "(.+):(.+)"$', text, re.M).groups()
    assert getattr(importlib.import_module(module), function) is main


def test_as_a_module(tmp_path):
    """And what `info` and errors need not load, which takes seconds."""
    code = (
        "import sys, runpy; sys.argv[1:] = ['info', sys.argv[1]]\n"
        "try: runpy.run_module('minitron_kernels.distillation', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, {'transformers', 'matplotlib'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1 set()\n"
    assert done.stderr == f"minitron-distill: error: {tmp_path / 'nothing'}: No such file or folder\n"


def test_progress_without_a_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("minitron_kernels._command.progress.time.monotonic", lambda: clock[0])
    progress = Progress("distilling", 100, done=40)
    for step in range(60):
        clock[0] += 2
        progress.advance(1, {"loss": 2.5, "tokens/s": 12345.6} if step == 0 else None)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "distilling: step 41 of 100, loss 2.5, 12,346 tokens/s, 1:58 min left"
    assert lines[1].startswith("distilling: step 56 of 100") and lines[1].endswith("1:28 min left")
    assert (
        lines[-1] == "distilling: step 100 of 100, loss 2.5, 12,346 tokens/s, in 2:00 min" and len(lines) == 5
    )
    late = Progress("distilling", 1)
    late.advance(more_comes=True)
    assert capsys.readouterr().err == ""
    late.show({"loss": 1.0})
    assert capsys.readouterr().err.startswith("distilling: step 1 of 1, loss 1")
    quiet = Progress("distilling", 2, quiet=True)
    quiet.advance(2)
    assert capsys.readouterr().err == ""
    assert [duration(s) for s in (0.4, 59.6, 3599, 97500)] == ["0 s", "1:00 min", "59:59 min", "27:05 h"]
    assert [duration(3600.0 * hours) for hours in (95, 96, 4425.3)] == ["95:00 h", "4 days", "184 days"]


@pytest.mark.parametrize(
    ("arguments", "again"),
    [(["train"], "begins anew"), (["train", "--resume"], "goes on"), (["cache"], "goes on")],
)
def test_ctrl_c_before_anything_was_made(capsys, monkeypatch, arguments, again):
    """The same command of a new training does not go on: that needs --resume."""

    def interrupt(args):
        raise KeyboardInterrupt

    for name in ("train", "cache"):
        monkeypatch.setattr(f"minitron_kernels.distillation.cli.{name}.{name}", interrupt)
    assert main(arguments) == 130
    assert capsys.readouterr().err.startswith(f"minitron-distill: interrupted: the same command {again}")
