"""What a stage's results depend on: a change of any of it must be seen. No model runs."""

import json
import os
import shutil
import signal
import sys
import time
import types

import pytest
import torch

from distillation.recipe.tomls import tables, write
from minitron_kernels.distillation.recipe import files, graph, stages, train
from minitron_kernels.distillation.recipe import run as runs
from minitron_kernels.distillation.recipe.config import load
from minitron_kernels.distillation.recipe.graph import graph_of
from minitron_kernels.distillation.recipe.scores import random_tables
from minitron_kernels.distillation.recipe.state import State

LONG_AGO = 10**18  # nanoseconds


@pytest.fixture
def digests(tmp_path):
    """The digests of all stages, {path: digest}, of the recipe with changed tables."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "pytorch_model.bin").write_bytes(b"one")
    (tmp_path / "text.txt").write_text('{"text": "a"}\n')
    (tmp_path / "held.jsonl").write_text('{"text": "b"}\n')

    def of(**changes):
        file = write(tmp_path / "recipe.toml", tables(tmp_path, tmp_path / "out", **changes))
        return {node.path: node.digest for node in graph_of(load(file)).nodes}

    return of


def differing(before, after):
    return {path for path in before if before[path] != after[path]}


def test_how_text_is_read_counts_and_where_it_is_does_not(digests, tmp_path):
    before = digests()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere/other.txt")
    assert digests(recipe={"data": [str(tmp_path / "elsewhere/other.txt")]}) == before
    lines = (tmp_path / "elsewhere/other.txt").rename(tmp_path / "other.jsonl")  # a JSON object is not text
    assert differing(before, digests(recipe={"data": [str(lines)]})) == set(before) - {"evaluate/teacher"}
    lines.rename(tmp_path / "text.txt")
    held = (tmp_path / "held.jsonl").rename(tmp_path / "unseen.jsonl")  # results name the file
    found = differing(before, digests(recipe={"held_out": [str(held)]}))
    assert found == {path for path in before if path.startswith("evaluate/")}


def test_weights_of_all_forms_count(digests, tmp_path):
    before = digests()
    for name in ("pytorch_model.bin", "spiece.model", "vocab.tiktoken"):
        (tmp_path / "teacher" / name).write_bytes(b"two")
        after = digests()
        assert differing(before, after) == set(before), name
        before = after


def test_a_change_anywhere_in_a_great_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 10)
    path, data = tmp_path / "weights", bytearray(16 << 20)
    path.write_bytes(data)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    before = files.digest_of_file(path)
    for place in (1, 100_000, 7_777_777):
        changed = data.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert files.digest_of_file(path) != before, place
    (tmp_path / "copy").write_bytes(data)
    assert files.digest_of_file(tmp_path / "copy") == before  # content alone counts


def test_a_change_is_seen_whose_time_was_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(files, "_NEAR_SECONDS", 0.0)
    path, found = tmp_path / "weights", []
    for byte in (1, 2):
        with path.open("r+b" if found else "wb") as stream:  # in place: the inode stays
            stream.write(bytes([byte]) * (1 << 12))
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
        time.sleep(0.05)  # the system's clock of files has steps of some milliseconds
        found.append(files.digest_of_file(path))
    assert found[0] != found[1]
    assert len(files._known) > 0


def test_a_great_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(files, "_NEAR_SECONDS", 0.0)
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 12))
    time.sleep(0.05)
    files.recall(tmp_path / "hashes.json")
    before = files.digest_of_file(path)
    files.keep(tmp_path / "hashes.json")
    files.recall(tmp_path / "hashes.json")
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", lambda *_: pytest.fail("it was read again"))
        assert files.digest_of_file(path) == before
    monkeypatch.setattr(files, "_NEAR_SECONDS", 60.0)
    path.write_bytes(bytes(1 << 12))  # the time of this change is too near to tell a further one
    files.digest_of_file(path)
    files.keep(tmp_path / "hashes.json")
    assert json.loads((tmp_path / "hashes.json").read_text()) == {}
    (tmp_path / "hashes.json").write_text("[")
    files.recall(tmp_path / "hashes.json")
    assert files.digest_of_file(path) == before


def test_another_harness_evaluates_again(digests, monkeypatch):
    tasks = {"evaluate": {"tasks": ["a"]}}
    found = []
    for version in ("0.4.13", "0.4.14"):
        monkeypatch.setattr(graph, "version_of_harness", lambda version=version: version)
        found.append((digests(), digests(**tasks)))
    (one, with_tasks), (other, with_others) = found
    assert one == other
    assert differing(with_tasks, with_others) == {path for path in one if path.startswith("evaluate/")}


def test_all_files_of_tasks_count_but_what_running_them_leaves(digests, tmp_path):
    folder = tmp_path / "tasks"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "a.yaml").write_text("task: a")
    tasks = {"evaluate": {"tasks": ["a"], "tasks_path": str(folder)}}
    before = digests(**tasks)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/utils.pyc").write_bytes(b"1")
    assert digests(**tasks) == before
    (folder / "checkpoint-1/data.jsonl").write_text("{}")
    assert differing(before, digests(**tasks)) == {path for path in before if path.startswith("evaluate/")}


def test_data_sets_of_tasks_count_but_what_downloads_keep(digests, tmp_path):
    folder = tmp_path / "datasets"
    (folder / "of/a/.cache").mkdir(parents=True)
    (folder / "of/a/rows.jsonl").write_text("{}")
    tasks = {"evaluate": {"tasks": ["a"], "datasets": str(folder)}}
    before = digests(**tasks)
    (folder / "of/a/.cache/time").write_text("1")
    assert digests(**tasks) == before
    (folder / "of/a/rows.jsonl").write_text("[]")
    assert differing(before, digests(**tasks)) == {path for path in before if path.startswith("evaluate/")}


def test_what_is_made_of_another_result_is_made_again(digests, tmp_path, monkeypatch):
    """The same configuration, on another device or by another release: other bits."""
    digests()
    out, made, contents = tmp_path / "out", [], {}

    def make(node, into, context):
        made.append(node.path)
        into.mkdir(exist_ok=True)
        (into / "model").write_text(contents.get(node.stage, ""))
        (into / "distillation.json").write_text(str(len(made)))  # has times in it
        return 0 if node.stage in graph.TRAINED else "said"

    monkeypatch.setattr(runs, "WRITERS", dict.fromkeys(("score", "plan", "prune", "evaluate"), make))
    monkeypatch.setattr(train, "train", make)

    def run(**options):
        found, state = graph_of(load(tmp_path / "recipe.toml")), State(out)
        made.clear()
        verdicts = runs.verdicts_of(found, state)
        code = runs.run(found, state, stages.Context(out, lambda *_: None), verdicts, **options)
        assert code == 0
        return list(made)

    out.mkdir()
    every = run()
    assert len(every) == 7 and run() == []
    shutil.rmtree(out / "prune")
    assert run() == ["prune"]  # with the same bits
    shutil.rmtree(out / "prune")
    contents["prune"] = "others"
    with pytest.raises(ValueError, match=r"distill \(student was made again, and is another\).*--redo"):
        run()
    with pytest.raises(ValueError, match=r"distill \(student was made again"):  # nor is it taken as done now
        verdicts = runs.verdicts_of(graph_of(load(tmp_path / "recipe.toml")), state := State(out))
        runs.check_free(graph_of(load(tmp_path / "recipe.toml")), state, verdicts, redo=False)
    assert run(redo=True) == ["distill", "evaluate/pruned"]
    shutil.rmtree(out / "distill")
    assert run() == ["distill"]  # its record differs, and no result of it


def test_the_key_of_the_text_is_that_of_all_stages(digests, tmp_path, monkeypatch):
    before = digests()
    assert differing(before, digests(recipe={"text_key": "body"})) == set(before)
    read = []

    def read_windows(files, folder, **options):
        read.append(options["text_key"])
        raise ZeroDivisionError

    monkeypatch.setattr(stages, "read_windows", read_windows)
    monkeypatch.setattr(stages, "load_model", lambda *_, **__: torch.nn.Linear(1, 1))
    for node in graph_of(load(tmp_path / "recipe.toml")).nodes:
        if node.stage in ("score", "evaluate"):
            with pytest.raises(ZeroDivisionError):
                stages.WRITERS[node.stage](node, tmp_path, stages.Context(tmp_path / "out", print))
    assert read == ["body"] * 4


def test_each_round_draws_its_own_scores_at_random(digests, tmp_path):
    def seeds(seed):
        digests(plan={"by": "random", "rounds": 3, "seed": seed})
        nodes = graph_of(load(tmp_path / "recipe.toml")).nodes
        return [node.config["seed"] for node in nodes if node.stage == "plan"]

    first, other = seeds(5), seeds(6)
    assert first == seeds(5) and (first[0], other[0]) == (5, 6)
    assert len({*first, *other}) == 6
    tables = {"hidden": torch.ones(64)}
    drawn = [random_tables(tables, seed)["hidden"].argsort() for seed in first]
    assert not any(torch.equal(drawn[0], x) for x in drawn[1:]) and not torch.equal(drawn[1], drawn[2])


def test_what_would_fail_later_or_be_left_out(digests):
    for changes, message in (
        ({"evaluate": {"tasks_path": "tasks"}}, r"\[evaluate\] tasks_path needs tasks"),
        ({"evaluate": {"datasets": "sets"}}, r"\[evaluate\] datasets needs tasks"),
        ({"score": {"seq": ["L2"]}}, r"\[plan\] seq must be one that \[score\] seq .*L2\), got 'mean'"),
        ({"evaluate": {"tasks": ["mbpp"]}}, r"\[evaluate\] tasks: mbpp run code .* say run_code"),
        ({"evaluate": {"tasks": ["a", "a:1"]}}, r"\[evaluate\] tasks must be different names"),
        ({"plan": {"batch": "max"}}, r"\[plan\] batch must be one of mean, L2, var, got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            digests(**changes)


def test_a_trained_model_whose_note_is_lacking_is_not_trained_again(digests, tmp_path, monkeypatch):
    digests()
    node = next(n for n in graph_of(load(tmp_path / "recipe.toml")).nodes if n.stage == "distill")
    into = tmp_path / "out/distill"
    into.mkdir(parents=True)
    (into / "distillation.toml").write_text("[train]\n")
    about = {"format": train.records.FORMAT, "version": train.records.VERSION, "started": "", "versions": {}}
    about |= {"step": 1, "parameters": 1, "job": dict.fromkeys(train.records._OF_JOB, 1)}
    about["config"] = dict.fromkeys(train.records._OF_CONFIG)
    trained = []
    command = "minitron_kernels.distillation.cli.train.train"
    monkeypatch.setattr(command, lambda args: trained.append(args) or 0)
    for status, times in (("done", 0), ("running", 1)):
        (into / "distillation.json").write_text(json.dumps({**about, "status": status}))
        assert train.train(node, into, stages.Context(tmp_path / "out", print)) == 0
        assert len(trained) == times, status


def test_a_trainer_that_outlives_its_recipe_keeps_others_out(digests, tmp_path, monkeypatch):
    """After a kill of the recipe alone; two trainers would write into one folder."""
    digests(recipe={"processes": 2})
    node = next(n for n in graph_of(load(tmp_path / "recipe.toml")).nodes if n.stage == "distill")
    outlives = f"sleep 60 >/dev/null 2>&1 & echo $! >{tmp_path}/pid"
    monkeypatch.setattr(train, "command_of", lambda *_, **__: ["sh", "-c", outlives])
    out = tmp_path / "out"
    with (state := State(out)).locked():
        assert train.train(node, out / "distill", stages.Context(out, print, lock=state.lock)) == 0
    try:
        with pytest.raises(ValueError, match="another run is at work"), State(out).locked():
            pass
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    for _ in range(100):  # until it has ended
        try:
            with State(out).locked():
                return
        except ValueError:
            time.sleep(0.05)
    pytest.fail("the lock outlives its holders")


def test_tasks_that_another_harness_did_are_done_again(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("minitron_kernels.evaluation")

    class OtherResultsError(ValueError):
        pass

    def evaluate(model, tasks, *, overwrite=False, **options):
        calls.append(overwrite)
        if not overwrite:
            raise OtherResultsError("holds results with versions of others")
        return types.SimpleNamespace(tasks={"toy": {"value": 1.0}})

    fake.evaluate, fake.OtherResultsError = evaluate, OtherResultsError
    monkeypatch.setitem(sys.modules, "minitron_kernels.evaluation", fake)
    names = ("tasks_path", "datasets", "batch_size", "dtype", "limit", "run_code")
    config = {"tasks": ["toy"], **dict.fromkeys(names)}
    context = stages.Context(tmp_path, print, quiet=True)
    assert stages._tasks(tmp_path, config, "cpu", tmp_path, context) == {"toy": {"value": 1.0}}
    assert calls == [False, True]
