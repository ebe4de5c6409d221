"""A run of train: DistillationTrainer with the command's progress, record, signals and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from minitron_kernels._command.progress import Progress
from minitron_kernels.distillation.cli.data import Shuffled, collate
from minitron_kernels.distillation.cli.interrupt import Interrupt
from minitron_kernels.distillation.cli.job import Job, rank
from minitron_kernels.distillation.cli.models import Models
from minitron_kernels.distillation.cli.record import RunRecord, keep_last, mark_complete
from minitron_kernels.distillation.trainers.hf import DistillationTrainer
from minitron_kernels.distillation.trainers.hf_fsdp import (
    check_shardable,
    layer_classes,
    shard_student,
    shard_teacher,
    whole_state,
)

_PRECISION = "ACCELERATE_MIXED_PRECISION"
_UNFINISHED = ".model-"  # begins the name of a folder in which a model is written
_SHOWN = {"loss": "loss", "kl": "kl", "tokens_per_second": "tokens/s"}


def arguments_of(
    config: Mapping[str, Any],
    job: Job,
    device: str,
    *,
    resumes: bool,
    has_experts: bool,
    sharded: list[str] | None = None,
) -> TrainingArguments:
    """TrainingArguments as configured.

    Args:
        config: of train.
        job: how much.
        device: "cpu" or "cuda".
        resumes: whether the run goes on from a checkpoint.
        has_experts: whether parameters may have no gradient.
        sharded: the classes of the layers that FSDP2 shards one by one; None: DDP.
    """
    autocast = config["autocast"]
    schedules: dict[str, tuple[str, dict[str, float]]] = {
        "cosine": ("cosine_with_min_lr", {"min_lr": config["lr_min"]}),
        "linear": ("polynomial", {"lr_end": config["lr_min"], "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
    }
    schedule, of_schedule = schedules[config["lr_schedule"]]
    return TrainingArguments(
        output_dir=config["out"],
        max_steps=job.steps,
        per_device_train_batch_size=config["batch_size"],
        per_device_eval_batch_size=config["batch_size"],
        gradient_accumulation_steps=config["accumulation"],
        learning_rate=config["lr"],
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=of_schedule,
        warmup_steps=config["warmup"],
        weight_decay=config["weight_decay"],
        adam_beta1=config["beta1"],
        adam_beta2=config["beta2"],
        max_grad_norm=config["max_grad_norm"],
        seed=config["seed"],
        bf16=autocast == "bfloat16" or (autocast == "auto" and device == "cuda"),
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and job.processes > 1 else None,
        ddp_find_unused_parameters=has_experts if job.processes > 1 else None,
        **(_checkpointing() if config["gradient_checkpointing"] else {}),
        **(_sharding(sharded) if sharded is not None else {}),
        save_strategy="steps",
        save_steps=config["save_every"],
        logging_steps=config["log_every"],
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would replace what must be seen
        eval_strategy="steps" if config["eval_data"] else "no",
        eval_steps=config["eval_every"] or job.steps,
        eval_on_start=bool(config["eval_data"]) and not resumes,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",  # Shuffled has the order
        dataloader_pin_memory=device == "cuda",
    )


def _checkpointing() -> dict[str, Any]:
    """Arguments for gradient checkpointing, which transformers 5 renames."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in names else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def _sharding(layers: list[str]) -> dict[str, Any]:
    """Arguments for FSDP2. Gradients are summed into the shards after each micro-batch: else each process
    would hold all of them, whole, until the last one."""
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers},
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }


class Watch(TrainerCallback):
    """Progress, record, checkpoints' marks and the stop between two steps."""

    def __init__(self, record: RunRecord, interrupt: Interrupt, job: Job, *, keep: int, quiet: bool) -> None:
        self._record, self._interrupt, self._job, self._quiet = record, interrupt, job, quiet
        self._keep = keep
        self._progress: Progress | None = None
        self._group: Any = None
        self.stopped_by: int | None = None
        self.saved: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Shows the first step."""
        if self._job.processes > 1:
            # signals reach processes at different steps; they must stop at the same one
            self._group = dist.new_group(backend="gloo")
        quiet = self._quiet or not state.is_world_process_zero
        self._progress = Progress("distilling", self._job.steps, done=state.global_step, quiet=quiet)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Counts the step; stops after it, with a checkpoint, if a signal came."""
        assert self._progress is not None
        # the last losses, whatever log_every is; and none is saved that was not looked at
        control.should_log |= control.should_save or state.global_step >= self._job.steps
        self._progress.advance(more_comes=control.should_log)
        number = self._interrupt.number or 0
        if self._group is not None:
            shared = torch.tensor(number)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
            number = int(shared)
        if number and state.global_step < self._job.steps:
            self.stopped_by = number
            control.should_log = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Shows and keeps what was logged; stops at a loss that is not a number."""
        logs = logs or {}
        if self._progress is not None:
            self._progress.show({_SHOWN[name]: logs[name] for name in _SHOWN if name in logs})
        self._record.update(step=state.global_step, log=state.log_history)
        for name, what in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            if not math.isfinite(value := logs.get(name, 0.0)):
                raise ValueError(
                    f"the {what} is {value} at step {state.global_step}: take a lower --lr or a longer "
                    "--warmup; checkpoints of earlier steps are kept"
                )

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Marks the checkpoint, all of whose files are written; only then earlier ones go."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._group is not None:
            dist.barrier(group=self._group)
        if state.is_world_process_zero:
            mark_complete(folder)
            keep_last(folder.parent, self._keep)
        self.saved = folder
        self._record.update(step=state.global_step, log=state.log_history)

    def close(self) -> None:
        """Ends the bar."""
        if self._progress is not None:
            self._progress.close()


@contextlib.contextmanager
def _precision_of_its_own() -> Iterator[None]:
    """accelerate's variable for mixed precision, which `accelerate launch` sets, is not looked at, and is
    afterwards as it was: the run's configuration says what it computes in."""
    before = os.environ.pop(_PRECISION, None)
    try:
        yield
    finally:
        os.environ.pop(_PRECISION, None)
        if before is not None:
            os.environ[_PRECISION] = before


def run(
    config: Mapping[str, Any],
    job: Job,
    device: str,
    models: Models,
    data: tuple[Any, Any],
    record: RunRecord,
    interrupt: Interrupt,
    checkpoint: Path | None,
) -> tuple[Any, Watch]:
    """Trains from a checkpoint of this run, or from the beginning.

    Args:
        config: of train.
        job: how much.
        device: "cpu" or "cuda".
        models: student, teacher, loss, and the weights of empty models.
        data: windows for training, and held-out ones or None.
        record: to be kept up to date.
        interrupt: entered while it trains.
        checkpoint: to go on from.

    Returns:
        The student, and what happened.
    """
    student, teacher, loss = models[:3]
    train_data, eval_data = data
    # an expert that got no token has no gradient, which DDP must be prepared for
    has_experts = any(getattr(student.config, name, None) for name in ("num_experts", "num_local_experts"))
    watch = Watch(record, interrupt, job, keep=config["keep"], quiet=config["quiet"])
    sharded = None
    if config["fsdp"]:
        check_shardable(student)
        sharded = layer_classes(student)
    with _precision_of_its_own():
        resumes = checkpoint is not None
        arguments = arguments_of(
            config, job, device, resumes=resumes, has_experts=has_experts, sharded=sharded
        )
        if config["fsdp"] and isinstance(teacher, nn.Module):
            shard_teacher(teacher, arguments.device)  # asking for the device joins the processes
            if models.teacher_weights is not None:
                models.teacher_weights.fill(teacher, arguments.device)
        trainer = DistillationTrainer(
            student,
            arguments,
            teacher=teacher,
            loss=loss,
            train_dataset=Shuffled(train_data, job.steps * job.per_step, config["seed"]),
            eval_dataset=eval_data,
            data_collator=collate,
            callbacks=[watch],
        )
        if models.student_weights is not None:
            shard_student(trainer)
            models.student_weights.fill(trainer.model, arguments.device)
    trainer.remove_callback(PrinterCallback)
    try:
        with interrupt:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        watch.close()
    return trainer.accelerator.unwrap_model(trainer.model), watch


def save(student: Any, tokenizer: Any, config: Mapping[str, Any], dtype: Any) -> None:
    """Writes the model and its tokenizer into the run's folder, on the first process; all call.

    They are made in a hidden folder there: a full disk leaves no half of a model. One that a killed process
    left is removed.
    """
    state = whole_state(student, dtype) if config["fsdp"] else None
    if rank() == 0:
        if state is None:
            student.to(dtype)
        out = Path(config["out"])
        for left in out.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=out) as made:
            student.save_pretrained(made, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            for path in sorted(Path(made).iterdir()):
                if path.is_dir():  # of chat templates
                    shutil.rmtree(out / path.name, ignore_errors=True)
                os.replace(path, out / path.name)


def name_of(number: int) -> str:
    """A signal's name."""
    return signal.Signals(number).name
