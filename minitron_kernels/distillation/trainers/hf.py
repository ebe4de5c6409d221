"""DistillationTrainer: transformers.Trainer for a student that learns from a teacher.

The student is called through its wrapper, with the loss inside its forward pass, so that DDP, FSDP2,
autocast and torch.compile see one module that returns a loss. No logits are made, neither in training nor in
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from minitron_kernels.distillation.causal_lm import attach
from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.signals import TeacherSignal
from minitron_kernels.distillation.stepping import step
from minitron_kernels.distillation.targets import count_targets
from minitron_kernels.distillation.teacher import ModelTeacher, Teacher
from minitron_kernels.distillation.trainers.hf_batches import without_repeats
from minitron_kernels.distillation.trainers.hf_checks import (
    can_be_moved,
    check_arguments,
    check_models,
    check_options,
    check_setup,
)
from minitron_kernels.distillation.trainers.hf_fsdp import parameters_of, prepare_fsdp, tied_names
from minitron_kernels.distillation.trainers.hf_metrics import Sums, Window
from minitron_kernels.distillation.trainers.hf_state import add_to_student, load_loss, save_loss


class DistillationTrainer(Trainer):
    """A transformers.Trainer whose loss is DistillationLoss between the model and a teacher.

        trainer = DistillationTrainer(
            student, teacher=teacher, loss=DistillationLoss(ce_weight=0.1), args=TrainingArguments(...),
            train_dataset=..., data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train()

    The loss of an optimizer step is the sum over the tokens of all its micro-batches, divided by their
    number: its gradient is that of one big batch. Which tokens count: see step(); a label at the first token
    of a sequence is no position's target and does not. With `average_tokens_across_devices` (the default of
    TrainingArguments) they are counted over all processes; without it, each process divides by its own count,
    and gradients are averaged over processes.

    Logged beside Trainer's own, each over the tokens of all steps, micro-batches and processes since the
    last time: `kl` (at the loss's temperature), `ce`, `entropy` (of the student), `hidden` and
    `hidden_weight` (where the loss has such a term), `tokens_per_second` (tokens that count, of all
    processes; without evaluation and saving) and `teacher_share` (of that time, what the teacher took).
    Nothing is read from a GPU between logging steps.

    evaluate() gives `eval_loss`, `eval_kl`, `eval_ce`, `eval_entropy`, `eval_tokens` and `eval_perplexity` =
    exp(mean −log p(label)), over all tokens of all batches and processes. Samples that a distributed sampler
    repeats to fill the last batch are left out, where the dataset has a length.

    The parameters of the loss (the map of hidden states), where it has some, are trained as a submodule of
    the student, which its state_dict() leaves out; checkpoints keep them in `distillation_loss.pt`, and what
    the loss remembers between steps in a file of each process. Resuming restores both.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; as in Trainer.
        args: TrainingArguments. Under `bf16` the teacher runs in autocast too.
        teacher: a causal language model, which becomes a ModelTeacher and is moved to the student's device;
            or any Teacher, such as CachedTeacher. It gets the student's batches, without labels.
        loss: a DistillationLoss; by default forward KL alone.
        options: the other arguments of Trainer by name: train_dataset, eval_dataset, data_collator, ...

    Raises:
        TypeError, ValueError: at construction, what would be ignored or is not known: the message says what.
            At the first step, what step() refuses.

    Source: Minitron (arXiv 2407.14679) section 3. Trainer: huggingface/transformers.
    """

    # compute_loss() divides by the tokens of all micro-batches, and Trainer must not divide again
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        teacher: Teacher | nn.Module,
        loss: DistillationLoss | None = None,
        **options: Any,
    ) -> None:
        loss = DistillationLoss() if loss is None else loss
        check_options(model, teacher, loss, options)
        if args is not None:
            check_arguments(args)
        self.distillation_loss = loss
        self.teacher: Teacher = ModelTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self._tokenizer = options.get("processing_class")
        self._sharded_before: list[list[Any]] | None = None
        if model is not None:
            self._take(model)
        super().__init__(model=model, args=args, **options)
        self.model_accepts_loss_kwargs = True  # for versions that do not know loss_is_scaled_for_ga
        check_setup(self)
        loss.to(self.args.device)
        if isinstance(teacher, nn.Module) and can_be_moved(teacher, self.args):
            self._move_model_to_device(teacher, self.args.device)
        self._training = Window(self.args.device)
        self._evaluation = Sums(self.args.device)

    def _take(self, model: Any) -> None:
        """Checks a student, and lets it hand over its signal and train the loss's parameters."""
        attach(model)
        check_models(model, self.teacher, self.distillation_loss, self._tokenizer)
        add_to_student(model, self.distillation_loss)

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; FSDP2 on CPUs too, and with the loss and the sums of gradients in fp32."""
        super().create_accelerator_and_postprocess()
        prepare_fsdp(self)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; of a student that is sharded already its parameters are kept in mind."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._sharded_before = parameters_of(optimizer)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, which has just prepared the optimizer: it gets the parameters that it had."""
        if self._sharded_before is not None and self.optimizer is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._sharded_before, strict=True):
                group["params"] = parameters
            self._sharded_before = None
        return super().create_scheduler(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """The model that `model_init` makes, ready for distillation."""
        model = super().call_model_init(trial)
        self._take(model)
        return model

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The number of targets in the micro-batches of a step; of all processes, if args say so."""
        if not batch_samples:
            return None
        ignore_index = self.distillation_loss.options["ignore_index"]
        total = sum(count_targets(batch, ignore_index).to(device) for batch in batch_samples)
        assert isinstance(total, Tensor)
        if self._averages_tokens:
            total = self.accelerator.reduce(total, reduction="sum")
        return total

    @property
    def _averages_tokens(self) -> bool:
        return bool(self.args.average_tokens_across_devices) and self.accelerator.num_processes > 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its tokens' sum over `num_items_in_batch`, or their mean without it.

        With return_outputs also the DistillationRecord, which has no logits.
        """
        record = self._distil(model, inputs, num_items_in_batch)
        if model.training:
            self._training.sums.add(record, num_items_in_batch)
        loss = record.loss
        if self._averages_tokens and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, record) if return_outputs else loss

    def _distil(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None
    ) -> DistillationRecord:
        loss = self.distillation_loss.train(model.training)
        return step(model, self._timed_teacher, inputs, loss, num_items=num_items)

    def _timed_teacher(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> TeacherSignal:
        with self._training.teacher_timed(), torch.no_grad(), self.accelerator.autocast():
            return self.teacher(batch, layers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; what an earlier run did not log is not logged by this one."""
        self._training = Window(self.args.device)
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; the clock of the logs runs from the first one."""
        self._training.start()
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the loss's parts beside `loss`; where that is logged, all processes call."""
        if "loss" in logs and self._training.sums:
            logs.update(self._training.close(self.accelerator))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """The loss of a batch; its parts are summed for evaluate(). There are no logits."""
        inputs = self._prepare_inputs(inputs)
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            raise ValueError(
                f"batches to evaluate on must have labels, got {', '.join(sorted(inputs))}: take a collator "
                "that makes them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        ignore_index = self.distillation_loss.options["ignore_index"]
        inputs = without_repeats(inputs, self.accelerator, self.args.per_device_eval_batch_size, ignore_index)
        with torch.no_grad(), self.compute_loss_context_manager():
            record = self._distil(model, inputs, None)
        self._evaluation.add(record, None)
        return record.loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in Trainer, with metrics that are means over tokens."""
        self._evaluation = Sums(self.args.device)
        with self._training.paused(), _generators_as_before(self.args.device):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            means = self._evaluation.means(self.accelerator)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would return logits, which are not made."""
        raise RuntimeError(
            "predict() returns logits, which DistillationTrainer does not make: use evaluate(dataset), or "
            "transformers.Trainer(model=...).predict(dataset)"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student as in Trainer; in a checkpoint also the parameters of the loss."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            save_loss(self.distillation_loss, output_dir, self.args.process_index, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in Trainer; of a sharded model a tied weight is written once, as of a plain one."""
        if state_dict is not None and self.model is not None and self.is_fsdp_enabled:
            again = tied_names(self.model)
            state_dict = {name: x for name, x in state_dict.items() if name not in again}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._training.paused():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_loss(self.distillation_loss, resume_from_checkpoint, self.args.process_index)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        load_loss(self.distillation_loss, self.state.best_model_checkpoint, self.args.process_index)


def _generators_as_before(device: torch.device) -> AbstractContextManager[None]:
    """torch's generators go on as if nothing had been drawn: how often is evaluated changes no dropout."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
