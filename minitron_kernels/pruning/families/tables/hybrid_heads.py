"""Families whose layers have attention of several kinds: their heads stay, and all else can be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minitron_kernels.pruning.families.configs import Config, config_value, full_config
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import (
    FOUR_NORMS,
    both,
    flag,
    gated_mlp,
    is_of,
    linear,
    norms,
    outer,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State

_BIAS = flag("attention_bias")


# ---- Gemma 4: heads of full attention have another size, and layers an embedding of their own

_SLIDING = is_of("sliding_attention")


def _in_full(key: str) -> Callable[[Config], int]:
    """An entry of the config that layers of full attention have for themselves."""

    def size(config: Config) -> int:
        full = full_config(config)
        assert full is not None
        layers = [i for i, kind in enumerate(full.layer_types) if kind == "full_attention"]
        return int(getattr(full.per_layer_config[layers[0]] if layers else full, key))

    return size


def _layer_inputs(config: Config) -> int:
    """The width of all layers' embeddings of a token beside each other."""
    if config_value(config, "enable_moe_block", False):
        raise ValueError("the config has enable_moe_block: no table describes its experts beside the MLP")
    return config_value(config, "num_hidden_layers") * config_value(config, "hidden_size_per_layer_input", 0)


def _width(heads: str) -> Callable[[Config], int]:
    dim, count = _in_full("head_dim"), _in_full(heads)
    return lambda config: dim(config) * count(config)


def _has_keys(config: Config, layer: int) -> bool:
    """Whether a layer has keys and values of its own."""
    layers, shared = (config_value(config, f"num_{kind}_layers", 0) for kind in ("hidden", "kv_shared"))
    return layer < layers - shared


def _has_values(config: Config, layer: int) -> bool:
    return _SLIDING(config, layer) or not config_value(config, "attention_k_eq_v", False)


def _is_double(config: Config, layer: int) -> bool:
    """Whether a layer's MLP has twice intermediate_size neurons."""
    return bool(config_value(config, "use_double_wide_mlp", False)) and not _has_keys(config, layer)


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
_GEMMA4_KEYS = tuple(State(f"{kv}+{kv}", both(when, _has_keys)) for when, _, kv, _ in _FULL_KINDS)
_GEMMA4_MLP = (
    *gated_mlp(when=unless(_is_double)),
    *linear("mlp.gate_proj", "mlp*2, hidden", when=_is_double),
    *linear("mlp.up_proj", "mlp*2, hidden", when=_is_double),
    *linear("mlp.down_proj", "hidden, mlp*2", when=_is_double),
)
_INPUT_NORM = "post_per_layer_input_norm"


def _gemma4_fixed(config: Config) -> Mapping[str, str]:
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
            *_GEMMA4_MLP,
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
            "layer_inputs": _layer_inputs,
        },
        scales_embedding=True,
        reads_residual=("per_layer_input_gate",),
        fixed=_gemma4_fixed,
        token_states=_GEMMA4_KEYS,
        reads_per_layer=True,
    )
)
