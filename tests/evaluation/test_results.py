"""What is evaluated, tables and files: all that needs no lm-evaluation-harness."""

import importlib.util
import json
import os

import pytest

from evaluation import tiny
from evaluation.stub import index_of
from minitron_kernels.evaluation import (
    BENCHMARKS,
    PUBLISHED,
    Evaluation,
    OtherResultsError,
    evaluate,
    evaluation_table,
    harness,
    xlsum,
)
from minitron_kernels.evaluation.choice import Choice, check_known, of_folder, running_code, written
from minitron_kernels.evaluation.cli import main
from minitron_kernels.evaluation.contexts import ALLOW_CODE


def entry(name="hellaswag", value=50.0, stderr=0.5, **more):
    one = BENCHMARKS.get(name)
    about = {"title": one.title, "metric": one.label, "shots": one.shots} if one else {}
    count = one.documents if one else 9
    fixed = {"value": value, "stderr": stderr, "unit": "%", "documents": count, "of": count, "seconds": 1.0}
    return {**fixed, "warnings": [], "all": {}, "asked": name, **about, **more}


def test_the_nine_are_those_of_the_announcement():
    shots = {one.title.split()[0]: one.shots for one in BENCHMARKS.values()}
    assert shots == {
        **{"WinoGrande": 5, "ARC-Challenge": 25, "MMLU": 5, "HellaSwag": 10, "GSM8K": 5, "TruthfulQA": 0},
        **{"XLSum": 3, "MBPP": 0, "HumanEval": 0},
    }
    four = [row for row in PUBLISHED if row.source == "announcement"]
    assert [row.model for row in four] == [
        *("Llama 3.1 8B", "Gemma 7B", "Mistral-NeMo-Minitron 8B", "Mistral NeMo 12B")
    ]
    assert all(list(row.results) == list(BENCHMARKS) for row in four)
    best = {name: max((row.results[name], row.model) for row in four[:3])[1] for name in BENCHMARKS}
    assert set(best.values()) == {"Mistral-NeMo-Minitron 8B"}  # "leads on nine popular benchmarks"
    assert all(0 < value < 100 for row in PUBLISHED for value in row.results.values())


def test_names_and_shots():
    found = written(["arc_challenge", "truthfulqa_mc2", "mine", "mine::part:3", "hellaswag:0"])
    assert [(one.name, one.task, one.shots) for one in found] == [
        ("arc_challenge", "arc_challenge", 25),
        ("truthfulqa", "truthfulqa_mc2", 0),
        ("mine", "mine", None),
        ("mine::part", "mine::part", 3),
        ("hellaswag", "hellaswag", 0),
    ]
    mine = written(["truthfulqa"], {"truthfulqa": None})  # not lm-eval's, for which it is another name
    assert [(one.task, one.shots, one.benchmark.label) for one in mine] == [("truthfulqa", 0, "mc2")]
    for wrong in ([], ["a", "a:1"], ["truthfulqa", "truthfulqa_mc2"]):
        with pytest.raises(ValueError, match="tasks must be different names"):
            written(wrong)
    with pytest.raises(TypeError, match="tasks must be a list"):
        written("arc_challenge")


def test_tasks_of_a_folder_and_which_run_code():
    index = index_of(
        a={"task": "a"},
        b={"task": "b", "unsafe_code": True},
        inner={"group": "inner", "task": ["b"]},
        outer={"group": "outer", "task": [{"group": "inner"}, "a"]},
        c={"task": "c"},
    )
    assert of_folder(index) == ["outer", "c"]
    assert running_code(written(["outer", "c", "mbpp"]), index) == ["outer", "mbpp"]
    with pytest.raises(ValueError, match="no task 'outr' in here: did you mean outer"):
        check_known([Choice("outr", "outr", None, None)], list(index), "here")


def test_the_table():
    mine = Evaluation(
        "student",
        {
            "hellaswag": entry(),
            "ppl": entry("ppl", 12.345678, None, unit="", metric="ppl", shots=None, title="ppl"),
        },
    )
    other = Evaluation("teacher|x", {"hellaswag": entry(value=60.0), "mmlu": entry("mmlu", 70.0)})
    lines = evaluation_table([mine, other]).splitlines()
    assert lines[:4] == [
        "| model | MMLU 5-shot | HellaSwag 10-shot | ppl (ppl) |",
        "|---|---:|---:|---:|",
        "| student | – | 50.00 ± 0.50 | 12.35 |",
        "| teacher\\|x | 70.00 ± 0.50 | 60.00 ± 0.50 | – |",
    ]
    assert "| *Mistral-NeMo-Minitron 8B* | 69.51 | 83.03 | – |" in lines
    assert sum(line.startswith("| *") for line in lines) == 4 and "by another set-up" in lines[-1]
    assert "*" not in evaluation_table([mine], "none")
    assert "*Minitron 4B*" in evaluation_table([mine], "all")
    few = Evaluation("few", {"hellaswag": entry(shots=0), "mmlu": entry("mmlu", documents=3)})
    shown = evaluation_table([few])
    assert "| *Llama 3.1 8B* | 65.28 | – |" in shown  # other shots are not the announcement's
    assert "mmlu: 3 of 14,042): not comparable" in shown
    short = Evaluation("short", {"mmlu": entry("mmlu", documents=9, of=9), "gsm8k": entry("gsm8k")})
    assert "short: other documents than the benchmark's (mmlu: 9, not 14,042): not" in short.table()
    cut = Evaluation("cut", {"gsm8k": entry("gsm8k", warnings=["Left truncation applied. ..."])})
    assert "cut: prompts were cut off at the left to fit: gsm8k." in cut.table()
    with pytest.raises(ValueError, match="published must be one of"):
        mine.table("some")


def test_files(tmp_path):
    result = Evaluation("m", {"mmlu": entry("mmlu")}, {"limit": None}, {"torch": "2"}, ["mbpp"], "abc")
    result.save(tmp_path / "deep" / "a.json")
    assert Evaluation.load(tmp_path / "deep" / "a.json") == result
    assert (tmp_path / "deep" / "a.md").read_text().startswith("| model | MMLU 5-shot |")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.json", "a.md"]
    for text, message in (
        ("[", "is not JSON"),
        ("[]", "is not an evaluation"),
        ('{"format": 1}', "is not an eval"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=f"b.json: {message}"):
            Evaluation.load(tmp_path / "b.json")


def test_rows_that_were_evaluated_otherwise_say_so():
    same = {"limit": 3, "chat_template": False, "dtype": "auto"}
    first = Evaluation("one", {"mmlu": entry("mmlu")}, same, {"lm_eval": "0.4.13", "torch": "2"})
    chat = Evaluation("two", {"mmlu": entry("mmlu")}, {**same, "chat_template": True}, {"lm_eval": "0.4.14"})
    note = "two: evaluated otherwise than one: chat_template True, not False, lm_eval '0.4.14', not '0.4.13'."
    assert note in evaluation_table([first, chat]).splitlines()
    apart = Evaluation("three", {"gsm8k": entry("gsm8k")}, {**same, "chat_template": True})
    like = Evaluation("four", {"mmlu": entry("mmlu")}, {**same, "limit": None}, {"lm_eval": "0.4.13"})
    assert "otherwise" not in evaluation_table([first, apart, like])


def test_rows_on_other_files_say_so():
    settings = {"limit": None}
    rows = [
        Evaluation(name, {"mmlu": entry("mmlu", data=data)}, settings)
        for name, data in (("one", {"cais/mmlu": "1"}), ("two", {"cais/mmlu": "2"}), ("hub", {}))
    ]
    assert "two: evaluated otherwise than one: data of mmlu." in evaluation_table(rows[:2])
    assert "otherwise" not in evaluation_table([rows[0], rows[0], rows[2]])


def test_another_filter_is_another_metric():
    """Of gsm8k the strict match was published, and not what is found anywhere in the answer."""
    done = {"n-shot": {"gsm8k": 5}, "n-samples": {"gsm8k": {"original": 1319, "effective": 1319}}}
    loaded, found = harness.Loaded({"tasks": {"gsm8k": None}}), {}
    for name in ("strict-match", "flexible-extract", "none"):
        done["results"] = {"gsm8k": {f"exact_match,{name}": 0.5}}
        found[name] = harness.entries_of(written(["gsm8k"])[0], loaded, done)["gsm8k"]
    tables = {name: Evaluation("m", {"gsm8k": each}).table() for name, each in found.items()}
    assert "*Llama 3.1 8B*" in tables["strict-match"]
    for name in ("flexible-extract", "none"):
        assert found[name]["metric"] == f"exact_match,{name}" and "Llama" not in tables[name]


def test_an_interrupted_one_goes_on(stub, tmp_path):
    output, tasks = tmp_path / "out.json", ["a", "b", "c"]
    stub.interrupted = "c"
    with pytest.raises(KeyboardInterrupt):
        evaluate(stub.model, tasks, output=output, limit=3)
    assert set(Evaluation.load(output).tasks) == {"a", "b"}
    stub.interrupted = ""
    result = evaluate(stub.model, tasks, output=output, limit=3)
    assert stub.ran == tasks  # none twice
    assert {name: entry["value"] for name, entry in result.tasks.items()} == {"a": 1, "b": 2, "c": 3}
    differs = (
        r"holds results with settings {'limit': 3}, not {'limit': None}: .*overwrite"  # and nothing else
    )
    with pytest.raises(ValueError, match=differs):
        evaluate(stub.model, ["a"], output=output)
    assert evaluate(stub.model, ["a"], output=output, overwrite=True).tasks.keys() == {"a"}
    with pytest.raises(ValueError, match="holds a with 0 shots, not 2"):
        evaluate(stub.model, ["a:2"], output=output)


def test_another_model_is_another_result(stub, tmp_path):
    model, ran = stub.model, stub.ran
    output = model / "evaluation.json"  # results beside the weights are not part of the model
    evaluate(model, ["a"], output=output)
    evaluate(model, ["a"], output=output)
    assert ran == ["a"]
    tiny.save_model(model, seed=1)
    with pytest.raises(ValueError, match="holds results with fingerprint"):
        evaluate(model, ["a"], output=output)


def test_sizes_and_times_do_not_tell_models_apart(stub, tmp_path):
    """Two checkpoints of one shape, out of an archive that sets all times alike."""
    model, output = stub.model, tmp_path / "out.json"

    def unpacked(seed):
        tiny.save_model(model, seed=seed)
        for path in model.iterdir():
            os.utime(path, ns=(10**18, 10**18))

    unpacked(0)
    evaluate(model, ["a"], output=output)
    unpacked(0)  # the same again
    evaluate(model, ["a", "b"], output=output)
    assert stub.ran == ["a", "b"]
    unpacked(1)
    with pytest.raises(OtherResultsError, match="holds results with fingerprint"):
        evaluate(model, ["a"], output=output)


def test_a_tokenizer_that_is_given_counts(stub, tmp_path):
    from transformers import AutoTokenizer

    output, found = tmp_path / "out.json", [AutoTokenizer.from_pretrained(stub.model) for _ in range(3)]
    found[2].add_tokens(["w99"])
    for tokenizer in found[:2]:
        evaluate(stub.model, ["a"], tokenizer=tokenizer, output=output)
    assert stub.ran == ["a"]
    for other in (found[2], None):
        with pytest.raises(OtherResultsError, match=r"holds results with settings .*tokenizer"):
            evaluate(stub.model, ["a"], tokenizer=other, output=output)


def test_other_tokenizers_tasks_and_shots_are_other_results(stub, tmp_path):
    model, output = stub.model, tmp_path / "out.json"
    (tmp_path / "tasks" / "data").mkdir(parents=True)
    for name in ("a.yaml", "data/a.jsonl"):
        (tmp_path / "tasks" / name).write_text("1")
    how = dict(tasks_path=tmp_path / "tasks", output=output)
    evaluate(model, ["a"], **how)
    evaluate(model, ["a"], **how)
    assert stub.ran == ["a"]
    (tmp_path / "tasks" / "data" / "a.jsonl").write_text("2")
    with pytest.raises(OtherResultsError, match="holds results with settings"):
        evaluate(model, ["a"], **how)
    evaluate(model, ["a:0"], **how, overwrite=True)
    with pytest.raises(OtherResultsError, match="holds a with 0 shots, as was asked for, not with its own"):
        evaluate(model, ["a"], **how)
    (model / "spiece.model").write_text("1")
    with pytest.raises(OtherResultsError, match="holds results with fingerprint"):
        evaluate(model, ["a:0"], **how)


def test_shares_that_are_in_per_cent_already():
    """Of squadv2, f1 is one of 0 to 100."""
    done = {"n-shot": {"s": 0}, "n-samples": {"s": {"original": 4, "effective": 4}}}
    loaded, found = harness.Loaded({"tasks": {"s": None}}), {}
    for value in (0.25, 25.0):
        done["results"] = {"s": {"f1,none": value, "f1_stderr,none": value / 10}}
        found[value] = harness.entries_of(Choice("s", "s", None, None), loaded, done)["s"]
    assert [(one["value"], one["stderr"], one["unit"]) for one in found.values()] == [(25.0, 2.5, "%")] * 2
    # 0.9 % of a model that knows nothing is not 90 %: the metric's parts show what it is counted in
    done["results"] = {
        "s": {"f1,none": 0.9, "f1_stderr,none": 0.1, "HasAns_f1,none": 1.8, "acc_x,none": 50.0}
    }
    small = harness.entries_of(Choice("s", "s", None, None), loaded, done)["s"]
    assert (small["value"], small["stderr"]) == (0.9, 0.1)


def test_arguments(stub, tmp_path):
    model, ran = stub.model, stub.ran
    for options, message in (
        (dict(batch_size=0), "batch_size must be"),
        (dict(limit=True), "limit must be"),
        (dict(max_length=-1), "max_length must be"),
        (dict(tasks_path=tmp_path / "no"), "no such folder"),
        (dict(tasks_path=tmp_path / "model"), r"has no \.yaml files"),
        (dict(output=tmp_path / "no" / "a.json"), "no such folder to write"),
        (dict(output=tmp_path / "a.md"), "output must be a .json file"),
        (dict(device="mars"), "mars: cannot be used"),
        (dict(datasets=tmp_path / "no"), r"no such folder \(of data sets"),
        (dict(batch_size="auto"), 'batch_size must be a number on cpu: "auto" fills'),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            evaluate(model, ["a"], **options)
    with pytest.raises(OSError, match="no such folder"):
        evaluate(tmp_path / "nothing", ["a"])
    assert ran == []


def test_lm_eval_is_asked_for(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'lm_eval\[hf\]==.*minitron-kernels\[evaluate\]"):
        evaluate(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "error: evaluation needs lm-evaluation-harness" in capsys.readouterr().err


def test_the_command_without_a_model(tmp_path, capsys):
    Evaluation("teacher", {"mmlu": entry("mmlu")}).save(tmp_path / "a.json")
    assert main(["--beside", str(tmp_path / "a.json"), "--published", "none"]) == 0
    assert "| teacher | 50.00 ± 0.50 |" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "humaneval" in (out := capsys.readouterr().out) and out.count("runs code") == 2
    with pytest.raises(SystemExit):
        main([])
    (tmp_path / "b.json").write_text("{}")
    assert main(["--beside", str(tmp_path / "b.json")]) == 1
    assert "b.json: is not an evaluation" in capsys.readouterr().err


def test_the_command_says_options(stub, capsys):
    assert main([str(stub.model), "--tasks", "mbpp"]) == 1
    error = capsys.readouterr().err
    assert "--tasks: mbpp run code" in error and "--run-code" in error and "--no-code" in error
    assert "run_code" not in error


class Docs(list):
    def select(self, numbers):
        return [self[number] for number in numbers]


def test_xlsum_is_a_fifth(monkeypatch, tmp_path):
    assert xlsum.first_fifth(Docs(range(11))) == [0, 1, 2]
    monkeypatch.setattr(xlsum, "_scorer", lambda: None)
    (tmp_path / "csebuetnlp/xlsum").mkdir(parents=True)
    for folder, begin in ((tmp_path, "csebuetnlp/xlsum/english"), (None, "hf://datasets/csebuetnlp/xlsum@")):
        files = xlsum.config(folder)["dataset_kwargs"]["data_files"]
        assert set(files) == {"validation", "test"} and all(path.startswith(begin) for path in files.values())
    config = xlsum.config()
    assert json.dumps(config["dataset_kwargs"]).count("english") == 2 and config["num_fewshot"] == 3


def test_rouge(monkeypatch):
    pytest.importorskip("rouge_score", reason=f"needs {harness.PIP}")
    # the longest common subsequence has 3 of 4 and of 5 words: 2·(3/4)(3/5)/(3/4 + 3/5)
    assert xlsum.rougeL(["the cats sat down"], ["the cat quickly sat up"]) == pytest.approx(2 / 3)
    assert ALLOW_CODE == "HF_ALLOW_CODE_EVAL"
