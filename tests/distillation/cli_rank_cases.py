"""Runs of `minitron-distill train --fsdp` on two processes; test_cli_ranks.py looks at what they leave."""

import contextlib
import io
import os
import signal
from unittest import mock

import torch.distributed as dist

from distillation.cli_runs import run, train_of
from minitron_kernels._command.progress import Progress
from minitron_kernels.distillation.cli import training
from minitron_kernels.distillation.trainers import hf_loading

STEPS = 4
HELD_OUT = ("held.jsonl", "--eval-every", 2)


def options(folder, *more):
    """Of both processes together four windows a step, as train_of() has of one."""
    own = ["--fsdp", "--batch-size", 1, "--steps", STEPS, "--save-every", 2, "--no-picture"]
    return [*own, "--eval-data", folder / HELD_OUT[0], *HELD_OUT[1:], *more]


@contextlib.contextmanager
def loaded_whole():
    """Each process loads both models as it does where they cannot be read by shards."""
    why = hf_loading.NotByShardsError("a test wants it so")
    with mock.patch.object(hf_loading, "empty_model", side_effect=why) as asked:
        yield
    assert asked.call_count == 2


@contextlib.contextmanager
def trainers():
    """Keeps the trainers that the command makes."""
    found = []

    class Kept(training.DistillationTrainer):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            found.append(self)

    with mock.patch.object(training, "DistillationTrainer", Kept):
        yield found


def local_elements(model):
    """Of this process; all parameters are sharded, but for a while after a forward."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    return sum(p.to_local().numel() for p in model.parameters())


def trained(place):
    """From the beginning to the end; the dry run said what each process holds."""
    folder = place.parent
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run(*train_of(folder, place / "out", *options(folder), "--dry-run")) == 0
    with trainers() as made:
        assert run(*train_of(folder, place / "out", *options(folder))) == 0
    held = {"student": local_elements(made[0].model), "teacher": local_elements(made[0].teacher.model)}
    if dist.get_rank() > 0:
        assert said.getvalue() == ""
        return
    for name, elements in held.items():
        wanted = f"{elements * 4 / 1024:.4g} KiB  {name}'s weights, its shard\n"
        assert wanted in said.getvalue(), (wanted, said.getvalue())


def stopped(place):
    """A signal comes to one process alone; then the run goes on to its end, its models loaded another way."""
    advance = Progress.advance

    def counted(self, steps=1, *figures, **more):
        advance(self, steps, *figures, **more)
        if self._done == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    folder, out = place.parent, place / "out"
    with loaded_whole(), mock.patch.object(Progress, "advance", counted):
        assert run(*train_of(folder, out, *options(folder))) == 143
    assert (out / "checkpoint-3" / "complete").exists() and not (out / "model.safetensors").exists()
    assert run("train", "--resume", "-o", out) == 0


def tied(place):
    """A tied head, a learned map of hidden states, layers made twice, another dtype of the result."""
    folder = place.parent
    terms = ["--hidden-layers", "0:0", "1:2", "--hidden-weight", 0.5, "--gradient-checkpointing"]
    how = ["--student", folder / "tied", "--steps", 2, "--save-dtype", "bfloat16"]
    assert run(*train_of(folder, place / "out", *options(folder), *terms, *how)) == 0
    with loaded_whole():
        assert run(*train_of(folder, place / "whole", *options(folder), *terms, *how)) == 0


def one_row(place):
    """Experts, and parameters of one row, which the second process has none of; both processes know them."""
    folder = place.parent
    how = ["--fsdp", "--batch-size", 1, "--student", folder / "experts", "--steps", 2, "--no-picture"]
    with trainers() as made:
        assert run(*train_of(folder, place / "out", *how)) == 0
    groups = made[0].optimizer.param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in made[0].model.parameters()}
    with loaded_whole():
        assert run(*train_of(folder, place / "whole", *how)) == 0


CASES = {"trained": trained, "stopped": stopped, "tied": tied, "one_row": one_row}
