"""Families whose layers have experts, all or some of them."""

from __future__ import annotations

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import (
    TWO_NORMS,
    always,
    attention,
    experts,
    flag,
    gated_mlp,
    norms,
)
from minitron_kernels.pruning.families.registry import register_family


def _is_sparse(config: Config, layer: int) -> bool:
    """Qwen3-MoE: every decoder_sparse_step-th layer, except those in mlp_only_layers."""
    step = config_value(config, "decoder_sparse_step", 1)
    dense = config_value(config, "mlp_only_layers", ())
    return layer not in dense and (layer + 1) % step == 0


_MIXTRAL = (*attention(), *norms(*TWO_NORMS))
register_family(
    Family(
        ("mixtral",),
        layer=(*_MIXTRAL, *experts("mlp")),
        stored_layer=(
            *_MIXTRAL,
            Param("block_sparse_moe.gate.weight", "experts, hidden"),
            Param("block_sparse_moe.experts.{expert}.w1.weight", "expert_mlp, hidden"),
            Param("block_sparse_moe.experts.{expert}.w2.weight", "hidden, expert_mlp"),
            Param("block_sparse_moe.experts.{expert}.w3.weight", "expert_mlp, hidden"),
        ),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts"),
        size_keys={
            "mlp": (),
            "expert_mlp": ("intermediate_size",),
            "experts": ("num_local_experts",),
        },
        is_sparse=always,
    )
)

_BIAS = flag("attention_bias")
_QWEN3_MOE = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True),
    *norms(*TWO_NORMS),
    *gated_mlp(when=lambda config, layer: not _is_sparse(config, layer)),
)
register_family(
    Family(
        ("qwen3_moe",),
        layer=(*_QWEN3_MOE, *experts("mlp", _is_sparse)),
        stored_layer=(
            *_QWEN3_MOE,
            Param("mlp.gate.weight", "experts, hidden", _is_sparse),
            Param("mlp.experts.{expert}.gate_proj.weight", "expert_mlp, hidden", _is_sparse),
            Param("mlp.experts.{expert}.up_proj.weight", "expert_mlp, hidden", _is_sparse),
            Param("mlp.experts.{expert}.down_proj.weight", "hidden, expert_mlp", _is_sparse),
        ),
        taps=Taps(experts="mlp.experts"),
        size_keys={
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
        },
        is_sparse=_is_sparse,
        dense_layers=lambda layers: {"mlp_only_layers": layers, "decoder_sparse_step": 1},
    )
)
