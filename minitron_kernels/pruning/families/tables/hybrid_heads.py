"""Families whose layers have attention of several kinds: their heads stay, and all else can be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minitron_kernels.pruning.families.configs import Config, config_value, full_config
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import (
    FOUR_NORMS,
    TWO_NORMS,
    always,
    both,
    experts,
    flag,
    gated_mlp,
    linear,
    norms,
    one_by_one,
    outer,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.tables.shared_experts import SHARED_GATE, shared_expert

_BIAS = flag("attention_bias")


def _is_of(kind: str) -> When:
    return lambda config, layer: config_value(config, "layer_types")[layer] == kind


# ---- Qwen3.5-MoE: gated delta nets in most layers, attention with a gate in the others

_LINEAR, _FULL = _is_of("linear_attention"), _is_of("full_attention")
_DELTA_NETS = (
    "most of its layers have a gated delta net, for whose heads there are no scores, and "
    "the others would have to be cut alone"
)


def _delta_net(config: Config) -> dict[str, int]:
    """The widths inside a gated delta net: of queries, keys and values together, and of values."""
    key, value = (
        config_value(config, f"linear_num_{kind}_heads") * config_value(config, f"linear_{kind}_head_dim")
        for kind in ("key", "value")
    )
    return {"qkv": 2 * key + value, "value": value}


def _query_and_gate(config: Config) -> int:
    return 2 * config_value(config, "num_attention_heads") * config_value(config, "head_dim")


_QWEN3_5 = (
    Param("linear_attn.conv1d.weight", "delta_qkv, one, delta_kernel", _LINEAR),
    Param("linear_attn.dt_bias", "delta_heads", _LINEAR),
    Param("linear_attn.A_log", "delta_heads", _LINEAR),
    Param("linear_attn.norm.weight", "delta_head_dim", _LINEAR),
    Param("linear_attn.out_proj.weight", "hidden, delta_value", _LINEAR),
    Param("linear_attn.in_proj_qkv.weight", "delta_qkv, hidden", _LINEAR),
    Param("linear_attn.in_proj_z.weight", "delta_value, hidden", _LINEAR),
    Param("linear_attn.in_proj_b.weight", "delta_heads, hidden", _LINEAR),
    Param("linear_attn.in_proj_a.weight", "delta_heads, hidden", _LINEAR),
    *linear("self_attn.q_proj", "query_and_gate, hidden", _BIAS, when=_FULL),
    *linear("self_attn.k_proj", "kv_heads, hidden", _BIAS, when=_FULL),
    *linear("self_attn.v_proj", "kv_heads, hidden", _BIAS, when=_FULL),
    *linear("self_attn.o_proj", "hidden, heads", _BIAS, when=_FULL),
    Param("self_attn.q_norm.weight", "head_dim", _FULL),
    Param("self_attn.k_norm.weight", "head_dim", _FULL),
    *norms(*TWO_NORMS),
    *shared_expert("mlp.shared_expert", always),
    SHARED_GATE,
)
register_family(
    Family(
        ("qwen3_5_moe_text",),
        layer=(*_QWEN3_5, *experts("mlp")),
        stored_layer=(*_QWEN3_5, *one_by_one("mlp")),
        taps=Taps(mlp_down=None, mlp_up=None, experts="mlp.experts"),
        size_keys={
            "mlp": (),
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("num_experts", "num_local_experts"),
            "shared_mlp": ("shared_expert_intermediate_size",),
            "delta_heads": ("linear_num_value_heads",),
            "delta_head_dim": ("linear_value_head_dim",),
            "delta_kernel": ("linear_conv_kernel_dim",),
        },
        computed={
            "delta_qkv": lambda config: _delta_net(config)["qkv"],
            "delta_value": lambda config: _delta_net(config)["value"],
            "query_and_gate": _query_and_gate,
        },
        norm_offset=1.0,
        is_sparse=always,
        fixed=lambda config: dict.fromkeys(("heads", "kv_heads"), _DELTA_NETS),
    )
)

# ---- Gemma 4: heads of full attention have another size, and layers an embedding of their own

_SLIDING = _is_of("sliding_attention")


def _in_full(key: str) -> Callable[[Config], int]:
    """An entry of the config that layers of full attention have for themselves."""

    def size(config: Config) -> int:
        full = full_config(config)
        assert full is not None
        layers = [i for i, kind in enumerate(full.layer_types) if kind == "full_attention"]
        return int(getattr(full.per_layer_config[layers[0]] if layers else full, key))

    return size


def _width(heads: str) -> Callable[[Config], int]:
    dim, count = _in_full("head_dim"), _in_full(heads)
    return lambda config: dim(config) * count(config)


def _has_keys(config: Config, layer: int) -> bool:
    """Whether a layer has keys and values of its own."""
    layers, shared = (config_value(config, f"num_{kind}_layers", 0) for kind in ("hidden", "kv_shared"))
    return layer < layers - shared


def _has_values(config: Config, layer: int) -> bool:
    return _SLIDING(config, layer) or not config_value(config, "attention_k_eq_v", False)


def _layer_input(config: Config, _layer: int) -> bool:
    return bool(config_value(config, "hidden_size_per_layer_input", 0))


_FULL_KINDS = (
    (_SLIDING, "heads", "kv_heads", "head_dim"),
    (unless(_SLIDING), "full_q", "full_kv", "full_dim"),
)
_GEMMA4_ATTENTION = tuple(
    param
    for when, query, kv, dim in _FULL_KINDS
    for param in (
        *linear("self_attn.q_proj", f"{query}, hidden", _BIAS, when=when),
        *linear("self_attn.k_proj", f"{kv}, hidden", _BIAS, when=both(when, _has_keys)),
        *linear("self_attn.v_proj", f"{kv}, hidden", _BIAS, when=both(when, _has_keys, _has_values)),
        *linear("self_attn.o_proj", f"hidden, {query}", _BIAS, when=when),
        Param("self_attn.q_norm.weight", dim, when),
        Param("self_attn.k_norm.weight", dim, both(when, _has_keys)),
    )
)
_INPUT_NORM = "post_per_layer_input_norm"


def _gemma4_fixed(config: Config) -> Mapping[str, str]:
    if config_value(config, "enable_moe_block", False):
        return dict.fromkeys(
            ("hidden", "mlp", "heads", "kv_heads", "layers"),
            "nobody has described its experts beside the MLP",
        )
    fixed = dict.fromkeys(
        ("heads", "kv_heads"),
        "heads of its layers of full attention have another size, and others of its scores",
    )
    fixed["layers"] = "its config has head sizes, layer embeddings and shared keys by the layers' numbers"
    if config_value(config, "use_double_wide_mlp", False) and config_value(config, "num_kv_shared_layers", 0):
        fixed["mlp"] = "the MLPs of layers that share keys have twice intermediate_size"
    return fixed


register_family(
    Family(
        ("gemma4_text",),
        layer=(
            *_GEMMA4_ATTENTION,
            *gated_mlp(),
            *norms(*FOUR_NORMS),
            *norms(_INPUT_NORM, when=_layer_input),
            Param("per_layer_input_gate.weight", "layer_input, hidden", _layer_input),
            Param("per_layer_projection.weight", "hidden, layer_input", _layer_input),
            Param("layer_scalar", "one", buffer=True),
        ),
        outer=(
            *outer(),
            Param("model.embed_tokens_per_layer.weight", "input_vocab, layer_inputs", _layer_input),
            Param("model.per_layer_model_projection.weight", "layer_inputs, hidden", _layer_input),
            Param("model.per_layer_projection_norm.weight", "layer_input", _layer_input),
        ),
        taps=Taps(
            scored_norms=("input_layernorm", "pre_feedforward_layernorm"),
            norms=(*FOUR_NORMS, _INPUT_NORM),
        ),
        size_keys={
            "layer_input": ("hidden_size_per_layer_input",),
            "input_vocab": ("vocab_size_per_layer_input",),
        },
        computed={
            "full_q": _width("num_attention_heads"),
            "full_kv": _width("num_key_value_heads"),
            "full_dim": _in_full("head_dim"),
            "layer_inputs": lambda config: (
                config_value(config, "num_hidden_layers")
                * config_value(config, "hidden_size_per_layer_input", 0)
            ),
        },
        scales_embedding=True,
        reads_residual=("per_layer_input_gate",),
        fixed=_gemma4_fixed,
    )
)
