"""Data sets in a folder, what is lacking, and how answers are written, without lm-evaluation-harness."""

import sys
from types import SimpleNamespace

import pytest

from minitron_kernels.evaluation import OtherResultsError, check_tasks, evaluate
from minitron_kernels.evaluation.cli import main
from minitron_kernels.evaluation.contexts import plain_generation
from minitron_kernels.evaluation.local_data import Places


def data_sets(folder, **texts):
    """Data sets as OWNER/NAME."""
    for name, text in texts.items():
        (folder / "of" / name / ".cache").mkdir(parents=True, exist_ok=True)
        (folder / "of" / name / "rows.jsonl").write_text(text)
    return folder


def test_other_files_are_other_results(stub, tmp_path):
    model, output, folder = stub.model, tmp_path / "out.json", data_sets(tmp_path / "sets", a="1")
    how = dict(datasets=folder, output=output)
    assert set(evaluate(model, ["a"], **how).tasks["a"]["data"]) == {"of/a"}
    data_sets(folder, b="1")  # what comes later, and what a download keeps, changes nothing
    (folder / "of/a/.cache/times").write_text("2")
    evaluate(model, ["a", "b"], **how)
    assert stub.ran == ["a", "b"]
    data_sets(folder, a="2")
    with pytest.raises(OtherResultsError, match="output holds a with other files in of/a: take another"):
        evaluate(model, ["a", "b"], **how)
    evaluate(model, ["a", "b"], **how, overwrite=True)
    assert stub.ran == ["a", "b", "a", "b"]


def test_all_that_is_lacking_is_named(stub, capsys):
    stub.lost = ("gsm8k", "mbpp")
    with pytest.raises(ValueError, match=r"gsm8k, mbpp cannot be loaded .* no network; bring the data"):
        evaluate(stub.model, ["a", "gsm8k", "mbpp"], run_code=True)
    found = check_tasks(["a", "gsm8k", "mbpp"])
    assert [(one.name, one.documents, one.reason) for one in found] == [
        ("a", 5, None),
        *((name, None, "ConnectionError: no network") for name in stub.lost),
    ]
    fetched = "hf download {} --repo-type {} --local-dir DIR/{}"
    assert found[2].commands == (
        fetched.format(*["google-research-datasets/mbpp", "dataset", "google-research-datasets/mbpp"]),
        fetched.format("evaluate-metric/code_eval", "space", "code_eval"),
    )
    assert main(["--check", "--tasks", "a", "gsm8k"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:3]] == ["task", "a", "gsm8k"]
    assert shown[-1] == fetched.format("openai/gsm8k", "dataset", "openai/gsm8k")
    stub.lost = ()
    assert main(["--check", "--tasks", "a", "winogrande"]) == 0
    assert capsys.readouterr().out.endswith("5  not the benchmark's 1,267: not comparable\n")


def test_what_is_made_of_many_data_sets_has_a_name_that_fits(tmp_path, monkeypatch):
    """Groups of lm-eval have dozens, and a file's name at most 255 bytes."""
    config = SimpleNamespace(HF_DATASETS_CACHE=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(config=config))
    data, found = {f"of/{number}": f"{number:016x}" for number in range(30)}, set()
    for digests in (data, data | {"of/7": "f" * 16}, {"of/7": "0" * 16}, data):
        with Places(datasets=tmp_path).reading(False, digests):
            config.HF_DATASETS_CACHE.mkdir(parents=True, exist_ok=True)
            found.add(config.HF_DATASETS_CACHE)
    assert len(found) == 3 and tmp_path / "cache" == config.HF_DATASETS_CACHE


def test_tasks_say_how_answers_are_written():
    from transformers import GenerationConfig

    mine = GenerationConfig(repetition_penalty=1.2, max_new_tokens=3, top_k=7, eos_token_id=[1, 2])
    model = SimpleNamespace(generation_config=mine)
    with plain_generation(model) as ignored:
        assert ignored == {"repetition_penalty": 1.2, "max_new_tokens": 3}
        now = model.generation_config.to_diff_dict()
        assert now.pop("eos_token_id") == [1, 2] and not set(now) & {"repetition_penalty", "top_k"}
    assert model.generation_config is mine
    with plain_generation(SimpleNamespace()) as ignored:
        assert ignored == {}
