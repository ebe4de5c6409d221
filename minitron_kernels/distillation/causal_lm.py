"""A Hugging Face language model's decoder, output layer, and what it does to its logits.

attach() teaches a model to hand its DenseSignal to a function inside its own forward pass, so that wrappers
around it (DDP, FSDP2, DeepSpeed, torch.compile, autocast) see the loss as a part of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from minitron_kernels.distillation.signals import DenseSignal
from minitron_kernels.ops.kl_loss.heads import head_of

_ATTACHED = "_minitron_attached"
# what only the whole model understands, and not its decoder
_NOT_FOR_THE_DECODER = ("labels", "logits_to_keep", "num_items_in_batch", "return_loss")


class CausalLM:
    """What distillation needs to know of a causal language model of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = head_of(self.model.get_output_embeddings())
        self.logit_scale, self.softcap = logit_options(self.model.config)

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        return self.model.base_model

    def signal(self, batch: dict[str, Any], layers: Iterable[int] = ()) -> DenseSignal:
        """Runs the decoder on a batch of the model's own arguments; no logits are made."""
        layers = tuple(layers)
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_DECODER}
        out = self.decoder(**inputs, use_cache=False, output_hidden_states=bool(layers), return_dict=True)
        hidden, weight, bias = self.head(out.last_hidden_state)
        kept: dict[int, Tensor] = {layer: out.hidden_states[layer + 1] for layer in layers}
        return DenseSignal(hidden, weight, bias, self.logit_scale, self.softcap, kept)


def logit_options(config: Any) -> tuple[float, float | None]:
    """(factor, softcap) of a model's logits, out of its config."""
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere
        scale = config.logit_scale
    return scale, getattr(config, "final_logit_softcapping", None)


def attach(model: Any) -> nn.Module:
    """Lets model(**batch, distillation=call) return call(signal), made inside the model's own forward.

    `model` is the language model itself or a PEFT model around it, before DDP, FSDP2 or compile wrap it.
    Its class becomes a subclass of what it was, of the same name; without `distillation` it does what it did.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(type(inner), _ATTACHED, False):
        CausalLM(inner)  # what is not known is refused here
        inner.__class__ = _attached(type(inner))  # type: ignore[arg-type]
    module: nn.Module = model
    return module


@functools.cache
def _attached(cls: Any) -> type:
    original: Callable[..., Any] = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, distillation: Any = None, **batch: Any) -> Any:
        if distillation is None:
            return original(self, *args, **batch)
        names = list(inspect.signature(original).parameters)[1:]
        batch.update(zip(names, args, strict=False))
        return distillation(CausalLM(self).signal(batch, distillation.layers))

    return type(cls.__name__, (cls,), {"forward": forward, _ATTACHED: True, "__module__": cls.__module__})
