"""TRL's distillation trainers with this library's loss: use_in_trl().

TRL's DistillationTrainer takes its divergence from a private function of its module, and the experimental
GKDTrainer from a static method. While use_in_trl() is active both names stand for the functions below, which
take the same arguments and return the same; the versions of TRL for which this is tested are listed, and
another one is refused.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from minitron_kernels.ops.kl_loss.op import kl_loss, linear_kl_loss

TRL_VERSIONS = ("1.16.0",)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    *,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's `_chunked_divergence_loss` by linear_kl_loss().

    Args:
        student_hidden_states: [B, K, H], those that predict the completion's K tokens.
        teacher_hidden_states: [B, K, Ht].
        student_lm_head_weight: [V, H]; a DTensor is taken apart by its placements, see linear_kl_loss().
        teacher_lm_head_weight: [V, Ht].
        completion_mask: [B, K], 0 where a token does not count.
        beta: 0 forward KL, 1 reverse KL, else generalised JSD.
        num_items_in_batch: what the sum over tokens is divided by; None: the tokens that count here.
        student_lm_head_bias: [V]; likewise `teacher_lm_head_bias`.
        teacher_lm_head_bias: see `student_lm_head_bias`.
        student_logit_scale: multiplies the logits; likewise `teacher_logit_scale`.
        teacher_logit_scale: see `student_logit_scale`.
        student_final_logit_softcapping: c of c·tanh(z/c), after the scale; likewise the teacher's.
        teacher_final_logit_softcapping: see `student_final_logit_softcapping`.
        temperature: divides the logits of both, after scale and softcap; no τ² in the loss.

    Returns:
        (loss, sum of the student's entropies at `temperature` in nats, number of tokens that count); the
        latter two without gradients.

    Raises:
        TypeError, ValueError: as linear_kl_loss().
    """
    # divided into scale and softcap, (c/τ)·tanh((s/τ) z/(c/τ)): the entropy is then that at the temperature
    scales = [scale / temperature for scale in (student_logit_scale, teacher_logit_scale)]
    softcaps = [
        None if cap is None else cap / temperature
        for cap in (student_final_logit_softcapping, teacher_final_logit_softcapping)
    ]
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.detach().to(student_hidden_states.device)
    record: Any = linear_kl_loss(
        student_hidden_states,
        student_lm_head_weight,
        teacher_hidden_states.detach(),
        teacher_lm_head_weight,
        student_bias=student_lm_head_bias,
        teacher_bias=teacher_lm_head_bias,
        mask=completion_mask != 0,
        divergence=float(beta),
        student_logit_scale=scales[0],
        teacher_logit_scale=scales[1],
        student_softcap=softcaps[0],
        teacher_softcap=softcaps[1],
        num_items=num_items_in_batch,
        return_parts=True,
    )
    divisor = record.num_tokens if num_items_in_batch is None else num_items_in_batch
    return record.loss, record.entropy * divisor, record.num_tokens


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """GKDTrainer's `generalized_jsd_loss` by kl_loss().

    Args:
        student_logits: [B, T, V], already shifted against `labels`.
        teacher_logits: [B, T, V].
        labels: [B, T], −100 where a token does not count; None: all count.
        beta: 0 forward KL, 1 reverse KL, else generalised JSD.
        temperature: divides the logits of both; no τ² in the loss.
        reduction: "batchmean" divides by the tokens that count (without labels by B), "sum" by nothing,
            "mean" by tokens times V. TRL's "none" keeps each vocabulary entry's term, and is refused.
        num_items_in_batch: what the sum is divided by, whatever `reduction` is.

    Returns:
        The loss, 0-dim float32.

    Raises:
        ValueError: another reduction; and as kl_loss().
    """
    if num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f'reduction must be "batchmean", "sum" or "mean" inside use_in_trl(), got {reduction!r}: the '
            "terms of single vocabulary entries are not made; call TRL's own function for them"
        )
    options: dict[str, Any] = {"num_items": num_items_in_batch}
    if isinstance(num_items_in_batch, Tensor):
        options["num_items"] = num_items_in_batch.detach().to(student_logits.device)
    elif num_items_in_batch is None and reduction == "sum":
        options["reduction"] = "sum"
    elif num_items_in_batch is None and reduction == "batchmean" and labels is None:
        options["num_items"] = max(student_logits.shape[0], 1)
    loss: Any = kl_loss(
        student_logits,
        teacher_logits.detach(),
        mask=None if labels is None else labels != -100,
        divergence=float(beta),
        temperature=temperature,
        **options,
    )
    if num_items_in_batch is None and reduction == "mean":
        loss = loss / student_logits.shape[-1]
    return loss


class Served:
    """How often a use_in_trl() has been called on; `calls` counts since it was entered."""

    def __init__(self, calls: Callable[[], int]) -> None:
        self._calls = calls
        self._before = calls()

    @property
    def calls(self) -> int:
        """Losses that this library has computed for TRL since the context was entered."""
        return self._calls() - self._before


class _Target:
    """A name in TRL, what stands there while it is served, and how many contexts are active."""

    def __init__(self, module: str, owner: str | None, name: str, ours: Callable[..., Any]) -> None:
        self.module, self.owner, self.name, self.ours = module, owner, name, ours
        self.label = ".".join(part for part in (module, owner, name) if part)
        self.active = 0
        self.calls = 0
        self.original: Any = None
        self.patch: Any = None

    def where(self) -> Any:
        """The module or class that holds the name."""
        module = importlib.import_module(self.module)
        return module if self.owner is None else getattr(module, self.owner)

    def stand_in(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """Takes what TRL's function takes, by its signature, and calls ours."""
        signature = inspect.signature(theirs)
        names = set(signature.parameters)
        known = set(inspect.signature(self.ours).parameters)
        if names != known:
            raise ImportError(
                f"{self.label} takes {sorted(names)}, which is not the function that use_in_trl() knows; "
                "something else has replaced it, or this TRL is not the release that it says"
            )

        def serve(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            with _lock:
                self.calls += 1
            return self.ours(**bound.arguments)

        return serve

    def enter(self) -> None:
        """Puts ours in place, once for any number of contexts."""
        if self.active == 0:
            owner = self.where()
            self.original = inspect.getattr_static(owner, self.name)
            serve = self.stand_in(getattr(owner, self.name))
            self.patch = staticmethod(serve) if self.owner else serve
            setattr(owner, self.name, self.patch)
        self.active += 1

    def leave(self) -> None:
        """Puts TRL's back where the last context ends."""
        self.active -= 1
        if self.active:
            return
        owner = self.where()
        if inspect.getattr_static(owner, self.name) is self.patch:
            setattr(owner, self.name, self.original)
        else:
            warnings.warn(
                f"{self.label} was replaced by something else inside use_in_trl(); it is left as it is",
                stacklevel=5,
            )
        self.original = self.patch = None


_lock = threading.RLock()
_TARGETS = {
    "distillation": _Target(
        "trl.trainer.distillation_trainer", None, "_chunked_divergence_loss", chunked_divergence_loss
    ),
    "gkd": _Target(
        "trl.experimental.gkd.gkd_trainer", "GKDTrainer", "generalized_jsd_loss", generalized_jsd_loss
    ),
}


def _check_version() -> None:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"use_in_trl() needs TRL: pip install trl=={TRL_VERSIONS[-1]}") from None
    if version not in TRL_VERSIONS:
        raise ImportError(
            f"use_in_trl() replaces private functions of TRL and is tested with {', '.join(TRL_VERSIONS)}; "
            f"trl {version} is installed: pip install trl=={TRL_VERSIONS[-1]}"
        )


@contextmanager
def use_in_trl(*trainers: str) -> Iterator[Served]:
    """Lets TRL's trainers compute their divergence by linear_kl_loss() or kl_loss() within the context.

        with use_in_trl() as served:
            DistillationTrainer(...).train()
        print(served.calls)

    The replacement holds for the whole process, other threads included, until the last of all active
    contexts ends; contexts may be nested, overlap in threads, and end by an exception. Warns at the end of
    one in which no loss was served, so that training by TRL's own loss does not pass for this one.

    Losses and gradients are TRL's to the accuracy of the dtype; beta, temperature, masks,
    num_items_in_batch, biases, logit scales and softcaps do the same. Memory is bounded by linear_kl_loss()'s
    own budget. Under DeepSpeed ZeRO-3 the heads' weights are not gathered, and refused.

    Args:
        trainers: "distillation" (DistillationTrainer; if none is named), "gkd" (the experimental GKDTrainer,
            whose logits TRL has already made).

    Yields:
        Served, whose `calls` counts the losses computed here.

    Raises:
        ImportError: TRL is not installed, or in a version with which this is not tested.
        ValueError: an unknown trainer.
    """
    names = trainers or ("distillation",)
    for name in names:
        if name not in _TARGETS:
            raise ValueError(f"trainers must be of {', '.join(map(repr, _TARGETS))}, got {name!r}")
    _check_version()
    targets = [_TARGETS[name] for name in dict.fromkeys(names)]
    entered: list[_Target] = []
    try:
        with _lock:
            for target in targets:
                target.enter()
                entered.append(target)
            served = Served(lambda: sum(target.calls for target in targets))
        yield served
        if served.calls == 0:
            warnings.warn(
                f"no loss was computed inside use_in_trl({', '.join(map(repr, trainers))}): what ran was not "
                f"{' nor '.join(target.label for target in targets)}",
                stacklevel=3,
            )
    finally:
        with _lock:
            for target in reversed(entered):
                target.leave()
