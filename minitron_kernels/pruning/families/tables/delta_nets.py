"""Families with gated delta nets in most layers, and gated attention in the others.

A gated delta net has key heads, each of which serves equally many value heads, behind each other: a value
head has a state of its own, [key head's width, value head's width], a learned decay, and a norm over its own
channels. So value heads are cut exactly, like query heads of attention, and key heads with theirs; all stay
as wide as they are.

Source: Gated DeltaNet (arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Mapping

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import (
    TWO_NORMS,
    always,
    attention,
    both,
    experts,
    flag,
    gated_mlp,
    is_of,
    norms,
    one_by_one,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State
from minitron_kernels.pruning.families.tables.shared_experts import (
    QWEN_SIZES,
    SHARED_GATE,
    qwen_dense_layers,
    qwen_is_sparse,
    shared_expert,
)

_BIAS = flag("attention_bias")
_LINEAR, _FULL = is_of("linear_attention"), is_of("full_attention")
_SIZES = {
    "delta_heads": ("linear_num_value_heads",),
    "delta_keys": ("linear_num_key_heads",),
    "delta_dim": ("linear_value_head_dim",),
    "delta_key_dim": ("linear_key_head_dim",),
    "delta_kernel": ("linear_conv_kernel_dim",),
}
_STAYS = "heads of a gated delta net are cut whole: there are no scores of their channels"


def _fixed(_config: Config) -> Mapping[str, str]:
    return dict.fromkeys(("delta_dim", "delta_key_dim"), _STAYS)


# queries and keys, of key heads, and values
_QUERIES, _VALUES = "delta_keys*delta_key_dim", "delta_heads*delta_dim"
_QKV = f"{_QUERIES}+{_QUERIES}+{_VALUES}"
_DELTA_NET = tuple(
    Param(f"linear_attn.{name}", axes, _LINEAR)
    for name, axes in (
        ("conv1d.weight", f"{_QKV}, one, delta_kernel"),
        ("dt_bias", "delta_heads"),
        ("A_log", "delta_heads"),
        ("norm.weight", "delta_dim"),
        ("out_proj.weight", f"hidden, {_VALUES}"),
    )
)
_STATES = (
    State(f"{_QKV}, delta_kernel", _LINEAR),
    State("delta_heads, delta_key_dim, delta_dim", _LINEAR, wide=True),
)
# q_proj has, of each head, its query and behind it the gate of its output
_ATTENTION = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True, query="heads(head_dim|head_dim)", when=_FULL),
    *norms(*TWO_NORMS),
)
_OUT = "linear_attn.out_proj"

# ---- Qwen3.5 and Qwen3.5-MoE: four projections into a delta net

_QWEN3_5 = (
    *_DELTA_NET,
    Param("linear_attn.in_proj_qkv.weight", f"{_QKV}, hidden", _LINEAR),
    Param("linear_attn.in_proj_z.weight", f"{_VALUES}, hidden", _LINEAR),
    Param("linear_attn.in_proj_b.weight", "delta_heads, hidden", _LINEAR),
    Param("linear_attn.in_proj_a.weight", "delta_heads, hidden", _LINEAR),
    *_ATTENTION,
)
register_family(
    Family(
        ("qwen3_5_text",),
        layer=(*_QWEN3_5, *gated_mlp()),
        taps=Taps(delta_out=_OUT),
        size_keys=_SIZES,
        norm_offset=1.0,
        fixed=_fixed,
        states=_STATES,
    )
)
_QWEN3_5_MOE = (*_QWEN3_5, *shared_expert("mlp.shared_expert", always), SHARED_GATE)
register_family(
    Family(
        ("qwen3_5_moe_text",),
        layer=(*_QWEN3_5_MOE, *experts("mlp")),
        stored_layer=(*_QWEN3_5_MOE, *one_by_one("mlp")),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts", delta_out=_OUT),
        size_keys={**_SIZES, **QWEN_SIZES, "mlp": ()},
        norm_offset=1.0,
        is_sparse=always,
        fixed=_fixed,
        states=_STATES,
    )
)

# ---- Qwen3-Next: two projections, key head after key head, and layers without experts where the config says


def _has_any(config: Config, layer: int) -> bool:
    return config_value(config, "num_experts", 0) > 0


_IS_SPARSE: When = both(_has_any, qwen_is_sparse)
_QWEN3_NEXT = (
    *_DELTA_NET,
    # of each key head: its query, its key, and of its value heads the values, and then their gates
    Param(
        "linear_attn.in_proj_qkvz.weight",
        f"delta_keys(delta_key_dim|delta_key_dim|{_VALUES}|{_VALUES}), hidden",
        _LINEAR,
    ),
    Param("linear_attn.in_proj_ba.weight", "delta_keys(delta_heads|delta_heads), hidden", _LINEAR),
    *_ATTENTION,
    *gated_mlp(when=unless(_IS_SPARSE)),
    *shared_expert("mlp.shared_expert", _IS_SPARSE),
    Param(SHARED_GATE.name, SHARED_GATE.axes, _IS_SPARSE),
)
register_family(
    Family(
        ("qwen3_next",),
        layer=(*_QWEN3_NEXT, *experts("mlp", _IS_SPARSE)),
        stored_layer=(*_QWEN3_NEXT, *one_by_one("mlp", _IS_SPARSE)),
        taps=Taps(experts="mlp.experts", delta_out=_OUT),
        size_keys={**_SIZES, **QWEN_SIZES},
        norm_offset=1.0,
        is_sparse=_IS_SPARSE,
        dense_layers=qwen_dense_layers,
        fixed=_fixed,
        states=_STATES,
    )
)
