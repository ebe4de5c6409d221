"""Families with gated delta nets in most layers, whose heads stay, and gated attention in the others."""

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
from minitron_kernels.pruning.families.tables.shared_experts import (
    QWEN_SIZES,
    SHARED_GATE,
    qwen_dense_layers,
    qwen_is_sparse,
    shared_expert,
)

_BIAS = flag("attention_bias")
_LINEAR, _FULL = is_of("linear_attention"), is_of("full_attention")
_HEADS = (
    "there are no scores of the heads of a gated delta net, whose keys serve several values each and whose "
    "state is as wide as both"
)


def _value_width(config: Config) -> int:
    return config_value(config, "linear_num_value_heads") * config_value(config, "linear_value_head_dim")


def _qkv_width(config: Config) -> int:
    key = config_value(config, "linear_num_key_heads") * config_value(config, "linear_key_head_dim")
    return 2 * key + _value_width(config)


_COMPUTED = {
    "delta_qkv": _qkv_width,
    "delta_value": _value_width,
    "delta_qkvz": lambda config: _qkv_width(config) + _value_width(config),
    "query_and_gate": lambda config: 2 * config_value(config, "head_dim"),
}
_SIZES = {
    "delta_heads": ("linear_num_value_heads",),
    "delta_head_dim": ("linear_value_head_dim",),
    "delta_kernel": ("linear_conv_kernel_dim",),
}


def _fixed(_config: Config) -> Mapping[str, str]:
    return dict.fromkeys(("delta_heads", "delta_head_dim"), _HEADS)


_DELTA_NET = tuple(
    Param(f"linear_attn.{name}", axes, _LINEAR)
    for name, axes in (
        ("conv1d.weight", "delta_qkv, one, delta_kernel"),
        ("dt_bias", "delta_heads"),
        ("A_log", "delta_heads"),
        ("norm.weight", "delta_head_dim"),
        ("out_proj.weight", "hidden, delta_value"),
    )
)
# q_proj has, of each head, its query and behind it the gate of its output
_ATTENTION = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True, query="heads*query_and_gate", when=_FULL),
    *norms(*TWO_NORMS),
)

# ---- Qwen3.5 and Qwen3.5-MoE: four projections into a delta net

_QWEN3_5 = (
    *_DELTA_NET,
    Param("linear_attn.in_proj_qkv.weight", "delta_qkv, hidden", _LINEAR),
    Param("linear_attn.in_proj_z.weight", "delta_value, hidden", _LINEAR),
    Param("linear_attn.in_proj_b.weight", "delta_heads, hidden", _LINEAR),
    Param("linear_attn.in_proj_a.weight", "delta_heads, hidden", _LINEAR),
    *_ATTENTION,
)
register_family(
    Family(
        ("qwen3_5_text",),
        layer=(*_QWEN3_5, *gated_mlp()),
        size_keys=_SIZES,
        computed=_COMPUTED,
        norm_offset=1.0,
        fixed=_fixed,
    )
)
_QWEN3_5_MOE = (*_QWEN3_5, *shared_expert("mlp.shared_expert", always), SHARED_GATE)
register_family(
    Family(
        ("qwen3_5_moe_text",),
        layer=(*_QWEN3_5_MOE, *experts("mlp")),
        stored_layer=(*_QWEN3_5_MOE, *one_by_one("mlp")),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts"),
        size_keys={**_SIZES, **QWEN_SIZES, "mlp": ()},
        computed=_COMPUTED,
        norm_offset=1.0,
        is_sparse=always,
        fixed=_fixed,
    )
)

# ---- Qwen3-Next: two projections, key head after key head, and layers without experts where the config says


def _has_any(config: Config, layer: int) -> bool:
    return config_value(config, "num_experts", 0) > 0


_IS_SPARSE: When = both(_has_any, qwen_is_sparse)
_QWEN3_NEXT = (
    *_DELTA_NET,
    Param("linear_attn.in_proj_qkvz.weight", "delta_qkvz, hidden", _LINEAR),
    Param("linear_attn.in_proj_ba.weight", "delta_heads*2, hidden", _LINEAR),
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
        taps=Taps(experts="mlp.experts"),
        size_keys={**_SIZES, **QWEN_SIZES},
        computed=_COMPUTED,
        norm_offset=1.0,
        is_sparse=_IS_SPARSE,
        dense_layers=qwen_dense_layers,
        fixed=_fixed,
    )
)
