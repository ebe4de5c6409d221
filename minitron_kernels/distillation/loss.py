"""DistillationLoss: a student's and a teacher's signals to one loss with its parts."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_kernels._tensors import is_dtensor
from minitron_kernels.distillation.hidden_states import HiddenStatesLoss
from minitron_kernels.distillation.map_watch import MapWatch
from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal
from minitron_kernels.ops.kl_loss.budget import check_schedule
from minitron_kernels.ops.kl_loss.checks import number, positive, refuse
from minitron_kernels.ops.kl_loss.op import linear_kl_loss
from minitron_kernels.ops.kl_loss.options import loss_options
from minitron_kernels.ops.kl_loss.sparse import linear_sparse_kl_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAP_NAME = "distillation_map"  # of the student's module that attach_map() adds
_ELSEWHERE = {
    "reduction": "the loss is the mean over valid tokens, or their sum divided by num_items",
    "return_parts": "the parts are always returned, in a DistillationRecord",
    **dict.fromkeys(
        ("grad_head_accumulator", "grad_head_buffer"),
        "the head's gradient goes through autograd, so that wrappers see it",
    ),
    **dict.fromkeys(("labels", "mask", "token_weights", "num_items"), "give it to every call"),
    **dict.fromkeys(
        [f"{side}_{of}" for side in ("student", "teacher") for of in ("bias", "softcap", "logit_scale")],
        "it comes with the model's signal",
    ),
}


class DistillationRecord(NamedTuple):
    """A loss and its parts; all but `loss` are detached. The first six are those of LossRecord."""

    loss: Tensor
    kl: Tensor
    ce: Tensor | None
    entropy: Tensor
    label_logprob: Tensor | None
    num_tokens: Tensor
    hidden: Tensor | None = None  # the hidden-state term, before its weight
    hidden_weight: Tensor | None = None  # the weight that it had (dynamic or fixed)


class DistillationLoss(nn.Module):
    """KL between a teacher's and a student's next tokens, cross-entropy, and a term of their hidden states.

        loss = kl_weight · kl + ce_weight · ce + α · hidden

    in nats, each the sum over valid tokens of its terms, times the tokens' weights, divided by the number of
    valid tokens or by num_items. `kl` and `ce` are those of linear_kl_loss(), for a teacher of a few tokens
    linear_sparse_kl_loss(); `hidden` is that of a HiddenStatesLoss, and α its weight.

    With hidden_weight="dynamic", α = kl_weight · kl / hidden, detached, so that both terms count the same,
    and the loss reads 2 · kl_weight · kl + ce_weight · ce. It is 0 where `hidden` is 0 or the quotient is not
    finite; the host waits for nothing. It is that of the call: of a micro-batch, and of this rank's tokens.
    Gradients that several micro-batches or ranks add up are then not those of one large batch, which has one
    α; they are where α does not vary. Two options make it vary less. hidden_weight_group adds both terms over
    ranks before the quotient, so that all have one α (give num_items too, that of all ranks, so that these
    are sums). hidden_weight_smoothing = s takes the quotient of running means, m ← s m + (1 - s) value, over
    the calls in training.

    The module has parameters where the hidden states need a map: see attach_map().

    Args:
        kl_weight: see linear_kl_loss(), as all that follow up to vocab_range.
        ce_weight: as above; needs labels in every call.
        divergence: as above.
        temperature: as above.
        temperature_squared: as above.
        label_smoothing: as above.
        ignore_index: as above.
        vocab_size: as above.
        schedule: as above.
        workspace_bytes: as above; that of hidden states is their own.
        backend: as above.
        tp_group: as above. The hidden-state term is then made on each rank, of all tokens.
        sequence_parallel: as above; not with hidden_states.
        vocab_range: as above.
        hidden_states: a HiddenStatesLoss, or None for logits alone, which the paper finds best for pruned
            widths; hidden states help where many layers were dropped.
        hidden_weight: α, a number ≥ 0, or "dynamic", the default with hidden_states.
        hidden_weight_smoothing: s in [0, 1), of "dynamic"; 0 for the α of each call. The running means are in
            the state_dict.
        hidden_weight_group: ranks with one α, of "dynamic"; all of them call. None: each its own.

    Raises:
        TypeError: an option that there is not; says which one is near.
        ValueError: a value out of range, or options that contradict each other.

    Source: Minitron (arXiv 2407.14679) section 3, L = L_CE + L_logits + α L_is.
    """

    hidden_weight_means: Tensor | None  # [2]: of kl_weight · kl, and of hidden

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        divergence: str | float = "forward_kl",
        temperature: float = 1.0,
        temperature_squared: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        schedule: str = "auto",
        workspace_bytes: int | None = None,
        backend: str = "auto",
        tp_group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
        vocab_range: tuple[int, int] | None = None,
        hidden_states: HiddenStatesLoss | None = None,
        hidden_weight: float | str | None = None,
        hidden_weight_smoothing: float = 0.0,
        hidden_weight_group: ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            _refuse_option(name)
        for name, weight in (("kl_weight", kl_weight), ("ce_weight", ce_weight)):
            _not_negative(name, weight)
        loss_options(  # wrong ones are refused now, and not by the first batch
            divergence=divergence,
            temperature=temperature,
            label_smoothing=label_smoothing,
            student_softcap=None,
            teacher_softcap=None,
            student_logit_scale=1.0,
            teacher_logit_scale=1.0,
        )
        check_schedule(schedule)
        self.options: dict[str, Any] = {
            "kl_weight": kl_weight,
            "ce_weight": ce_weight,
            "divergence": divergence,
            "temperature": temperature,
            "temperature_squared": temperature_squared,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "vocab_size": vocab_size,
            "schedule": schedule,
            "workspace_bytes": workspace_bytes,
            "backend": backend,
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "vocab_range": vocab_range,
        }
        if hidden_states is None:
            if hidden_weight is not None or hidden_weight_smoothing or hidden_weight_group is not None:
                raise ValueError(
                    "hidden_weight and its options weigh a hidden-state term, and there is none: pass "
                    "hidden_states=HiddenStatesLoss({student layer: teacher layer})"
                )
        elif not isinstance(hidden_states, HiddenStatesLoss):
            raise TypeError(f"hidden_states must be a HiddenStatesLoss, got {type(hidden_states).__name__}")
        elif sequence_parallel:
            raise ValueError(
                "hidden_states with sequence_parallel=True are not served: layers hold this rank's tokens, "
                "labels and weights those of all"
            )
        self.hidden_states = hidden_states
        self.hidden_weight = "dynamic" if hidden_weight is None else hidden_weight
        self.hidden_weight_group = hidden_weight_group
        self.hidden_weight_smoothing = number("hidden_weight_smoothing", hidden_weight_smoothing)
        self._check_hidden_weight(kl_weight)
        means = torch.zeros(2, dtype=torch.float64) if hidden_weight_smoothing else None
        self.register_buffer("hidden_weight_means", means)
        self._watch = MapWatch()

    def _check_hidden_weight(self, kl_weight: float) -> None:
        weight, smoothing = self.hidden_weight, self.hidden_weight_smoothing
        if not 0 <= smoothing < 1:
            refuse("hidden_weight_smoothing", "in [0, 1)", smoothing)
        if isinstance(weight, str):
            if weight != "dynamic":
                refuse("hidden_weight", 'a number or "dynamic"', repr(weight))
            if self.hidden_states is not None and kl_weight == 0:
                raise ValueError(
                    'hidden_weight="dynamic" gives the term the size of the KL\'s part, which kl_weight=0 '
                    "makes 0: pass a number"
                )
            return
        _not_negative("hidden_weight", weight)
        if smoothing or self.hidden_weight_group is not None:
            raise ValueError(
                'hidden_weight_smoothing and hidden_weight_group are options of hidden_weight="dynamic", got '
                f"hidden_weight={weight}"
            )

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student whose outputs forward() needs."""
        return () if self.hidden_states is None else self.hidden_states.student_layers

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose outputs forward() needs."""
        return () if self.hidden_states is None else self.hidden_states.teacher_layers

    def attach_map(self, student: nn.Module) -> nn.Module:
        """Makes the hidden states' map a module of the student, `distillation_map`, and returns the student.

        student.parameters() then has it: an optimizer trains it, DDP averages its gradient, FSDP2 shards it,
        checkpoints keep it. The loss keeps using it, inside the student's forward as step() and the trainers
        call it. Call it before the student is wrapped and before the optimizer is made. The map goes to the
        student's device, but not to the meta device; in a student that FSDP2 shards in one dtype, give it
        that first: loss.hidden_states.to(dtype). Without a map nothing is done. Who does not call this must
        give the optimizer loss.parameters() too, and average the ranks' gradients of it; a warning says so.

        Raises:
            ValueError: the student is wrapped already, or has another loss's map.
        """
        chosen = None if self.hidden_states is None else self.hidden_states.map
        if chosen is None:
            return student
        wrapped = isinstance(student, nn.parallel.DistributedDataParallel) or hasattr(student, "_orig_mod")
        if wrapped or any(is_dtensor(p) for p in student.parameters()):
            raise ValueError(
                "attach_map() comes before DDP, FSDP2 and torch.compile wrap the student, and before the "
                "optimizer is made; this student is wrapped"
            )
        present = student._modules.get(MAP_NAME, chosen)
        if present is not chosen:
            raise ValueError(
                f"the student has a {MAP_NAME} of another loss: that one's detach_map(student) removes it"
            )
        places = (p.device for p in student.parameters() if p.device.type != "meta")
        if (device := next(places, None)) is not None:  # on the meta device its values would be lost
            self.to(device)
        student.add_module(MAP_NAME, chosen)
        self._watch.attached = True
        return student

    def detach_map(self, student: nn.Module) -> nn.Module:
        """Takes the map out of the student again, as before it is exported, and returns the student.

        Raises:
            ValueError: the student has another loss's map.
        """
        own = None if self.hidden_states is None else self.hidden_states.map
        if MAP_NAME in student._modules:
            if student._modules[MAP_NAME] is not own:
                raise ValueError(f"the student's {MAP_NAME} is that of another loss")
            del student._modules[MAP_NAME]
            self._watch.attached = False
        return student

    def forward(
        self,
        student: DenseSignal,
        teacher: TeacherSignal,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> DistillationRecord:
        """The loss of a batch.

        Args:
            student: of [...] tokens; gradients flow to hidden states, head, bias and layers.
            teacher: of the same tokens, a constant.
            labels: [...] int64, the targets of their positions: shift_labels() of Hugging Face's.
            mask: [...] bool, True where a token counts.
            token_weights: [...] float.
            num_items: what to divide by in place of the number of valid tokens, such as that of all
                micro-batches and ranks.

        Raises:
            TypeError, ValueError: as linear_kl_loss(), linear_sparse_kl_loss() and HiddenStatesLoss.
        """
        if not isinstance(student, DenseSignal):
            raise TypeError(f"student must be a DenseSignal, got {type(student).__name__}")
        tokens: dict[str, Any] = {"mask": mask, "token_weights": token_weights, "num_items": num_items}
        common = {
            **self.options,
            **tokens,
            "labels": labels,
            "student_bias": student.bias,
            "student_logit_scale": student.logit_scale,
            "student_softcap": student.softcap,
            "return_parts": True,
        }
        hidden = None
        if self.hidden_states is not None:  # first, since it names what signals lack
            if self.hidden_states.map is not None:
                self._watch.look(self.hidden_states.map.weight, student.head)
            ignore_index = self.options["ignore_index"]
            layers = student.layers, getattr(teacher, "layers", {})
            hidden = self.hidden_states(*layers, labels, **tokens, ignore_index=ignore_index)
        record: Any
        if isinstance(teacher, SparseSignal):
            of_student = self.options["vocab_size"] or student.head.shape[0]
            if teacher.vocab_size not in (None, of_student):
                raise ValueError(
                    f"the teacher has {teacher.vocab_size} tokens and the student {of_student}: if the "
                    f"student's first ones are these, give DistillationLoss(vocab_size={teacher.vocab_size})"
                )
            operands = teacher.ids, teacher.logprobs, teacher.log_tail
            record = linear_sparse_kl_loss(student.hidden, student.head, *operands, **common)
        elif isinstance(teacher, DenseSignal):
            record = linear_kl_loss(
                student.hidden,
                student.head,
                teacher.hidden,
                teacher.head,
                teacher_bias=teacher.bias,
                teacher_logit_scale=teacher.logit_scale,
                teacher_softcap=teacher.softcap,
                **common,
            )
        else:
            raise TypeError(f"teacher must be a DenseSignal or a SparseSignal, got {type(teacher).__name__}")
        if hidden is None:
            return DistillationRecord(*record)
        weight = self._weight(record.kl, hidden.detach())
        loss = record.loss + weight * hidden
        return DistillationRecord(*record)._replace(loss=loss, hidden=hidden.detach(), hidden_weight=weight)

    @torch.no_grad()
    def _weight(self, kl: Tensor, hidden: Tensor) -> Tensor:
        """α, 0-dim in the dtype of the loss."""
        if not isinstance(self.hidden_weight, str):
            return torch.full_like(hidden, self.hidden_weight)
        terms = torch.stack((kl.to(torch.float64) * self.options["kl_weight"], hidden.to(torch.float64)))
        if self.hidden_weight_group is not None:
            dist.all_reduce(terms, group=self.hidden_weight_group)
        means = self.hidden_weight_means
        if means is not None:
            if self.training:
                moved = torch.lerp(terms, means.to(terms), self.hidden_weight_smoothing)
                means.copy_(torch.where(terms.isfinite().all(), moved, means.to(terms)))
            terms = torch.where(means[1] > 0, means, terms)  # before training there are none
        quotient = terms[0] / terms[1]
        return torch.where((terms > 0).all() & quotient.isfinite(), quotient, 0.0).to(hidden.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationLoss:
        super()._apply(fn, recurse)
        if self.hidden_weight_means is not None:  # loss.bfloat16() would stop them from moving
            self.hidden_weight_means = self.hidden_weight_means.double()
        return self

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        defaults = {name: p.default for name, p in inspect.signature(DistillationLoss).parameters.items()}
        options = dict(self.options)
        if self.hidden_states is not None:
            options["hidden_weight"] = self.hidden_weight
            options["hidden_weight_smoothing"] = self.hidden_weight_smoothing
            options["hidden_weight_group"] = self.hidden_weight_group
        changed = {name: value for name, value in options.items() if value != defaults[name]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


def _refuse_option(name: str) -> None:
    if name in _ELSEWHERE:
        raise TypeError(f"DistillationLoss has no option {name!r}: {_ELSEWHERE[name]}")
    parameters = inspect.signature(DistillationLoss).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
    raise TypeError(f"DistillationLoss has no option {name!r}{hint}")


def _not_negative(name: str, value: Any) -> None:
    if number(name, value) != 0:
        positive(name, value)
