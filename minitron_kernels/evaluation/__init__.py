"""Benchmarks of a model by lm-evaluation-harness, beside what was published of Minitron's models."""

from minitron_kernels.evaluation.benchmarks import BENCHMARKS, PUBLISHED, Benchmark, Source
from minitron_kernels.evaluation.harness import check_installed
from minitron_kernels.evaluation.loading import Availability, check_tasks
from minitron_kernels.evaluation.results import Evaluation, OtherResultsError, evaluation_table
from minitron_kernels.evaluation.run import evaluate

__all__ = [
    "BENCHMARKS",
    "PUBLISHED",
    "Availability",
    "Benchmark",
    "Evaluation",
    "OtherResultsError",
    "Source",
    "check_installed",
    "check_tasks",
    "evaluate",
    "evaluation_table",
]
