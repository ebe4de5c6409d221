"""The output layer of a model, as the hidden states, head and bias that linear_kl_loss() takes."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_kernels._tensors import is_dtensor
from minitron_kernels.ops.kl_loss.checks import FLOAT_DTYPES
from minitron_kernels.ops.kl_loss.sharded import check_whole, local_head


class EffectiveHead(NamedTuple):
    """Operands whose product hidden·weightᵀ + bias is what the output layer computes."""

    hidden: Tensor  # [..., H + adapters' ranks]
    weight: Tensor  # [V, H + adapters' ranks]
    bias: Tensor | None  # [V]


class Head:
    """Made by head_of(). Called with hidden states [..., H], it gives an EffectiveHead."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module, self.dtype = module, dtype
        _resolve(module)  # a layer that is not known is refused here, and not in the first step

    def __call__(self, hidden: Tensor) -> EffectiveHead:
        """The operands for these hidden states, with the layer as it is now."""
        layer, adapters = _resolve(self.module)
        weight, bias = _weight(layer)
        if not adapters:
            return EffectiveHead(hidden, weight, bias)
        inputs, weights = [hidden], [weight]
        for adapter in adapters:
            A, B = (_weight(x) for x in (adapter.A, adapter.B))
            x = adapter.dropout(hidden.to(A[0].dtype))
            inputs.append(F.linear(x, local_head("the adapter's A", A[0])) * adapter.scaling)
            weights.append(B[0])
            if B[1] is not None:
                _check_alike(bias, B[1])
                bias = B[1] * adapter.scaling if bias is None else bias + B[1] * adapter.scaling
        _check_alike(*weights)
        dtype = self.dtype
        if dtype is None and hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        return EffectiveHead(_joined(inputs, dtype), _joined(weights, dtype), bias)


def head_of(module: nn.Module, *, dtype: torch.dtype | None = None) -> Head:
    """The output layer of a model for linear_kl_loss(), adapters included without being merged.

        head = head_of(student.lm_head)
        hidden, weight, bias = head(student_hidden)
        loss = linear_kl_loss(hidden, weight, teacher_hidden, teacher_weight, student_bias=bias)

    The weight of a layer that peft adapts, W + Σ s·B·A, enters as W beside the B's, with s·dropout(x)·Aᵀ
    beside the hidden states x: `A`, `B` and the hidden states get their gradients, and W where it is
    trained. The joined weight is a copy of [V, H + r], made anew at every call.

    What the layer computes is asked for at every call: adapters that were switched, merged or disabled in
    between are seen. Dropout of an adapter acts as in peft, in training mode on the adapter's input alone.
    Scale, softcap and multipliers that a model applies to its logits (Gemma 2, Granite, Cohere, MuP) are not
    part of its output layer: pass them as student_logit_scale and student_softcap. Hooks of the layer do not
    run. A weight that is a DTensor stays one, for linear_kl_loss() to take apart.

    Args:
        module: nn.Linear; nn.Embedding, where its weight is the head (tied); either of them within peft's
            LoRA (with rsLoRA, any initialisation, dropout, lora_bias, several active adapters) or
            modules_to_save. Of peft's other methods only layers that are merged or disabled.
        dtype: what an adapted layer's hidden states and weight are rounded to. By default nothing is
            rounded: W in bf16 with adapters in fp32 makes both operands fp32, of twice the memory. Under
            autocast both take its dtype, as in any linear layer.

    Returns:
        A callable: hidden states [..., H] -> EffectiveHead(hidden, weight, bias).

    Raises:
        TypeError: a layer whose product with the hidden states is not known (quantised, DoRA and other
            variants, one with a forward of its own); here or at the call.
        ValueError: adapters that are merged and disabled; at the call, a weight that ZeRO-3 or FSDP1 has
            partitioned.
    """
    return Head(module, dtype)


class _Adapter(NamedTuple):
    A: nn.Module
    B: nn.Module
    scaling: float
    dropout: nn.Module


def _resolve(module: Any) -> tuple[nn.Module, list[_Adapter]]:
    """The linear layer or embedding within, and the adapters that act on it."""
    if _is_of(module, "peft.utils.other", "ModulesToSaveWrapper"):
        copies, active = module.modules_to_save, module.active_adapters
        asleep = module.disable_adapters or not active or any(name not in copies for name in active)
        return _resolve(module.original_module if asleep else copies[active[0]])
    if _is_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        return _resolve_adapted(module)
    if isinstance(module, nn.Embedding):
        return module, []
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"head_of() knows nn.Linear, nn.Embedding and peft's LoRA of the former, got {_name(module)}: "
            "pass the output layer itself (model.get_output_embeddings()); or, if its forward is another "
            "than x·Wᵀ + b, give linear_kl_loss() the W and b that it amounts to"
        )
    return module, []


def _resolve_adapted(layer: Any) -> tuple[nn.Module, list[_Adapter]]:
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise ValueError(
                "the adapters of the head are disabled, but merged into its weight: call unmerge_adapter()"
            )
        return _resolve(layer.base_layer)
    if not _is_of(layer, "peft.tuners.lora.layer", "Linear"):
        raise TypeError(
            f"head_of() knows peft's LoRA on nn.Linear, got {_name(layer)}: merge it (merge_adapter()) or "
            "disable it, or leave the head out of the adapter's target modules"
        )
    base, adapters = _resolve(layer.base_layer)
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        A, B = layer.lora_A[name], layer.lora_B[name]
        dora = getattr(layer, "use_dora", {}).get(name, False)
        variant = getattr(layer, "lora_variant", {}).get(name)
        plain = isinstance(A, nn.Linear) and isinstance(B, nn.Linear)
        if variant is not None or dora or not plain:
            kind = "DoRA" if dora else _name(A if variant is None else variant)
            raise TypeError(
                f"head_of() knows plain LoRA, but adapter {name!r} of the head is {kind}: leave the head out "
                "of its target modules, or merge it (merge_adapter())"
            )
        adapters.append(_Adapter(A, B, layer.scaling[name], layer.lora_dropout[name]))
    return base, adapters


def _weight(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, as they are to be multiplied with."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if type(weight) not in (Tensor, nn.Parameter) and not is_dtensor(weight):
        raise TypeError(
            f"the weight of {_name(layer)} is a {type(weight).__name__}: a quantised head has to be "
            "dequantised to [V, H] floats, or left out of quantisation"
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"the weight of {_name(layer)} must be float32, bfloat16, float16 or float64, got {weight.dtype}"
        )
    check_whole("the head's weight", weight, ndim=2)
    if bias is not None:
        check_whole("the head's bias", bias, ndim=1)
    return weight, bias


def _check_alike(*parts: Tensor | None) -> None:
    """Checks that what is joined is sharded the same way, if at all."""
    if len({_layout(x) for x in parts if x is not None}) > 1:
        raise TypeError(
            "the head and its adapters must be plain tensors, or DTensors with the same mesh and placements, "
            f"got {', '.join(str(_layout(x)) for x in parts if x is not None)}: apply fully_shard() to the "
            "model with its adapters, or call the loss inside the wrapped module's forward"
        )


def _layout(x: Any) -> Any:
    return (x.device_mesh, x.placements) if is_dtensor(x) else "a plain tensor"


def _joined(parts: list[Tensor], dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or functools.reduce(torch.promote_types, (x.dtype for x in parts))
    return torch.cat([x.to(dtype) for x in parts], -1)


def _is_of(x: Any, module: str, name: str) -> bool:
    """Whether `x` is an instance of a class of peft's, which is not imported for that."""
    known = sys.modules.get(module)
    return known is not None and isinstance(x, getattr(known, name))


def _name(x: Any) -> str:
    kind = type(x)
    return f"{kind.__module__}.{kind.__qualname__}"
