"""Lightning: DistillationModule, a LightningModule that distils a student, with Lightning's own options.

    module = DistillationModule(student, ModelTeacher(teacher), DistillationLoss(ce_weight=0.1),
                                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4))
    Trainer(accumulate_grad_batches=8, gradient_clip_val=1.0, precision="bf16-mixed").fit(module, batches)

Lightning divides each micro-batch's loss by their number and DDP by the number of ranks, whatever the batches
hold. Here each micro-batch's gradient is that of the *sum* over its tokens, and before clipping and the
optimizer's step the whole window's is divided by the tokens of all its micro-batches on all ranks: the
gradient is that of one big batch, also in the shorter last window of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        "DistillationModule needs Lightning: pip install 'lightning>=2.5' ("
        "the package lightning, not pytorch_lightning alone)"
    ) from error

from minitron_kernels.distillation.causal_lm import attach
from minitron_kernels.distillation.loss import DistillationLoss, DistillationRecord
from minitron_kernels.distillation.stepping import step
from minitron_kernels.distillation.teacher import Teacher

_LOGGED = ("loss", "kl", "ce", "entropy", "hidden")


class DistillationModule(LightningModule):
    """Distils `student` from `teacher`; batches are mappings as Hugging Face's collators make them.

    The student's and the loss's parameters (a learned map of hidden states) are trained and saved; the
    teacher is in neither the state_dict nor the optimizer, and is moved to the device when a fit begins.

    Args:
        student: a causal language model of transformers, or a PEFT model around it. It is given to attach().
        teacher: a Teacher, such as ModelTeacher(model).
        loss: a DistillationLoss.
        optimizer: the parameters that require grad -> an optimizer, or what else configure_optimizers() may
            return with one optimizer in it, such as {"optimizer": ..., "lr_scheduler": ...}.

    Logged at every optimizer step as means over the tokens of the whole step: train/loss, train/kl, train/ce
    (with labels), train/entropy, train/hidden (the hidden-state term) and train/num_tokens. In validation
    val/... over all of its tokens, and val/perplexity with labels.

    Runs on one device or by DDP; another strategy is refused. So is a trainer with several optimizers.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        loss: DistillationLoss,
        *,
        optimizer: Callable[[list[nn.Parameter]], Any],
    ) -> None:
        super().__init__()
        self.student = loss.attach_map(attach(student))
        self.loss = loss
        # not a submodule, even if it is an nn.Module
        object.__setattr__(self, "teacher", teacher)
        self._make_optimizer = optimizer
        self._window: dict[str, Tensor] = {}
        self._validation: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        """What the `optimizer` argument makes of the parameters that require grad."""
        return self._make_optimizer([p for p in self.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        """Refuses what would divide wrongly, and moves the teacher."""
        self._check_and_move()
        if len(self.trainer.optimizers) != 1:
            raise ValueError(
                f"DistillationModule trains with one optimizer, got {len(self.trainer.optimizers)}: "
                "put the parameters into groups of one optimizer"
            )

    def on_validation_start(self) -> None:
        """The same for validation without a fit."""
        self._check_and_move()

    def _check_and_move(self) -> None:
        strategy = self.trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy must be a single device or DDP for DistillationModule, got "
                f"{type(strategy).__name__}: whether it averages gradients, and when, is not known here. "
                "For FSDP2 and DeepSpeed use trainers.hf.DistillationTrainer, or step() in a loop"
            )
        for model in (self.teacher, getattr(self.teacher, "model", None)):
            if isinstance(model, nn.Module):
                model.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Begins a window of micro-batches."""
        self._window = {}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The sum over the micro-batch's tokens."""
        record = step(self.student, self.teacher, batch, self.loss, num_items=1.0)
        _add(self._window, record)
        return record.loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Divides the window's gradient by its tokens; Lightning clips after this."""
        totals, ranks = self._over_ranks(self._window)
        items = totals.pop("num_tokens")
        # what Lightning has divided by: the micro-batches of a full window, and the ranks
        factor = self.trainer.accumulate_grad_batches * ranks / items.clamp(min=1)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            grad.mul_(factor.to(grad.dtype) if grad.dtype == torch.float64 else factor.float())
        self._log("train/", totals, items)
        self.log("train/num_tokens", items.float())
        self._window = {}

    def on_validation_epoch_start(self) -> None:
        """Begins the sums over all batches."""
        self._validation = {}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Adds a batch to the sums."""
        _add(self._validation, step(self.student, self.teacher, batch, self.loss, num_items=1.0))

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all tokens of all ranks, and the perplexity."""
        totals, _ = self._over_ranks(self._validation)
        items = totals.pop("num_tokens")
        self._log("val/", totals, items)
        if "label_logprob" in totals:
            mean = totals["label_logprob"] / items.clamp(min=1)
            self.log("val/perplexity", (-mean).exp().float(), sync_dist=True)
        self._validation = {}

    def _log(self, prefix: str, totals: dict[str, Tensor], items: Tensor) -> None:
        for name in _LOGGED:
            if name not in totals:
                continue
            mean = (totals[name] / items.clamp(min=1)).float()
            # the same on all ranks already; without sync_dist Lightning warns of epochs
            self.log(prefix + name, mean, prog_bar=name == "loss", sync_dist=prefix == "val/")

    def _over_ranks(self, sums: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The sums over all ranks, by one collective, and the number of ranks."""
        ranks = self.trainer.world_size
        if ranks == 1:
            return dict(sums), 1
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, values.unbind(), strict=True)), ranks


def _add(sums: dict[str, Tensor], record: DistillationRecord) -> None:
    """Adds a micro-batch's sums over tokens, on its device, in float64: counts pass 2^24."""
    values = {name: getattr(record, name) for name in (*_LOGGED, "label_logprob", "num_tokens")}
    for name, value in values.items():
        if value is not None:
            value = value.detach().double()
            sums[name] = sums[name] + value if name in sums else value
