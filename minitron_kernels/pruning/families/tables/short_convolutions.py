"""Families with short convolutions in most layers and attention in the others."""

from __future__ import annotations

from typing import Any

from minitron_kernels.pruning.families.configs import Config, config_value, written_value
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import (
    attention,
    both,
    flag,
    is_of,
    linear,
    norms,
    one_by_one,
    outer,
    stacked,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State

_CONV = is_of("conv")
_BIAS = flag("conv_bias")
_NORMS = ("operator_norm", "ffn_norm")
_BLOCK = "feed_forward"
# B, C and x, a convolution over B · x, and C times that: as many channels as the residual stream has, but
# others, which each layer has for itself
_MIXERS = (
    *linear("conv.in_proj", "conv+conv+conv, hidden", _BIAS, when=_CONV),
    Param("conv.conv.weight", "conv, one, conv_kernel", _CONV),
    Param("conv.conv.bias", "conv", both(_CONV, _BIAS)),
    *linear("conv.out_proj", "hidden, conv", _BIAS, when=_CONV),
    *attention(
        qk_norm=True, qk_norm_names=("q_layernorm", "k_layernorm"), out="out_proj", when=unless(_CONV)
    ),
    *norms(*_NORMS),
)


def _mlp(when: When | None = None) -> tuple[Param, ...]:
    return (
        *linear(f"{_BLOCK}.w1", "mlp, hidden", when=when),
        *linear(f"{_BLOCK}.w3", "mlp, hidden", when=when),
        *linear(f"{_BLOCK}.w2", "hidden, mlp", when=when),
    )


_OUTER = outer("model.embedding_norm")
_SHARED: dict[str, Any] = dict(
    outer=_OUTER,
    final_norm="model.embedding_norm",
    follows={"conv": "hidden"},
    states=(State("conv, conv_kernel", _CONV),),
)
_SIZES = {"conv": ("hidden_size",), "conv_kernel": ("conv_L_cache",)}


def _taps(experts: str | None = None) -> Taps:
    return Taps(
        attention_out="self_attn.out_proj",
        mlp_down=f"{_BLOCK}.w2",
        mlp_up=f"{_BLOCK}.w3",
        scored_norms=_NORMS,
        norms=_NORMS,
        conv_out="conv.out_proj",
        experts=experts,
    )


# ---- LFM2: intermediate_size is not what the MLP has, unless block_auto_adjust_ff_dim is off


def _mlp_size(config: Config) -> int:
    # transformers takes block_ff_dim, where a config.json has it, for intermediate_size
    size = written_value(config, "block_ff_dim") or config_value(config, "intermediate_size")
    if not config_value(config, "block_auto_adjust_ff_dim", True):
        return size
    size, step = int(2 * size / 3), config_value(config, "block_multiple_of", 256)
    size = int(config_value(config, "block_ffn_dim_multiplier", 1.0) * size)
    return -(-size // step) * step


# what config.json of LiquidAI's own checkpoints has beside the keys of transformers
_RESTATED: dict[str, Any] = {
    "block_ff_dim": lambda config: config["intermediate_size"],
    "tie_embedding": lambda config: config["tie_word_embeddings"],
    "num_heads": lambda config: config["num_attention_heads"],
    **dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), lambda config: config["hidden_size"]),
}
register_family(
    Family(
        ("lfm2",),
        layer=(*_MIXERS, *_mlp()),
        taps=_taps(),
        size_keys=_SIZES,
        computed={"mlp": _mlp_size},
        derived={"block_auto_adjust_ff_dim": lambda sizes, config: False},
        layer_index_keys=("full_attn_idxs",),
        restated=_RESTATED,
        **_SHARED,
    )
)

# ---- LFM2-MoE: dense layers first, and a learned correction of the router's choice


def _is_sparse(config: Config, layer: int) -> bool:
    return layer >= config_value(config, "num_dense_layers", 0)


_LFM2_MOE = (
    *_MIXERS,
    *_mlp(unless(_is_sparse)),
    Param(f"{_BLOCK}.expert_bias", "experts", both(_is_sparse, flag("use_expert_bias", True)), buffer=True),
)
register_family(
    Family(
        ("lfm2_moe",),
        layer=(
            *_LFM2_MOE,
            Param(f"{_BLOCK}.gate.weight", "experts, hidden", _is_sparse),
            *stacked(f"{_BLOCK}.experts", _is_sparse),
        ),
        stored_layer=(*_LFM2_MOE, *one_by_one(_BLOCK, _is_sparse, ("w1", "w3", "w2"))),
        taps=_taps(f"{_BLOCK}.experts"),
        size_keys={**_SIZES, "expert_mlp": ("moe_intermediate_size",), "experts": ("num_experts",)},
        is_sparse=_is_sparse,
        dense_layers=lambda layers: {"num_dense_layers": len(layers)},
        restated={key: value for key, value in _RESTATED.items() if key != "block_ff_dim"},
        **_SHARED,
    )
)
