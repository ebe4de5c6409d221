"""The nine benchmarks by which Mistral-NeMo-Minitron 8B was announced, and the results that were published.

Sources of tasks, shots and metrics: the announcement (developer.nvidia.com/blog, "Mistral-NeMo-Minitron 8B
Foundation Model Delivers Unparalleled Accuracy", August 2024); *Compact Language Models via Pruning and
Knowledge Distillation* (arXiv 2407.14679), section 4 and table 2, which names the metrics; *LLM Pruning and
Distillation in Practice* (arXiv 2408.11796), table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# of pass@1 in the papers: temperature 0.2, nucleus of 0.95; transformers would take the 50 likeliest tokens
_SAMPLED = {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 0}


@dataclass(frozen=True)
class Source:
    """What a benchmark takes from the Hugging Face hub.

    Args:
        repository: "owner/name".
        kind: "dataset", or "space": a program, of the library `evaluate`.
        revision: a branch; None: the repository's first one.
        files: a pattern of those that are needed; None: all.
        place: in a folder of data sets, where lm-eval looks; None: as the repository is called.
    """

    repository: str
    kind: str = "dataset"
    revision: str | None = None
    files: str | None = None
    place: str | None = None

    @property
    def path(self) -> str:
        """Where it is in a folder of data sets."""
        return self.place or self.repository

    def command(self, folder: str) -> str:
        """The command that brings it into a folder of data sets, where there is a network."""
        parts = ["hf download", self.repository, f"--repo-type {self.kind}"]
        parts += [f"--revision {self.revision}"] if self.revision else []
        parts += [f"--include '{self.files}'"] if self.files else []
        return " ".join([*parts, f"--local-dir {folder}/{self.path}"])


# runs code that a model wrote against the tests of a problem
_CODE_EVAL = Source("evaluate-metric/code_eval", "space", place="code_eval")


@dataclass(frozen=True)
class Benchmark:
    """One task of lm-evaluation-harness, as the announcement ran it.

    Args:
        name: by which a user asks for it.
        title: in tables.
        task: lm-eval's name of the task or group.
        shots: examples in the prompt.
        metric: the key of lm-eval's result, "metric,filter".
        label: the metric, as the papers name it.
        documents: how many there are.
        sources: what it takes from the hub.
        runs_code: whether it runs code that the model wrote.
        config: what is changed in lm-eval's configuration of the task; mappings are merged.
    """

    name: str
    title: str
    task: str
    shots: int
    metric: str
    label: str
    documents: int
    sources: tuple[Source, ...]
    runs_code: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            *("winogrande", "WinoGrande", "winogrande", 5, "acc,none", "acc", 1267),
            sources=(Source("allenai/winogrande"),),
        ),
        Benchmark(
            *("arc_challenge", "ARC-Challenge", "arc_challenge", 25, "acc_norm,none", "acc_norm", 1172),
            sources=(Source("allenai/ai2_arc"),),
        ),
        Benchmark(
            *("mmlu", "MMLU", "mmlu", 5, "acc,none", "acc", 14042),
            sources=(Source("cais/mmlu"),),
        ),
        Benchmark(
            *("hellaswag", "HellaSwag", "hellaswag", 10, "acc_norm,none", "acc_norm", 10042),
            sources=(Source("Rowan/hellaswag"),),
        ),
        Benchmark(
            *("gsm8k", "GSM8K", "gsm8k", 5, "exact_match,strict-match", "exact_match", 1319),
            sources=(Source("openai/gsm8k"),),
        ),
        Benchmark(
            *("truthfulqa", "TruthfulQA", "truthfulqa_mc2", 0, "acc,none", "mc2", 817),
            sources=(Source("truthfulqa/truthful_qa"),),
        ),
        Benchmark(
            *("xlsum_en", "XLSum en (20 %)", "xlsum_en", 3, "rougeL,none", "rougeL", 2307),
            sources=(Source("csebuetnlp/xlsum", revision="refs/convert/parquet", files="english/*"),),
        ),
        Benchmark(
            *("mbpp", "MBPP", "mbpp", 0, "pass_at_1,none", "pass@1", 500),
            sources=(Source("google-research-datasets/mbpp"), _CODE_EVAL),
            runs_code=True,
            config={"generation_kwargs": _SAMPLED},
        ),
        Benchmark(
            *("humaneval", "HumanEval", "humaneval", 0, "pass@1,create_test", "pass@1", 164),
            sources=(Source("openai/openai_humaneval"), _CODE_EVAL),
            runs_code=True,
            config={"generation_kwargs": _SAMPLED, "repeats": 20},
        ),
    )
}

ANNOUNCEMENT = "announcement"
TABLE_1 = "arXiv 2408.11796, table 1"
TABLE_2 = "arXiv 2407.14679, table 2"


@dataclass(frozen=True)
class Published:
    """The results of a model, in per cent.

    Args:
        model: its name.
        tokens: that it was trained on.
        source: where the results were published.
        results: {benchmark's name: per cent}.
    """

    model: str
    tokens: str
    source: str
    results: Mapping[str, float]


def _row(model: str, tokens: str, source: str, *results: float) -> Published:
    return Published(model, tokens, source, dict(zip(BENCHMARKS, results, strict=True)))


PUBLISHED: tuple[Published, ...] = (
    _row("Llama 3.1 8B", "15T", ANNOUNCEMENT, 77.27, 57.94, 65.28, 81.80, 48.60, 45.06, 30.05, 42.27, 24.76),
    _row("Gemma 7B", "6T", ANNOUNCEMENT, 78, 61, 64, 82, 50, 45, 17, 39, 32),
    _row(
        *("Mistral-NeMo-Minitron 8B", "380B", ANNOUNCEMENT),
        *(80.35, 64.42, 69.51, 83.03, 58.45, 47.56, 31.94, 43.77, 36.22),
    ),
    _row(
        *("Mistral NeMo 12B", "N/A", ANNOUNCEMENT),
        *(82.24, 65.10, 68.99, 85.16, 56.41, 49.79, 33.43, 42.63, 23.78),
    ),
    _row(
        *("Mistral NeMo 12B, fine-tuned on the data (teacher)", "+0.1T", TABLE_1),
        *(82.7, 62.3, 70.1, 85.3, 55.7, 48.3, 31.9, 47.9, 23.8),
    ),
    _row("Mistral 7B", "8T", TABLE_1, 78.5, 60.3, 64.1, 83.2, 37.0, 42.6, 4.8, 38.8, 28.7),
    _row("Minitron 4B", "94B", TABLE_1, 74.0, 50.9, 58.6, 75.0, 24.1, 42.9, 29.5, 28.2, 23.3),
    Published(
        *("Llama-3.1-Minitron 4B, depth", "94B", TABLE_1),
        dict(zip(BENCHMARKS, (72.1, 52.6, 58.7, 73.2, 16.8, 38.2, 27.2, 30.7), strict=False)),
    ),
    Published(
        *("Llama-3.1-Minitron 4B, width", "94B", TABLE_1),
        dict(zip(BENCHMARKS, (73.5, 55.6, 60.5, 76.1, 41.2, 42.9, 28.7, 32.4), strict=False)),
    ),
    _row("Nemotron-4 15B", "8T", TABLE_2, 83.6, 58.8, 66.6, 84.6, 48.5, 40.7, 32, 38, 35.4),
    _row("Minitron 8B", "94B", TABLE_2, 79.0, 52.6, 63.8, 80.7, 51.3, 42.6, 31.2, 35.2, 31.6),
)
