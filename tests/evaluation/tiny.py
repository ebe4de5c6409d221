"""A tiny model with a tokenizer, tasks in a folder, and lm-eval's numbers by hand: what its tests share."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from minitron_kernels.evaluation.harness import PIP

WORDS = [f"w{number}" for number in range(60)]
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=f"needs {PIP}")


def save_model(folder: Path, seed: int = 0) -> None:
    """A Llama of two layers with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.5,  # so that answers differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)


CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: data/shots.jsonl
    test: data/{data}.jsonl
output_type: multiple_choice
test_split: test
fewshot_split: train
fewshot_config:
  sampler: first_n
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
WRITE = """\
task: write
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/write.jsonl
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["w59"]
  max_gen_toks: 3
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/choice.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""
GROUP = """\
group: both
task: [choice, winogrande]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1.0
"""
CODE = CHOICE.replace("task: {name}", "task: {name}\nunsafe_code: true")


def docs(seed: int, count: int) -> list[dict]:
    """Questions of three words with answers of one to three."""
    drawn = torch.randint(0, 58, (count, 4, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        {
            "question": " ".join(WORDS[word] for word in rows[0]),
            "choices": [" ".join(WORDS[word] for word in rows[1 + n][: n + 1]) for n in range(3)],
            "answer": number % 3,
        }
        for number, rows in enumerate(drawn)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_tasks(folder: Path) -> dict[str, list[dict]]:
    """choice, winogrande (another task of choice) and both (a group of the two); returns their documents."""
    data = {"shots": docs(1, 6), "choice": docs(2, 7), "winogrande": docs(3, 4)}
    for name, rows in data.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", rows)
    for name in ("choice", "winogrande"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, data=name))
    (folder / "both.yaml").write_text(GROUP)
    return data


def accuracies(model, tokenizer, data: list[dict], shots: list[dict]) -> dict[str, float]:
    """acc and acc_norm in [0, 1], from log-probabilities in float64 of one answer after the other."""
    model = model.double()
    right = {"acc": [], "acc_norm": []}
    for doc in data:
        prompt = " ".join(f"{shot['question']} {shot['choices'][shot['answer']]}" for shot in shots)
        context = tokenizer(f"{prompt} {doc['question']}".strip())["input_ids"]
        found = []
        for choice in doc["choices"]:
            answer = tokenizer(choice)["input_ids"]
            ids = torch.tensor([context + answer])
            with torch.no_grad():
                logits = model(ids).logits[0].double()
            total = 0.0
            for place, token in enumerate(answer, len(context)):
                row = logits[place - 1]
                total += float(row[token] - torch.logsumexp(row, 0))
            found.append((total, total / len(choice)))
        for name, which in (("acc", 0), ("acc_norm", 1)):
            best = max(range(len(found)), key=lambda number: found[number][which])
            right[name].append(float(best == doc["answer"]))
    return {name: sum(values) / len(values) for name, values in right.items()}


def greedy(model, tokenizer, question: str, count: int) -> str:
    """The `count` words that the model goes on with, the most probable each time."""
    ids = tokenizer(question)["input_ids"]
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return " ".join(tokenizer.convert_ids_to_tokens(ids[begin:]))
