"""Families whose layers have experts, all or some of them."""

from __future__ import annotations

import dataclasses

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import (
    POST_NORMS,
    TWO_NORMS,
    WIDE_NORM,
    always,
    attention,
    experts,
    flag,
    gated_mlp,
    is_of,
    linear,
    norms,
    one_by_one,
    stacked,
    unless,
)
from minitron_kernels.pruning.families.registry import family_of, register_family
from minitron_kernels.pruning.families.tables.shared_experts import (
    qwen_dense_layers,
    qwen_is_sparse,
    shared_expert,
)

_BIAS = flag("attention_bias")
_NORMS = norms(*TWO_NORMS)
# of families with experts in all layers
_ONLY_EXPERTS = {"mlp": (), "expert_mlp": ("intermediate_size",), "experts": ("num_local_experts",)}
_EXPERT_TAPS = Taps(mlp_down=None, mlp_up=None, experts="mlp.experts")

_MIXTRAL = (*attention(), *_NORMS)
register_family(
    Family(
        ("mixtral",),
        layer=(*_MIXTRAL, *experts("mlp")),
        stored_layer=(
            *_MIXTRAL,
            *one_by_one("block_sparse_moe", names=("w1", "w3", "w2")),
        ),
        taps=_EXPERT_TAPS,
        size_keys=_ONLY_EXPERTS,
        is_sparse=always,
    )
)

_QWEN3_MOE = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True),
    *norms(*TWO_NORMS),
    *gated_mlp(when=unless(qwen_is_sparse)),
)
register_family(
    Family(
        ("qwen3_moe",),
        layer=(*_QWEN3_MOE, *experts("mlp", qwen_is_sparse)),
        stored_layer=(
            *_QWEN3_MOE,
            *one_by_one("mlp", qwen_is_sparse),
        ),
        taps=Taps(experts="mlp.experts"),
        size_keys={
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
        },
        is_sparse=qwen_is_sparse,
        dense_layers=qwen_dense_layers,
    )
)

# Mellum 2: the same, where the config has the kind of each layer's MLP and of its attention
_MELLUM_SPARSE = is_of("sparse", "mlp_layer_types")
_MELLUM = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True),
    *_NORMS,
    *gated_mlp(when=unless(_MELLUM_SPARSE)),
)
register_family(
    Family(
        ("mellum",),
        layer=(*_MELLUM, *experts("mlp", _MELLUM_SPARSE)),
        stored_layer=(*_MELLUM, *one_by_one("mlp", _MELLUM_SPARSE)),
        taps=Taps(experts="mlp.experts"),
        size_keys={
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
        },
        is_sparse=_MELLUM_SPARSE,
        per_layer_keys=("layer_types", "mlp_layer_types"),
    )
)

# ---- MiniMax-M2: norms over all heads, and a learned correction of the router's choice

_MINIMAX = (*attention(wide_norm=True), *_NORMS)
register_family(
    Family(
        ("minimax_m2",),
        layer=(
            *_MINIMAX,
            *experts("mlp"),
            Param("mlp.e_score_correction_bias", "experts", buffer=True),
        ),
        stored_layer=(
            *_MINIMAX,
            *one_by_one("block_sparse_moe", names=("w1", "w3", "w2")),
            Param("block_sparse_moe.e_score_correction_bias", "experts", buffer=True),
        ),
        taps=_EXPERT_TAPS,
        size_keys=_ONLY_EXPERTS,
        is_sparse=always,
        approximates={"heads": WIDE_NORM, "kv_heads": WIDE_NORM},
    )
)

# ---- OLMoE: norms of queries and keys that are as wide as the residual stream


def _norms_fit_heads(config: Config) -> str | None:
    hidden, heads = config_value(config, "hidden_size"), config_value(config, "num_attention_heads")
    dim = config_value(config, "head_dim", hidden // heads)
    if heads * dim == hidden:
        return None
    return (
        f"its q_norm has hidden_size {hidden} elements, but is over {heads} heads of {dim}: cut hidden_size "
        "and num_attention_heads alike"
    )


_OLMOE = (*attention(qkv_bias=_BIAS, out_bias=_BIAS, wide_norm=True), *_NORMS)
register_family(
    Family(
        ("olmoe",),
        layer=(*_OLMOE, *experts("mlp")),
        stored_layer=(*_OLMOE, *one_by_one("mlp")),
        taps=_EXPERT_TAPS,
        size_keys={**_ONLY_EXPERTS, "experts": ("num_experts", "num_local_experts")},
        is_sparse=always,
        refuses=_norms_fit_heads,
        approximates={"heads": WIDE_NORM, "kv_heads": WIDE_NORM},
    )
)

# ---- FlexOlmo: OLMo 2, whose norms are behind attention and MLP, with OLMoE's experts

_FLEX = (*attention(qkv_bias=_BIAS, out_bias=_BIAS, wide_norm=True), *norms(*POST_NORMS))
register_family(
    Family(
        ("flex_olmo",),
        layer=(*_FLEX, *experts("mlp")),
        stored_layer=(*_FLEX, *one_by_one("mlp")),
        taps=dataclasses.replace(_EXPERT_TAPS, scored_norms=POST_NORMS, norms=POST_NORMS),
        size_keys={**_ONLY_EXPERTS, "experts": ("num_experts", "num_local_experts")},
        is_sparse=always,
        approximates={"heads": WIDE_NORM, "kv_heads": WIDE_NORM},
    )
)

# ---- Granite-MoE

_GRANITE = (*attention(qkv_bias=_BIAS, out_bias=_BIAS), *_NORMS)
_GRANITE_BLOCK = "block_sparse_moe"
register_family(
    Family(
        ("granitemoe",),
        layer=(
            *_GRANITE,
            Param(f"{_GRANITE_BLOCK}.router.weight", "experts, hidden"),
            *stacked(f"{_GRANITE_BLOCK}.experts"),
        ),
        stored_layer=(
            *_GRANITE,
            Param(f"{_GRANITE_BLOCK}.router.layer.weight", "experts, hidden"),
            Param(f"{_GRANITE_BLOCK}.input_linear.weight", "experts, expert_mlp+expert_mlp, hidden"),
            Param(f"{_GRANITE_BLOCK}.output_linear.weight", "experts, hidden, expert_mlp"),
        ),
        taps=Taps(mlp_down=None, mlp_up=None, experts=f"{_GRANITE_BLOCK}.experts"),
        size_keys=_ONLY_EXPERTS,
        is_sparse=always,
    )
)


def _has_shared(config: Config, layer: int) -> bool:
    return config_value(config, "shared_intermediate_size", 0) > 0


_SHARED = (
    *linear("shared_mlp.input_linear", "mlp+mlp, hidden", when=_has_shared),
    *linear("shared_mlp.output_linear", "hidden, mlp", when=_has_shared),
)
_granite = family_of({"model_type": "granitemoe"})
register_family(
    dataclasses.replace(
        _granite,
        model_types=("granitemoeshared",),
        layer=(*_granite.layer, *_SHARED),
        stored_layer=(*(_granite.stored_layer or ()), *_SHARED),
        taps=Taps(
            mlp_down="shared_mlp.output_linear",
            mlp_up="shared_mlp.input_linear",
            mlp_up_part=(1, 2),
            experts=f"{_GRANITE_BLOCK}.experts",
        ),
        size_keys={**_ONLY_EXPERTS, "mlp": ("shared_intermediate_size",)},
    )
)

_shared = family_of({"model_type": "granitemoeshared"})
register_family(
    dataclasses.replace(
        _shared,
        model_types=("granitemoe_swa",),
        layer=(*_shared.layer, Param("self_attn.sinks", "num_heads")),
        stored_layer=None,
        per_layer_keys=("layer_types", "layer_rope_theta"),
    )
)

# ---- gpt-oss: weights are [in, out] with gate and neuron in turn, and heads have sinks

_OSS_BIAS = flag("attention_bias", True)
register_family(
    Family(
        ("gpt_oss",),
        layer=(
            *attention(qkv_bias=_OSS_BIAS, out_bias=_OSS_BIAS),
            Param("self_attn.sinks", "num_heads"),
            *_NORMS,
            *linear("mlp.router", "experts, hidden", True),
            Param("mlp.experts.gate_up_proj", "experts, hidden, expert_mlp*2"),
            Param("mlp.experts.gate_up_proj_bias", "experts, expert_mlp*2"),
            Param("mlp.experts.down_proj", "experts, expert_mlp, hidden"),
            Param("mlp.experts.down_proj_bias", "experts, hidden"),
        ),
        taps=_EXPERT_TAPS,
        size_keys=_ONLY_EXPERTS,
        is_sparse=always,
    )
)

# ---- Llama 4: the router's weight multiplies what an expert reads; all experts are as wide as the shared one


_SAME_SIZE = (
    "intermediate_size is the width of its shared expert too, which would have to be cut alike; there are no "
    "scores of its neurons"
)


def _llama4_is_sparse(config: Config, layer: int) -> bool:
    return layer in config_value(config, "moe_layers", ())


register_family(
    Family(
        ("llama4_text",),
        layer=(
            *attention(qkv_bias=_BIAS, out_bias=_BIAS),
            *_NORMS,
            *linear("feed_forward.gate_proj", "mlp, hidden", when=unless(_llama4_is_sparse)),
            *linear("feed_forward.up_proj", "mlp, hidden", when=unless(_llama4_is_sparse)),
            *linear("feed_forward.down_proj", "hidden, mlp", when=unless(_llama4_is_sparse)),
            *shared_expert("feed_forward.shared_expert", _llama4_is_sparse),
            Param("feed_forward.router.weight", "experts, hidden", _llama4_is_sparse),
            Param(
                "feed_forward.experts.gate_up_proj",
                "experts, hidden, expert_mlp+expert_mlp",
                _llama4_is_sparse,
            ),
            Param("feed_forward.experts.down_proj", "experts, expert_mlp, hidden", _llama4_is_sparse),
        ),
        taps=Taps(
            mlp_down="feed_forward.down_proj",
            mlp_up="feed_forward.up_proj",
            experts="feed_forward.experts",
            router="feed_forward.router",
        ),
        size_keys={
            "mlp": ("intermediate_size_mlp",),
            "expert_mlp": ("intermediate_size",),
            "shared_mlp": ("intermediate_size",),
            "experts": ("num_local_experts",),
        },
        is_sparse=_llama4_is_sparse,
        per_layer_keys=("layer_types", "no_rope_layers"),
        layer_index_keys=("moe_layers",),
        fixed=lambda config: {"expert_mlp": _SAME_SIZE},
    )
)
