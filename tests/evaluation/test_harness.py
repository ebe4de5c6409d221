"""evaluate() by the real lm-evaluation-harness: numbers are those of a float64 oracle. Needs no network."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from documentation.snippets import ROOT, blocks, commands
from evaluation import tiny
from minitron_kernels.evaluation import Evaluation, check_installed, evaluate
from minitron_kernels.evaluation.benchmarks import BENCHMARKS
from minitron_kernels.evaluation.cli import main

pytestmark = tiny.needs_lm_eval


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(model's folder, tasks' folder, their documents); data sets are cached in a folder of this test's."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.save_model(folder / "model")
    data = tiny.save_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder / "model", folder / "tasks", data


def wanted(model, data, name, shots):
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return tiny.accuracies(*loaded, data[name], data["shots"][:shots])


def test_it_is_installed():
    check_installed()


def test_accuracies_are_those_by_hand(place):
    model, tasks, data = place
    result = evaluate(model, ["choice:2", "winogrande"], tasks_path=tasks, batch_size=3)
    entry, norm = result.tasks["choice"], wanted(model, data, "choice", 2)
    assert entry["value"] == pytest.approx(100 * norm["acc_norm"]) and entry["metric"] == "acc_norm"
    assert entry["all"]["acc,none"] == pytest.approx(norm["acc"])
    share = norm["acc_norm"]
    assert entry["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 6))
    assert (entry["shots"], entry["documents"], entry["of"], entry["unit"]) == (2, 7, 7, "%")
    other = result.tasks["winogrande"]  # by the announcement: acc, and five shots
    assert other["value"] == pytest.approx(100 * wanted(model, data, "winogrande", 5)["acc"])
    assert (other["metric"], other["shots"]) == ("acc", 5)
    assert "| *Mistral-NeMo-Minitron 8B* | 80.35 | – |" in result.table()


def test_a_folder_has_each_of_the_nine_by_its_name(place, tmp_path):
    """Also the one for whose name lm-eval has another: not its task, with data of the hub's, in its place."""
    model, _, data = place
    tiny.save_tasks(tmp_path)
    for name in ("choice", "winogrande", "both"):
        (tmp_path / f"{name}.yaml").unlink()
    few = data["shots"][:5]
    names = [one.name for one in BENCHMARKS.values() if not one.runs_code and one.shots <= len(few)]
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(tiny.CHOICE.format(name=name, data="choice"))
    result = evaluate(model, tasks_path=tmp_path)
    assert sorted(result.tasks) == sorted(names)
    for name, entry in result.tasks.items():
        assert entry["shots"] == BENCHMARKS[name].shots, name
    assert result.tasks["truthfulqa"]["all"]["acc,none"] == pytest.approx(
        wanted(model, data, "choice", 0)["acc"]
    )


def test_the_shots_matter(place):
    """Else the test above would pass with none."""
    model, tasks, data = place
    found = {
        shots: evaluate(model, [f"choice:{shots}"], tasks_path=tasks).tasks["choice"]["all"]
        for shots in range(4)
    }
    for shots, entry in found.items():
        want = wanted(model, data, "choice", shots)
        assert {name: entry[f"{name},none"] for name in want} == pytest.approx(want)
    assert len({(entry["acc,none"], entry["acc_norm,none"]) for entry in found.values()}) > 1


def test_a_group_has_the_mean_of_its_documents(place):
    model, tasks, data = place
    result = evaluate(
        model, tasks_path=tasks
    )  # all of the folder: the group, whose members do not count again
    assert list(result.tasks) == ["both"]
    parts = [(len(data[name]), wanted(model, data, name, 0)["acc"]) for name in ("choice", "winogrande")]
    mean = sum(count * acc for count, acc in parts) / sum(count for count, _ in parts)
    assert result.tasks["both"]["value"] == pytest.approx(100 * mean)
    assert (result.tasks["both"]["documents"], result.tasks["both"]["shots"]) == (11, 0)


def test_the_page_as_it_is_printed(place, tmp_path, monkeypatch, capsys):
    """Its folder, named as there: relative to the working folder, which stays what it is."""
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    facts = next(block for block in blocks(page) if block.language == "yaml")
    row = next(block.lines for block in blocks(page) if block.lines[0].startswith("{"))
    (command,) = [words for words in commands(page) if "--tasks-path" in words]
    (tmp_path / "student").symlink_to(place[0])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "facts.yaml").write_text("\n".join(facts.lines))
    asked = json.loads(row[0])
    write = {"test": [asked], "shots": [asked | {"question": f"What do {n} bees make?"} for n in (2, 3, 4)]}
    for name, rows in write.items():
        tiny.write_jsonl(tmp_path / "tasks" / "facts" / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    assert main(command[1:]) == 0
    assert "facts (acc) 3-shot" in capsys.readouterr().out
    assert Path.cwd() == tmp_path and Evaluation.load("student.json").tasks["facts"]["documents"] == 1


def test_written_answers(place, tmp_path):
    model, _, _ = place
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    rows = [{"question": doc["question"]} for doc in tiny.docs(5, 40)]
    for row in rows:
        row["answer"] = tiny.greedy(*loaded, row["question"], 3)
    rows = [row for row in rows if not {"w59", "</s>", "<pad>"} & set(row["answer"].split())][:4]
    rows[2]["answer"] = "w1"
    tiny.write_jsonl(tmp_path / "data" / "write.jsonl", rows)
    (tmp_path / "write.yaml").write_text(tiny.WRITE)
    entry = evaluate(model, tasks_path=tmp_path).tasks["write"]
    assert (entry["value"], entry["metric"]) == (75.0, "exact_match")


def test_a_log_has_no_bars(place, tmp_path, capfd):
    """Not even of perplexities, for which lm-eval shows one a document."""
    model, _, data = place
    tiny.write_jsonl(tmp_path / "data" / "choice.jsonl", data["choice"])
    (tmp_path / "rolling.yaml").write_text(tiny.ROLLING)
    capfd.readouterr()
    entry = evaluate(model, tasks_path=tmp_path, progress=True).tasks["rolling"]
    assert entry["metric"] == "word_perplexity" and math.isfinite(entry["value"])
    err = capfd.readouterr().err
    assert "rolling: word_perplexity" in err and "%|" not in err and "requests" not in err


def test_a_model_in_memory_is_left_as_it_was(place):
    model, tasks, _ = place
    from_disk = evaluate(model, ["choice"], tasks_path=tasks).tasks["choice"]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    loaded.train()
    loaded.get_input_embeddings().eval()  # frozen
    modes = [module.training for module in loaded.modules()]
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = evaluate(loaded, ["choice"], tokenizer=tokenizer, tasks_path=tasks).tasks["choice"]
    assert found["all"] == from_disk["all"]
    assert [module.training for module in loaded.modules()] == modes
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()
    with pytest.raises(TypeError, match="tokenizer must be given"):
        evaluate(loaded, ["choice"], tasks_path=tasks)


def test_a_limit_is_said(place):
    model, tasks, data = place
    result = evaluate(model, ["choice"], tasks_path=tasks, limit=3)
    assert result.tasks["choice"]["documents"] == 3
    assert "not comparable" in result.table() and "choice: 3 of 7" in result.table()
    few = {"choice": data["choice"][:3], "shots": data["shots"]}
    assert result.tasks["choice"]["all"]["acc,none"] == pytest.approx(wanted(model, few, "choice", 0)["acc"])


def test_code_is_not_run_unless_allowed(place, tmp_path):
    model, _, _ = place
    tiny.save_tasks(tmp_path)
    (tmp_path / "coding.yaml").write_text(tiny.CODE.format(name="coding", data="choice"))
    with pytest.raises(ValueError, match=r"coding run code that the model wrote.*run_code=True"):
        evaluate(model, tasks_path=tmp_path)
    with pytest.warns(UserWarning, match="coding are left out"):
        result = evaluate(model, tasks_path=tmp_path, run_code=False)
    assert list(result.tasks) == ["both"] and result.left_out == ["coding"]
    assert "left out, as they run code: coding" in result.table()
    assert "coding" in evaluate(model, ["coding"], tasks_path=tmp_path, run_code=True).tasks


def test_what_is_not_there(place, tmp_path):
    model, _, _ = place
    with pytest.raises(ValueError, match=r"no task 'hellaswagg' in lm_eval .*did you mean hellaswag"):
        evaluate(model, ["hellaswagg"])
    (tmp_path / "lost.yaml").write_text(tiny.CHOICE.format(name="lost", data="nowhere"))
    with pytest.raises(ValueError, match=r"lost cannot be loaded.*data/.*jsonl.*begin at tasks_path"):
        evaluate(model, tasks_path=tmp_path)
    with pytest.raises(ValueError, match=r"hellaswag cannot be loaded.*without a network"):
        evaluate(model, ["hellaswag"])


def test_the_command(place, tmp_path, capsys):
    model, tasks, _ = place
    out = tmp_path / "results.json"
    command = [str(model), "-o", str(out), "--tasks-path", str(tasks), "--tasks", "choice:2"]
    assert main(command) == 0
    shown = capsys.readouterr()
    value = json.loads(out.read_text())["tasks"]["choice"]["value"]
    assert f"| {value:.2f} ±" in shown.out and shown.out == out.with_suffix(".md").read_text()
    assert "choice: acc_norm" in shown.err and "winogrande" not in shown.err
    assert main([*command, "winogrande"]) == 0  # goes on: the first is not run again
    shown = capsys.readouterr()
    assert "winogrande: acc" in shown.err and "choice: acc_norm" not in shown.err
    assert set(Evaluation.load(out).tasks) == {"choice", "winogrande"}
    assert main([str(model), "--tasks", "hellaswagg"]) == 1
    assert capsys.readouterr().err.startswith(
        "minitron-evaluate: error: --tasks: there is no task 'hellaswagg'"
    )
