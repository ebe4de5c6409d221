"""Groups of parameters that many families share, for use in their tables."""

from __future__ import annotations

import dataclasses

from minitron_kernels.pruning.families.configs import config_value
from minitron_kernels.pruning.families.family import Param, When


def flag(key: str, default: bool = False) -> When:
    """A `when` for a parameter that exists if the config sets `key`."""
    return lambda config, layer: bool(config_value(config, key, default))


def linear(name: str, axes: str, bias: When | bool = False) -> tuple[Param, ...]:
    """The weight of a linear layer, with axes "out, in", and its bias if, or where, `bias` says so."""
    weight = Param(f"{name}.weight", axes)
    if bias is False:
        return (weight,)
    return weight, Param(f"{name}.bias", axes.split(", ")[0], None if bias is True else bias)


def attention(
    *, qkv_bias: When | bool = False, out_bias: When | bool = False, qk_norm: bool = False
) -> tuple[Param, ...]:
    """Attention with separate projections to queries, keys and values."""
    norms = tuple(Param(f"self_attn.{side}_norm.weight", "head_dim") for side in "qk") if qk_norm else ()
    return (
        *linear("self_attn.q_proj", "heads, hidden", qkv_bias),
        *linear("self_attn.k_proj", "kv_heads, hidden", qkv_bias),
        *linear("self_attn.v_proj", "kv_heads, hidden", qkv_bias),
        *linear("self_attn.o_proj", "hidden, heads", out_bias),
        *norms,
    )


def gated_mlp(bias: When | bool = False, when: When | None = None) -> tuple[Param, ...]:
    """An MLP of gate_proj, up_proj and down_proj."""
    params = (
        *linear("mlp.gate_proj", "mlp, hidden", bias),
        *linear("mlp.up_proj", "mlp, hidden", bias),
        *linear("mlp.down_proj", "hidden, mlp", bias),
    )
    return tuple(dataclasses.replace(param, when=when) for param in params) if when else params


def norms(*names: str) -> tuple[Param, ...]:
    """RMS norms over the residual channels."""
    return tuple(Param(f"{name}.weight", "hidden") for name in names)
