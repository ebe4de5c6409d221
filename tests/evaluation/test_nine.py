"""The nine benchmarks as lm-eval has them, on made-up data sets, against computations of other code."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation import letters, nine, tiny
from minitron_kernels.evaluation import BENCHMARKS, evaluate
from minitron_kernels.evaluation.cli import main

pytestmark = tiny.needs_lm_eval
COIN = ["    return x * 6\n", "    return x + 6\n"]
CHOICES = ("winogrande", "arc_challenge", "hellaswag", "truthfulqa", "mmlu")


@pytest.fixture(scope="module")
def choices(place):
    """(the evaluation of the five that choose between answers, its samples)."""
    model, datasets = place
    with nine.recorded() as samples:
        return evaluate(model, CHOICES, datasets=datasets, batch_size=4), samples


def logprob(model, tokenizer, prompt, answer):
    """log p(answer | prompt) in float64; one token is put at the beginning of a text."""
    whole, begin = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([whole[:-1]])).logits[0].double(), -1)
    assert whole.count(letters.BOS) == 1 and whole[0] == letters.BOS
    return float(sum(rows[place - 1, whole[place]] for place in range(begin, len(whole))))


@pytest.fixture(scope="module")
def found(place, choices):
    """{task: [(document, its prompts, its answers, their log-probabilities)]}."""
    model = AutoModelForCausalLM.from_pretrained(place[0]).double()
    tokenizer = AutoTokenizer.from_pretrained(place[0])
    everything = {}
    for task, samples in choices[1].items():
        everything[task] = []
        for sample in samples:
            prompts, answers = zip(*sample["arguments"], strict=True)
            found = [logprob(model, tokenizer, *pair) for pair in zip(prompts, answers, strict=True)]
            everything[task].append((sample["doc"], prompts, answers, found))
    return everything


def best(values):
    return max(range(len(values)), key=lambda number: values[number])


def check(entry, right, metric):
    share = sum(right) / len(right)
    deviation = math.sqrt(sum((one - share) ** 2 for one in right) / (len(right) - 1))
    assert entry["value"] == pytest.approx(100 * share, abs=1e-4)
    assert entry["stderr"] == pytest.approx(100 * deviation / math.sqrt(len(right)), abs=1e-4)
    assert (entry["metric"], entry["documents"], entry["of"]) == (metric, len(right), len(right))


def test_winogrande(choices, found):
    rows = nine.winogrande()
    shots = {row["sentence"].replace("_", row[f"option{row['answer']}"]) for row in rows["train"]}
    right = []
    assert len(found["winogrande"]) == 5
    for (doc, prompts, answers, values), row in zip(found["winogrande"], rows["validation"], strict=True):
        before, behind = row["sentence"].split("_")
        assert answers == (behind, behind) and doc["sentence"] == row["sentence"]
        for number, prompt in enumerate(prompts, 1):
            *given, last = prompt.split("\n\n")
            assert last == before + row[f"option{number}"]
            assert len(given) == len(set(given)) == 5 and set(given) <= shots
        right.append(best(values) == int(row["answer"]) - 1)
    check(choices[0].tasks["winogrande"], right, "acc")


def test_arc_challenge(choices, found):
    rows = nine.arc()

    def wanted(row):
        return row["choices"]["label"].index(row["answerKey"])

    shots = {
        f"Question: {row['question']}\nAnswer: {row['choices']['text'][wanted(row)]}" for row in rows["train"]
    }
    by_length, plain = [], []
    for (_, prompts, answers, values), row in zip(found["arc_challenge"], rows["test"], strict=True):
        *given, last = prompts[0].split("\n\n")
        assert last == f"Question: {row['question']}\nAnswer:" and len(set(prompts)) == 1
        assert len(set(given)) == 25 and set(given) <= shots
        assert list(answers) == [f" {text}" for text in row["choices"]["text"]]
        plain.append(best(values) == wanted(row))
        by_length.append(
            best([value / (len(text) - 1) for value, text in zip(values, answers, strict=True)])
            == wanted(row)
        )
    assert plain != by_length
    check(choices[0].tasks["arc_challenge"], by_length, "acc_norm")


def test_mmlu(choices, found):
    right = []
    for number, subject in enumerate(nine.subjects()):
        rows = nine.mmlu(number)

        def asked(row):
            given = "\n".join(
                f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True)
            )
            return f"{row['question'].strip()}\n{given}\nAnswer:"

        shots = "\n\n".join(f"{asked(row)} {'ABCD'[row['answer']]}" for row in rows["dev"])
        about = "The following are multiple choice questions (with answers) about "
        about += f"{subject.replace('_', ' ')}.\n\n"
        for (_, prompts, answers, values), row in zip(found[f"mmlu_{subject}"], rows["test"], strict=True):
            assert set(prompts) == {f"{about}{shots}\n\n{asked(row)}"}
            assert answers == (" A", " B", " C", " D")
            right.append(best(values) == row["answer"])
    entry = choices[0].tasks["mmlu"]
    assert entry["value"] == pytest.approx(100 * sum(right) / len(right))  # of all documents, not of subjects
    assert (entry["shots"], entry["documents"], entry["metric"]) == (5, len(right), "acc")


def test_hellaswag(choices, found):
    rows = nine.hellaswag()

    def tidy(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    def asked(row):
        return tidy(f"Sport: {row['ctx_a']} {row['ctx_b'].capitalize()}")

    shots = {f"{asked(row)} {tidy(row['endings'][int(row['label'])])}" for row in rows["train"]}
    right = []
    for (_, prompts, answers, values), row in zip(found["hellaswag"], rows["validation"], strict=True):
        *given, last = prompts[0].split("\n\n")
        assert last == asked(row) and len(set(given)) == 10 and set(given) <= shots
        by_length = [value / (len(text) - 1) for value, text in zip(values, answers, strict=True)]
        right.append(best(by_length) == int(row["label"]))
    check(choices[0].tasks["hellaswag"], right, "acc_norm")


def test_truthfulqa(choices, found):
    masses = []
    for (_, prompts, _, values), row in zip(found["truthfulqa_mc2"], nine.truthfulqa(), strict=True):
        assert prompts[0].endswith(f"\n\nQ: {row['question']}\nA:")
        assert prompts[0].count("Q: ") == 7  # six are part of the task, and no shots
        odds = [math.exp(value) for value in values]
        labels = row["mc2_targets"]["labels"]
        masses.append(sum(one for one, label in zip(odds, labels, strict=True) if label) / sum(odds))
    check(choices[0].tasks["truthfulqa"], masses, "mc2")


def table():
    """({prompt: what is written}, {task: what each document is worth}) of the four that write."""
    answers, worth = {}, {}
    texts = [" It is so. #### 1,501", " #### 9", " The answer is 1503"]
    texts += [" So.\n\nQuestion: why\nAnswer: #### 1504", " One\n\ntwo #### 1505 or #### 3"]
    for row, text in zip(nine.gsm8k()["test"], texts, strict=True):
        answers[f"Question: {row['question']}\nAnswer:"] = [text]
    worth["gsm8k"] = [1, 0, 0, 0, 1]  # the third lacks the marks, the fourth is cut off before them
    rows = nine.xlsum()["test"][:3]
    words = rows[1]["summary"].split()
    texts = [
        f" {rows[0]['summary']}",
        f" {words[0]} nothing {words[2]}",
        f" {rows[2]['summary']}\nAnd so on.",
    ]
    for row, text in zip(rows, texts, strict=True):
        answers[f"Article: {row['text']}\nSummary:"] = [text]
    worth["xlsum_en"] = [1.0, 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5), 1.0]  # 2 words, of 3 and of 5
    texts = ["def add11(x):\n  return x + 11\n", "def add12(x):\n  return x\n"]
    texts += ["def add13(x):\n  return 13 + x\n[DONE]\nraise ValueError", "def add14(x) return"]
    for row, text in zip(nine.mbpp(), texts, strict=True):
        answers[f"{row['test_list'][2]}\n[BEGIN]\n"] = [text]
    worth["mbpp"] = [1, 0, 1, 0]
    several = [["    return x * 5\n"], COIN, ["    return 7 * x\n\nprint(1 / 0)"]]
    for row, texts in zip(nine.humaneval(), several, strict=True):
        answers[row["prompt"]] = texts
    worth["humaneval"] = [1, None, 1]  # of the second, some
    return answers, worth


@pytest.fixture
def written(place, asked, monkeypatch):
    """(the evaluation of the four that write, samples, options of each generation)."""
    model, options = letters.Parrot(table()[0]), []
    generate = model.generate

    def recording(**given):
        options.append(given)
        return generate(**given)

    monkeypatch.setattr(model, "generate", recording)
    model.generation_config.repetition_penalty = 1.5  # of a checkpoint's generation_config.json
    model.generation_config.max_new_tokens = 3
    with pytest.warns(UserWarning, match=r"generation_config.json is not followed: .*repetition_penalty"):
        result = evaluate(
            model,
            ["gsm8k", "xlsum_en", "mbpp", "humaneval"],
            tokenizer=letters.tokenizer(),
            datasets=place[1],
            run_code=True,
            batch_size=7,
        )
    assert model.generation_config.repetition_penalty == 1.5
    return result, asked, options


def test_those_that_write(written):
    result, samples, options = written
    worth = table()[1]
    for name, metric in (("gsm8k", "exact_match"), ("xlsum_en", "rougeL"), ("mbpp", "pass@1")):
        check(result.tasks[name], worth[name], metric)
    coin = samples["humaneval"][1]["resps"][0]
    assert len(coin) == 20 and set(coin) == set(COIN)
    worth["humaneval"][1] = sum("*" in text for text in coin) / 20
    check(result.tasks["humaneval"], worth["humaneval"], "pass@1")
    assert [result.tasks[name]["shots"] for name in worth] == [5, 3, 0, 0]
    prompt = samples["gsm8k"][0]["arguments"][0][0]
    given = re.findall(r"are (\d+) and one\?\nAnswer: It is", prompt)
    assert len(set(given)) == 5 and all(1100 <= int(number) < 1107 for number in given)
    prompt = samples["xlsum_en"][0]["arguments"][0][0]
    given = re.findall(r"(\d+)\.\nSummary: \w", prompt)
    assert len(set(given)) == 3 and all(100 <= int(number) < 120 for number in given)
    assert samples["mbpp"][0]["arguments"][0][0].count("[BEGIN]") == 1
    assert [text for (text,) in samples["gsm8k"][3]["resps"]] == [" So.\n\n"]  # cut off
    assert samples["humaneval"][2]["resps"][0][0] == "    return 7 * x\n"
    ways = {
        tuple(given.get(name) for name in ("do_sample", "temperature", "top_p", "top_k")) for given in options
    }
    assert ways == {(False, None, None, None), (True, 0.2, 0.95, 0)}
    assert not any("repetition_penalty" in given for given in options)


def test_the_command_runs_all_nine(place, tmp_path, capsys):
    model, datasets = place
    command = [str(model), "-o", str(tmp_path / "out.json"), "--datasets", str(datasets), "--limit", "1"]
    assert main(command) == 1
    assert "--run-code" in capsys.readouterr().err
    assert main([*command, "--run-code", "--batch-size", "20"]) == 0
    shown = capsys.readouterr().out
    entries = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert list(entries) == list(BENCHMARKS)
    for name, one in BENCHMARKS.items():
        entry = entries[name]
        assert (entry["metric"], entry["shots"]) == (one.label, one.shots) and one.metric in entry["all"]
        assert set(entry["data"]) == {source.path for source in one.sources}
        assert entry["warnings"] == []
    assert "| *Llama 3.1 8B* | 77.27 | 57.94 | 65.28 | 81.8 | 48.6 | 45.06 | 30.05 | 42.27 | 24.76 |" in shown
    assert "not comparable" in shown and "mmlu: 57 of " in shown and "gsm8k: 5, not 1,319" in shown


def test_no_prompt_shows_its_own_answer(place, asked):
    """HumanEval has only the documents that are evaluated."""
    model = letters.Parrot(table()[0])
    evaluate(model, ["humaneval:2"], tokenizer=letters.tokenizer(), datasets=place[1], run_code=True)
    assert len(asked["humaneval"]) == 3
    for sample, row in zip(asked["humaneval"], nine.humaneval(), strict=True):
        prompt = sample["arguments"][0][0]
        assert prompt.count(f"def {row['entry_point']}(") == 1 and prompt.endswith(row["prompt"])
        assert prompt.count("def check(") == 2
    with pytest.raises(ValueError, match="humaneval has 3 examples in humaneval, too few for 3 shots"):
        evaluate(model, ["humaneval:3"], tokenizer=letters.tokenizer(), datasets=place[1], run_code=True)


def test_log_probabilities_are_not_rounded_to_bf16(place, asked, tmp_path):
    """8 bits of a sum near -100 are steps of a half, by which answers tie."""
    letters.save(tmp_path, dtype=torch.bfloat16)
    evaluate(tmp_path, ["hellaswag"], datasets=place[1])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for sample in asked["hellaswag"]:
        for (prompt, answer), ((value, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            assert value == pytest.approx(logprob(model, tokenizer, prompt, answer), abs=1e-3)


def test_batches_do_not_matter(place):
    model, datasets = place
    values = [
        evaluate(model, ["hellaswag", "gsm8k:2"], datasets=datasets, batch_size=size, limit=2).tasks
        for size in (1, 5)
    ]
    for name in ("hellaswag", "gsm8k"):
        assert values[0][name]["all"] == values[1][name]["all"]
