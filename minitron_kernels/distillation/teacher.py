"""Teachers: a batch to what the student is to learn from."""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minitron_kernels._modules import eval_mode
from minitron_kernels._tensors import extent, is_dtensor
from minitron_kernels.distillation.causal_lm import CausalLM, attach, is_attached
from minitron_kernels.distillation.signals import DenseSignal, TeacherSignal
from minitron_kernels.ops.kl_loss.heads import EffectiveHead


class Teacher(Protocol):
    """What step() and the trainers ask of a teacher; ModelTeacher and CachedTeacher are two."""

    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> TeacherSignal:
        """The signal for a batch (`input_ids` [B, T] and what else the model takes), without a gradient."""


class ModelTeacher:
    """A model that is run at every step, without gradients and without dropout.

        teacher = ModelTeacher(model, device="cuda:1", dtype=torch.bfloat16)
        student_as_its_own = ModelTeacher(peft_model, disable_adapters=True)

    The batch goes to the teacher's device, its signal comes back to the batch's. The model is in evaluation
    mode during each call, whatever mode somebody has set; `requires_grad` of its parameters is left as it is,
    since nothing of it is differentiated. The signal's head is the model's own parameter where it lies on the
    batch's device, else a copy that is made again only when the parameter changes.

    Args:
        model: a causal language model of transformers, or a PEFT model around it; or an attached one within
            DDP, FSDP1, FSDP2 or torch.compile, which is called through its wrapper. It is attached if it was
            not.
        device: moves the model there, for good.
        dtype: casts its floating-point weights, for good.
        disable_adapters: the base of a PEFT model is the teacher, the model itself may be the student.

    Raises:
        TypeError: a model that is not known (see CausalLM), or disable_adapters without adapters.
        ValueError: device or dtype together with disable_adapters, or for weights that are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        disable_adapters: bool = False,
    ) -> None:
        self.model = model
        self.disable_adapters = disable_adapters
        self._lm: CausalLM | None = None
        self._head_inside = False  # whether only the forward of a wrapper holds the head in one piece
        self._moved: tuple[Any, Any, Tensor] | None = None
        self._apart_from: weakref.ref[nn.Module] | None = None
        adapted = self._inside("disable_adapter")
        if disable_adapters and adapted is None:
            raise TypeError(f"disable_adapters=True needs a PEFT model, got {type(model).__name__}")
        if device is not None or dtype is not None:
            self._move(device, dtype)
        if not is_attached(model):
            attach(model)
        if not disable_adapters:
            model.eval()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> DenseSignal:
        """The model's hidden states for the batch, and its head.

        Args:
            batch: the model's arguments by name; labels are not for it and are left out.
            layers: of the teacher, whose outputs are wanted.
        """
        source = _device_of(batch)
        target = self._device()
        inputs = {
            name: value.to(target) if isinstance(value, Tensor) and target is not None else value
            for name, value in batch.items()
        }
        with eval_mode(self.model), self._adapters_off():
            hidden, weight, bias, kept, (scale, softcap) = self._run(inputs, tuple(layers))
        bias = None if bias is None else bias.detach()
        if is_dtensor(weight) and weight.dtype != hidden.dtype:  # sharded in fp32, computed with in bf16
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        if source is not None:
            hidden, kept = hidden.to(source), {layer: x.to(source) for layer, x in kept.items()}
            bias = None if bias is None else bias.to(source)
            weight = weight if weight.device == source else self._at(weight, source)
        weight = weight.detach()
        return DenseSignal(hidden, weight, bias, scale, softcap, kept)

    def _run(self, inputs: dict[str, Any], layers: tuple[int, ...]) -> tuple[Any, ...]:
        """(hidden, weight, bias, layers, options of the logits); a forward pass."""
        call = _States(layers, self._head_inside)
        hidden, kept = self.model(**inputs, distillation=call)
        lm = call.lm
        assert lm is not None
        if call.head is not None:
            return *call.head, kept, lm.logit_options
        try:
            return *lm.operands(hidden), kept, lm.logit_options
        except ValueError:  # FSDP1 and ZeRO-3 have it in one piece within the forward only
            self._head_inside = True
            return self._run(inputs, layers)

    def check_apart(self, student: nn.Module) -> None:
        """Checks once that training the student does not change this teacher.

        Raises:
            ValueError: they share memory of a parameter that is trained, and disable_adapters is not set.
        """
        if self.disable_adapters or (self._apart_from is not None and self._apart_from() is student):
            return
        own = sorted(
            (*memory, name) for name, x in self.model.named_parameters() if (memory := _memory(x)) is not None
        )
        for name, x in student.named_parameters():
            memory = _memory(x) if x.requires_grad else None
            if memory is None:
                continue
            device, start, end = memory
            i = bisect.bisect_left(own, (device, end))  # those that begin before it ends
            if i and own[i - 1][0] == device and own[i - 1][2] > start:
                raise ValueError(
                    f"the student trains {name}, whose memory is also the teacher's {own[i - 1][3]}: the "
                    "teacher would change at every step. Give it a copy (copy.deepcopy), freeze it, "
                    "or for adapters use ModelTeacher(model, disable_adapters=True)"
                )
        self._apart_from = weakref.ref(student)

    def _inside(self, name: str) -> Any:
        """The first module within the wrappers that has a method."""
        return next((module for module in self.model.modules() if hasattr(module, name)), None)

    def _adapters_off(self) -> AbstractContextManager[Any]:
        return self._inside("disable_adapter").disable_adapter() if self.disable_adapters else nullcontext()

    def _move(self, device: Any, dtype: torch.dtype | None) -> None:
        if self.disable_adapters:
            raise ValueError(
                "device and dtype cannot be set with disable_adapters=True: the model is the student"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
        if any(is_dtensor(x) or hasattr(x, "ds_id") for x in self.model.parameters()):
            raise ValueError(
                "a teacher whose weights are sharded is not moved or cast: do it before sharding"
            )
        self.model.to(device=device, dtype=dtype)

    def _device(self) -> torch.device | None:
        """Where the model wants its batches: where its input embeddings are."""
        embeddings = self._inside("get_input_embeddings").get_input_embeddings()
        device: torch.device = embeddings.weight.device
        return None if device.type == "meta" else device

    def _at(self, weight: Tensor, device: torch.device) -> Tensor:
        """The head on another device, moved again only when it was changed."""
        if is_dtensor(weight):
            raise ValueError(f"a teacher's sharded head on {weight.device} cannot be used on {device}")
        if not isinstance(weight, nn.Parameter):  # made for this call alone
            return weight.to(device)
        key = (weight._version, device)
        if self._moved is None or self._moved[0] is not weight or self._moved[1] != key:
            self._moved = weight, key, weight.detach().to(device)
        return self._moved[2]


class _States:
    """Asks an attached model for its states; its head is taken outside, where FSDP2 leaves it whole."""

    wants_states = True

    def __init__(self, layers: tuple[int, ...], head_inside: bool) -> None:
        self.layers, self.head_inside = layers, head_inside
        self.lm: CausalLM | None = None
        self.head: EffectiveHead | None = None

    def states(self, lm: CausalLM, batch: Mapping[str, Any]) -> tuple[Tensor, dict[int, Tensor]]:
        self.lm = lm
        lm.ensure_verified()
        hidden, kept = lm.states(batch, self.layers)
        if self.head_inside:  # a copy, since its memory is taken away again
            x, weight, bias = lm.head(hidden)
            self.head = EffectiveHead(x, weight.clone(), None if bias is None else bias.clone())
        return hidden, kept


def _device_of(batch: Mapping[str, Any]) -> torch.device | None:
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].device
    return next((x.device for x in batch.values() if isinstance(x, Tensor)), None)


def _memory(x: Any) -> tuple[str, int, int] | None:
    """(device, first byte, behind the last byte) of a parameter here; None: it has no memory of its own."""
    local = x._local_tensor if is_dtensor(x) else x
    if local.device.type == "meta" or local.numel() == 0 or local.untyped_storage().nbytes() == 0:
        return None
    return str(local.device), *extent(local)
