"""The nine benchmarks' data sets, small and made up, with the columns and the folders that the hub's have."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

SUBJECTS = 57
WORDS = ["apple", "bread", "chair", "dance", "eagle", "flute", "grape", "house", "island", "jelly", "kettle"]
WORDS += ["lemon", "mango", "night", "ocean"]
# as those that the hub's program has: predictions of each problem, and a program that tests them
CODE_EVAL = """
import os
import subprocess
import sys

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features(features))

    def _compute(self, predictions, references, k=(1,), num_workers=4, timeout=3.0):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("not allowed")
        shares = []
        for candidates, test in zip(predictions, references):
            programs = [candidate + "\\n" + test for candidate in candidates]
            passed = [subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
                      for program in programs]
            shares.append(sum(passed) / len(passed))
        return {"pass@1": sum(shares) / len(shares)}, {}
"""


def _words(number: int, count: int) -> str:
    return " ".join(WORDS[(7 * number + 3 * place + number * place) % len(WORDS)] for place in range(count))


def write(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]], place: str = "{}") -> None:
    """Parquet files, and a README that tells configurations and splits, as repositories of the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / place.format(config) / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
            lines += [f"  - split: {split}", f"    path: {place.format(config)}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def winogrande() -> dict[str, list[dict[str, Any]]]:
    def row(number: int) -> dict[str, Any]:
        one, two = WORDS[number % 15], WORDS[(number + 4) % 15]
        sentence = f"The {one} met the {two} since _ was {_words(number, 2)} {number}."
        return {"sentence": sentence, "option1": one, "option2": two, "answer": str(1 + number % 2)}

    return {"train": [row(n) for n in range(100, 108)], "validation": [row(n) for n in range(5)]}


def arc(first: int = 0) -> dict[str, list[dict[str, Any]]]:
    def row(number: int) -> dict[str, Any]:
        text = [_words(number + place, 1 + place) for place in range(4)]
        label = list("1234") if number % 5 == 4 else list("ABCD")
        choices = {"text": text, "label": label}
        question = f"What is {_words(number, 3)} {number}?"
        return {"id": str(number), "question": question, "choices": choices, "answerKey": label[number % 4]}

    numbers = {"train": range(100, 128), "validation": range(200, 203), "test": range(6)}
    return {split: [row(first + n) for n in each] for split, each in numbers.items()}


def mmlu(subject: int) -> dict[str, list[dict[str, Any]]]:
    def row(number: int) -> dict[str, Any]:
        choices = [_words(number + place, 2) for place in range(4)]
        return {
            "question": f" Is {_words(number, 2)} {number}?",
            "subject": "s",
            "choices": choices,
            "answer": number % 4,
        }

    begin = 1000 * subject
    numbers = {"test": range(2 + subject % 2), "validation": range(300, 302), "dev": range(100, 105)}
    return {split: [row(begin + n) for n in each] for split, each in numbers.items()}


def hellaswag() -> dict[str, list[dict[str, Any]]]:
    def row(number: int, label: str) -> dict[str, Any]:
        ends = [f"{_words(number + place, 1 + place)} [step] ends." for place in range(4)]
        a, b = f"[header] A man {_words(number, 2)} [title] {number}.", f"he {_words(number, 1)}"
        fixed = {"ind": number, "activity_label": "Sport", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}"}
        more = {"source_id": f"s{number}", "split": "x", "split_type": "indomain", "label": label}
        return {**fixed, "endings": ends, **more}

    return {
        "train": [row(n, str(n % 4)) for n in range(100, 113)],
        "test": [row(n, "") for n in range(200, 203)],
        "validation": [row(n, str(n % 4)) for n in range(5)],
    }


def gsm8k() -> dict[str, list[dict[str, Any]]]:
    def row(number: int) -> dict[str, Any]:
        answer = f"It is {number}+1=<<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1:,}"
        return {"question": f"How many {_words(number, 2)} are {number} and one?", "answer": answer}

    return {"train": [row(n) for n in range(1100, 1107)], "test": [row(n) for n in range(1500, 1505)]}


def truthfulqa() -> list[dict[str, Any]]:
    def row(number: int) -> dict[str, Any]:
        choices = [_words(number + place, 1 + place) for place in range(3 + number)]
        labels = [1 if place <= number % 2 else 0 for place in range(len(choices))]
        one = {"choices": choices[:2], "labels": [1, 0]}
        return {"question": f"Why {_words(number, 3)} {number}?", "mc1_targets": one,
                "mc2_targets": {"choices": choices, "labels": labels}}  # fmt: skip

    return [row(number) for number in range(4)]


def xlsum() -> dict[str, list[dict[str, Any]]]:
    def row(number: int) -> dict[str, Any]:
        fixed = {"id": str(number), "url": "u", "title": _words(number, 2)}
        return {**fixed, "summary": f"{_words(number, 5)}.", "text": f"{_words(number, 9)} {number}."}

    return {"validation": [row(n) for n in range(100, 120)], "test": [row(n) for n in range(11)]}


def mbpp() -> list[dict[str, Any]]:
    def row(number: int) -> dict[str, Any]:
        tests = [f"assert add{number}({n}) == {n + number}" for n in range(3)]
        fixed = {"task_id": number, "text": f"Write a function that adds {number}.", "test_setup_code": ""}
        code = f"def add{number}(x):\r\n  return x + {number}"
        return {**fixed, "code": code, "test_list": tests, "challenge_test_list": []}

    return [row(number) for number in range(11, 15)]


def humaneval() -> list[dict[str, Any]]:
    def row(number: int) -> dict[str, Any]:
        prompt = f'def times{number}(x):\n    """Multiplies by {number}."""\n'
        test = f"def check(candidate):\n    assert candidate(3) == {3 * number}\n"
        fixed = {"task_id": f"HumanEval/{number}", "prompt": prompt, "test": test}
        return {**fixed, "canonical_solution": f"    return x * {number}\n", "entry_point": f"times{number}"}

    return [row(number) for number in range(5, 8)]


def subjects() -> list[str]:
    """MMLU's, as lm-eval has them."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    found = sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))
    assert len(found) == SUBJECTS
    return found


def save(folder: Path) -> None:
    """All nine, and what runs code, as OWNER/NAME."""
    write(folder / "allenai/winogrande", {"winogrande_xs": arc(), "winogrande_xl": winogrande()})
    write(folder / "allenai/ai2_arc", {"ARC-Easy": arc(5000), "ARC-Challenge": arc()})
    write(folder / "cais/mmlu", {name: mmlu(number) for number, name in enumerate(subjects())})
    write(folder / "Rowan/hellaswag", {"default": hellaswag()}, "data")
    write(folder / "openai/gsm8k", {"main": gsm8k(), "socratic": arc()})
    truth = {"generation": {"validation": arc()["test"]}, "multiple_choice": {"validation": truthfulqa()}}
    write(folder / "truthfulqa/truthful_qa", truth)
    write(folder / "google-research-datasets/mbpp", {"full": {"train": mbpp(), "test": mbpp()}})
    write(folder / "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval()}})
    for split, rows in xlsum().items():
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "csebuetnlp/xlsum/english" / split / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    (folder / "code_eval").mkdir()
    (folder / "code_eval" / "code_eval.py").write_text(CODE_EVAL)


@contextlib.contextmanager
def recorded():
    """{task: its samples}: what lm-eval asked, and got."""
    import lm_eval

    found, evaluate_by_lm_eval = {}, lm_eval.evaluate

    def recording(**options):
        done = evaluate_by_lm_eval(**{**options, "log_samples": True})
        found.update(done["samples"])
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "evaluate", recording)
        yield found
