"""Families whose layers have shared experts, which serve every token, beside those that are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    linear,
    norms,
    one_by_one,
    one_key_for_each_head,
    two_experts,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State

_BIAS = flag("attention_bias")
_SHARED_SIZE = (
    "its shared experts have n_shared_experts * moe_intermediate_size neurons, so that they would have to be "
    "cut alike; there are no scores of their neurons"
)
_GROUPS = (
    "tokens choose among n_group groups of experts first: equally many would have to stay in each group, and "
    "plans choose among all; with n_group 1 experts can go"
)


def shared_expert(block: str, when: When, bias: When | bool = False) -> tuple[Param, ...]:
    """A shared expert, whose neurons stay."""
    return tuple(
        param
        for name, axes in (
            ("gate_proj", "shared_mlp, hidden"),
            ("up_proj", "shared_mlp, hidden"),
            ("down_proj", "hidden, shared_mlp"),
        )
        for param in linear(f"{block}.{name}", axes, bias, when=when)
    )


# ---- Qwen2-MoE: a shared expert of a size of its own, and a gate for it


def qwen_is_sparse(config: Config, layer: int) -> bool:
    """Qwen2-MoE, Qwen3-MoE: every decoder_sparse_step-th layer, except those in mlp_only_layers."""
    step = config_value(config, "decoder_sparse_step", 1)
    dense = config_value(config, "mlp_only_layers", ())
    return layer not in dense and (layer + 1) % step == 0


def qwen_dense_layers(layers: list[int]) -> dict[str, object]:
    """The config entries of a model in which these layers, and no others, have one MLP."""
    return {"mlp_only_layers": layers, "decoder_sparse_step": 1}


QWEN_SIZES = {
    "expert_mlp": ("moe_intermediate_size",),
    "experts": ("num_experts", "num_local_experts"),
    "shared_mlp": ("shared_expert_intermediate_size",),
}
SHARED_GATE = Param("mlp.shared_expert_gate.weight", "one, hidden")
_QWEN2_MOE = (
    *attention(qkv_bias=flag("qkv_bias", True)),
    *norms(*TWO_NORMS),
    *gated_mlp(when=unless(qwen_is_sparse)),
    *shared_expert("mlp.shared_expert", qwen_is_sparse),
    dataclasses.replace(SHARED_GATE, when=qwen_is_sparse),
)
register_family(
    Family(
        ("qwen2_moe",),
        layer=(*_QWEN2_MOE, *experts("mlp", qwen_is_sparse)),
        stored_layer=(*_QWEN2_MOE, *one_by_one("mlp", qwen_is_sparse)),
        taps=Taps(experts="mlp.experts"),
        size_keys=QWEN_SIZES,
        is_sparse=qwen_is_sparse,
        dense_layers=qwen_dense_layers,
    )
)

# ---- DeepSeek, GLM-4-MoE, dots.llm1: dense layers first, and a learned correction of the router's choice


def _is_sparse(config: Config, layer: int) -> bool:
    return layer >= config_value(config, "first_k_dense_replace", 0)


def _fixed(config: Config) -> Mapping[str, str]:
    groups = config_value(config, "n_group", 1)
    fixed = {"experts": _GROUPS} if groups > 1 else {}
    return {**fixed, "expert_mlp": _SHARED_SIZE}


_CORRECTION = "mlp.gate.e_score_correction_bias"
_FIRST_DENSE: dict[str, Any] = dict(dense_layers=lambda layers: {"first_k_dense_replace": len(layers)})


def _deepseek_like(
    model_type: str,
    attention: tuple[Param, ...],
    *,
    corrected: bool = True,
    stored_correction: str = _CORRECTION,
    mlp_bias: When | bool = False,
    sparse: When = _is_sparse,
    experts_key: str = "n_routed_experts",
    refuses: Callable[[Config], str | None] = lambda config: None,
    **more: Any,
) -> Family:
    """Dense layers, and others with experts that are chosen and shared ones.

    corrected: whether a learned correction is added for the router's choice; stored_correction: its name in
    checkpoints. mlp_bias: of dense layers and shared experts. sparse: which layers have experts.
    experts_key: of how many.
    """
    common = (
        *attention,
        *norms(*TWO_NORMS),
        *gated_mlp(mlp_bias, unless(sparse)),
        *shared_expert("mlp.shared_experts", sparse, mlp_bias),
    )

    def correction(name: str) -> tuple[Param, ...]:
        return (Param(name, "experts", sparse, buffer=True),) if corrected else ()

    return Family(
        (model_type,),
        layer=(*common, *correction(_CORRECTION), *experts("mlp", sparse)),
        stored_layer=(*common, *correction(stored_correction), *one_by_one("mlp", sparse)),
        taps=Taps(experts="mlp.experts"),
        is_sparse=sparse,
        fixed=_fixed,
        # of these the routers compare groups by the sum of their two best
        refuses=lambda config: refuses(config) or (two_experts(config, experts_key) if corrected else None),
        **more,
    )


_EXPERT_KEYS = {
    "expert_mlp": ("moe_intermediate_size",),
    "experts": ("n_routed_experts", "num_local_experts"),
}


def _neurons(number_key: str) -> Callable[[Config], int]:
    """The neurons of all shared experts, of which the config has the number under this key."""
    return lambda config: config_value(config, "moe_intermediate_size") * config_value(config, number_key, 1)


_shared_size = _neurons("n_shared_experts")
_MLP_KINDS = is_of("sparse", "mlp_layer_types")  # where the config has the kind of each layer's MLP


_GLM4 = attention(qkv_bias=_BIAS, qk_norm=flag("use_qk_norm"))
_DOTS = attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True)
for _type, _attention in (("glm4_moe", _GLM4), ("dots1", _DOTS)):
    register_family(
        _deepseek_like(
            _type,
            _attention,
            size_keys=_EXPERT_KEYS,
            computed={"shared_mlp": _shared_size},
            **_FIRST_DENSE,
        )
    )
# K-EXAONE: dots.llm1 by other keys, and windows
register_family(
    _deepseek_like(
        "exaone_moe",
        attention(qk_norm=True),
        stored_correction="mlp.e_score_correction_bias",
        sparse=_MLP_KINDS,
        experts_key="num_experts",
        per_layer_keys=("layer_types", "mlp_layer_types"),
        size_keys={"expert_mlp": ("moe_intermediate_size",), "experts": ("num_experts",)},
        computed={"shared_mlp": _neurons("num_shared_experts")},
    )
)
# Solar Open: no dense layers
register_family(
    dataclasses.replace(
        _deepseek_like(
            "solar_open",
            attention(qkv_bias=_BIAS),
            sparse=always,
            size_keys={**_EXPERT_KEYS, "mlp": ()},
            computed={"shared_mlp": _shared_size},
        ),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts"),
    )
)


def _compresses_queries(config: Config, layer: int) -> bool:
    return config_value(config, "q_lora_rank") is not None


def _sum_of(*keys: str) -> Callable[[Config], int]:
    return lambda config: sum(config_value(config, key) for key in keys)


# multi-head latent attention: heads read two latents, whose sizes stay, and each has a key and a value
_LATENT = (
    Param("self_attn.q_proj.weight", "heads*qk_dim, hidden", unless(_compresses_queries)),
    Param("self_attn.q_a_proj.weight", "q_latent, hidden", _compresses_queries),
    Param("self_attn.q_a_proj.bias", "q_latent", both(_compresses_queries, _BIAS)),
    Param("self_attn.q_a_layernorm.weight", "q_latent", _compresses_queries),
    Param("self_attn.q_b_proj.weight", "heads*qk_dim, q_latent", _compresses_queries),
    *linear("self_attn.kv_a_proj_with_mqa", "kv_latent+rope_dim, hidden", _BIAS),
    Param("self_attn.kv_a_layernorm.weight", "kv_latent"),
    Param("self_attn.kv_b_proj.weight", "heads*kv_b_dim, kv_latent"),
    *linear("self_attn.o_proj", "hidden, heads", _BIAS),
)

_LATENT_KEYS = {
    "head_dim": ("v_head_dim",),
    "q_latent": ("q_lora_rank",),
    "kv_latent": ("kv_lora_rank",),
    "rope_dim": ("qk_rope_head_dim",),
}
_LATENT_COMPUTED = {
    "qk_dim": _sum_of("qk_nope_head_dim", "qk_rope_head_dim"),
    "kv_b_dim": _sum_of("qk_nope_head_dim", "v_head_dim"),
}
# keys and values are made of these anew for each token that reads them
_LATENT_STATES = (State("kv_latent+rope_dim", always),)
_LATENT_SIZES: dict[str, Any] = dict(
    token_states=_LATENT_STATES,
    size_keys={**_EXPERT_KEYS, **_LATENT_KEYS},
    computed={"shared_mlp": _shared_size, **_LATENT_COMPUTED},
    refuses=one_key_for_each_head,
)
register_family(
    _deepseek_like(
        "deepseek_v2", _LATENT, corrected=False, mlp_bias=flag("mlp_bias"), **_LATENT_SIZES, **_FIRST_DENSE
    )
)
register_family(_deepseek_like("deepseek_v3", _LATENT, **_LATENT_SIZES, **_FIRST_DENSE))
# GLM-4.7-Flash: the config has the kind of each layer's MLP
register_family(
    _deepseek_like(
        "glm4_moe_lite",
        _LATENT,
        sparse=_MLP_KINDS,
        per_layer_keys=("layer_types", "mlp_layer_types"),
        **_LATENT_SIZES,
    )
)
# Youtu-LLM: no experts
register_family(
    Family(
        ("youtu",),
        layer=(*_LATENT, *gated_mlp(), *norms(*TWO_NORMS)),
        size_keys=_LATENT_KEYS,
        computed=_LATENT_COMPUTED,
        refuses=one_key_for_each_head,
        token_states=_LATENT_STATES,
    )
)
