"""Families with state spaces (Mamba-2) in some or all layers.

A state space has n_groups groups of heads, and the heads of a group share B and C. in_proj gives z, x, B, C
and Δ behind each other, the convolution runs over x, B and C. So heads go from each group alike, and the same
channels go from all heads; B and C stay.

Source: Minitron-SSM (arXiv 2504.11409).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import (
    always,
    attention,
    both,
    experts,
    flag,
    is_of,
    linear,
    norms,
    outer,
    stacked,
    two_experts,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State
from minitron_kernels.pruning.families.stored_names import StoredNames

_FEWER = "the norm in a state space divides by the root mean square of the channels that stay in a group"
_X = "mamba_heads*mamba_dim"  # heads of channels


def _mamba(
    block: str,
    when: When = always,
    *,
    in_bias: When,
    out_bias: When,
    conv_bias: When,
    has_norm: When = always,
) -> tuple[Param, ...]:
    """The parameters of a state space."""
    return (
        *linear(f"{block}.in_proj", f"{_X}+{_X}+mamba_bc+mamba_bc+mamba_heads, hidden", in_bias, when=when),
        Param(f"{block}.conv1d.weight", f"{_X}+mamba_bc+mamba_bc, one, mamba_kernel", when),
        Param(f"{block}.conv1d.bias", f"{_X}+mamba_bc+mamba_bc", both(when, conv_bias)),
        *(Param(f"{block}.{name}", "mamba_heads", when) for name in ("dt_bias", "A_log", "D")),
        Param(f"{block}.norm.weight", _X, both(when, has_norm)),
        *linear(f"{block}.out_proj", f"hidden, {_X}", out_bias, when=when),
    )


def _states(when: When = always) -> tuple[State, ...]:
    """What a state space keeps of a sequence: the convolution's last inputs, and a state of each channel."""
    return (
        State(f"{_X}+mamba_bc+mamba_bc, mamba_kernel", when),
        State("mamba_heads, mamba_dim, mamba_state", when, wide=True),
    )


# of Bamba, Granite and Falcon-H1
_KEYS = {
    "mamba_heads": ("mamba_n_heads",),
    "mamba_dim": ("mamba_d_head",),
    "mamba_groups": ("mamba_n_groups",),
    "mamba_kernel": ("mamba_d_conv",),
    "mamba_state": ("mamba_d_state",),
}


def _bc(groups: str, state: str) -> Callable[[Config], int]:
    """The width of B, and of C: one state for each group."""
    return lambda config: config_value(config, groups) * config_value(config, state)


def _width(config: Config) -> int:
    """Channels of all heads."""
    width = config_value(config, "mamba_d_ssm")
    return width or config_value(config, "mamba_expand", 2) * config_value(config, "hidden_size")


def _dim(config: Config) -> int:
    """Channels of a head: "auto" is what the width leaves for it."""
    dim = config_value(config, "mamba_d_head", "auto")
    return _width(config) // config_value(config, "mamba_n_heads") if dim == "auto" else dim


_COMPUTED = {"mamba_bc": _bc("mamba_n_groups", "mamba_d_state"), "mamba_dim": _dim}


def _fills_expand(config: Config) -> str | None:
    """A `refuses` of classes that take mamba_expand · hidden_size channels, with an int mamba_expand."""
    heads, dim = config_value(config, "mamba_n_heads"), _dim(config)
    hidden, expand = config_value(config, "hidden_size"), config_value(config, "mamba_expand", 2)
    if heads * dim == expand * hidden:
        return None
    return (
        f"its class has mamba_expand · hidden_size channels in a state space, and a whole mamba_expand, but "
        f"{heads} heads of {dim} are no multiple of hidden_size {hidden}: choose mamba_n_heads · "
        "mamba_d_head as a multiple of hidden_size"
    )


def _expand(sizes: Mapping[str, int], _config: Config) -> int:
    return sizes["mamba_heads"] * sizes["mamba_dim"] // sizes["hidden"]


_ATTENTION_BIAS = flag("attention_bias")


_MLP_BIAS = flag("mlp_bias")
_BLOCK = "feed_forward"
_MLP = (
    *linear(f"{_BLOCK}.gate_proj", "mlp, hidden", _MLP_BIAS),
    *linear(f"{_BLOCK}.up_proj", "mlp, hidden", _MLP_BIAS),
    *linear(f"{_BLOCK}.down_proj", "hidden, mlp", _MLP_BIAS),
)
_NORMS = ("input_layernorm", "pre_ff_layernorm")
_FINAL = "model.final_layernorm"
_TAPS = Taps(
    mlp_down=f"{_BLOCK}.down_proj",
    mlp_up=f"{_BLOCK}.up_proj",
    scored_norms=_NORMS,
    norms=_NORMS,
    mamba_in="mamba.in_proj",
)
_CONV_BIAS, _PROJ_BIAS = flag("mamba_conv_bias", True), flag("mamba_proj_bias")
_BIASES = {"in_bias": _PROJ_BIAS, "out_bias": _PROJ_BIAS, "conv_bias": _CONV_BIAS}

# ---- Bamba: state spaces in most layers, attention in those of attn_layer_indices


def _attends(config: Config, layer: int) -> bool:
    return layer in config_value(config, "attn_layer_indices", ())


register_family(
    Family(
        ("bamba",),
        layer=(
            *_mamba("mamba", unless(_attends), **_BIASES),
            *attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, when=_attends),
            *norms(*_NORMS),
            *_MLP,
        ),
        outer=outer(_FINAL),
        final_norm=_FINAL,
        taps=_TAPS,
        size_keys=_KEYS,
        computed=_COMPUTED,
        derived={"mamba_expand": _expand},
        per_layer_keys=(),
        layer_index_keys=("attn_layer_indices",),
        states=_states(unless(_attends)),
        refuses=_fills_expand,
        approximates={"mamba_heads": _FEWER, "mamba_dim": _FEWER},
    )
)

# ---- Falcon-H1: a state space beside the attention of each layer, whose norm may come before the gate


register_family(
    Family(
        ("falcon_h1",),
        layer=(
            *_mamba(
                "mamba",
                in_bias=_PROJ_BIAS,
                out_bias=flag("projectors_bias"),
                conv_bias=_CONV_BIAS,
                has_norm=flag("mamba_rms_norm"),
            ),
            *attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS),
            *norms(*_NORMS),
            *_MLP,
        ),
        outer=outer(_FINAL),
        final_norm=_FINAL,
        taps=_TAPS,
        size_keys=_KEYS,
        computed=_COMPUTED,
        derived={"mamba_d_ssm": lambda sizes, config: sizes["mamba_heads"] * sizes["mamba_dim"]},
        per_layer_keys=(),
        states=_states(),
        approximates={"mamba_heads": _FEWER, "mamba_dim": _FEWER},
    )
)

# ---- Granite 4: experts beside a shared MLP; a model without experts has the MLP alone


def _has_experts(config: Config, layer: int) -> bool:
    return config_value(config, "num_local_experts", 0) > 0


_LINEAR = is_of("linear_attention")


def _is_idle(sizes: Mapping[str, int], config: Config) -> bool:
    """Whether there is no state space, and the heads that the config says of one do not fit hidden_size.

    Such models are Granite 4.0 Micro, 1B and 350M. transformers compares these numbers all the same.
    """
    layers = range(config_value(config, "num_hidden_layers"))
    fits = sizes["mamba_heads"] * sizes["mamba_dim"] % sizes["hidden"] == 0
    return not fits and not any(_LINEAR(config, layer) for layer in layers)


_MOE = "block_sparse_moe"
_GRANITE_NORMS = ("input_layernorm", "post_attention_layernorm")
_GRANITE = (
    *_mamba("mamba", _LINEAR, **_BIASES),
    *attention(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, when=unless(_LINEAR)),
    *norms(*_GRANITE_NORMS),
    *linear("shared_mlp.input_linear", "mlp+mlp, hidden"),
    *linear("shared_mlp.output_linear", "hidden, mlp"),
)
register_family(
    Family(
        ("granitemoehybrid",),
        layer=(
            *_GRANITE,
            Param(f"{_MOE}.router.weight", "experts, hidden", _has_experts),
            *stacked(f"{_MOE}.experts", _has_experts),
        ),
        stored_layer=(
            *_GRANITE,
            Param(f"{_MOE}.router.layer.weight", "experts, hidden", _has_experts),
            Param(f"{_MOE}.input_linear.weight", "experts, expert_mlp+expert_mlp, hidden", _has_experts),
            Param(f"{_MOE}.output_linear.weight", "experts, hidden, expert_mlp", _has_experts),
        ),
        taps=Taps(
            mlp_down="shared_mlp.output_linear",
            mlp_up="shared_mlp.input_linear",
            mlp_up_part=(1, 2),
            mamba_in="mamba.in_proj",
            experts=f"{_MOE}.experts",
        ),
        size_keys={
            **_KEYS,
            "mlp": ("shared_intermediate_size",),
            "expert_mlp": ("intermediate_size",),
            "experts": ("num_local_experts",),
        },
        computed=_COMPUTED,
        derived={
            "mamba_expand": lambda sizes, config: 1 if _is_idle(sizes, config) else _expand(sizes, config),
            "mamba_n_heads": lambda sizes, config: 1 if _is_idle(sizes, config) else sizes["mamba_heads"],
            "mamba_d_head": lambda sizes, config: sizes["hidden" if _is_idle(sizes, config) else "mamba_dim"],
        },
        restated={"layers_block_type": lambda config: config["layer_types"]},
        states=_states(_LINEAR),
        is_sparse=_has_experts,
        refuses=_fills_expand,
        approximates={"mamba_heads": _FEWER, "mamba_dim": _FEWER},
    )
)

# ---- Nemotron-H: a layer has one norm and one of state space, attention, MLP and experts

_KINDS = "layers_block_type"
_MAMBA, _FULL, _PLAIN, _SPARSE = (
    is_of(kind, _KINDS) for kind in ("linear_attention", "full_attention", "mlp", "moe")
)


def _pattern(config: Config) -> str:
    """The kinds of the layers, a character for each."""
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    return "".join(letters[kind] for kind in config[_KINDS])


def _latent(config: Config, layer: int) -> bool:
    """Whether experts read a projection of the residual stream."""
    return config_value(config, "moe_latent_size") is not None


def _experts(name: str, axes: Callable[[str], str]) -> tuple[Param, ...]:
    kinds = ((both(_SPARSE, _latent), "moe_latent"), (both(_SPARSE, unless(_latent)), "hidden"))
    return tuple(Param(name, axes(width), when) for when, width in kinds)


def _nemotron_fixed(config: Config) -> Mapping[str, str]:
    if config_value(config, "n_group", 1) == 1:
        return {}
    return {"experts": "tokens choose among n_group groups of experts first, and plans choose among all"}


def _unfit(config: Config) -> str | None:
    if config_value(config, "tie_word_embeddings", False):
        return "its class does not tie its head"
    return two_experts(config)


_USE_BIAS = flag("use_bias")
_NEMOTRON = (
    *_mamba(
        "mixer",
        _MAMBA,
        in_bias=_USE_BIAS,
        out_bias=_USE_BIAS,
        conv_bias=flag("use_conv_bias", True),
    ),
    *attention(block="mixer", when=_FULL),
    *norms("norm"),
    *linear("mixer.up_proj", "mlp, hidden", _MLP_BIAS, when=_PLAIN),
    *linear("mixer.down_proj", "hidden, mlp", _MLP_BIAS, when=_PLAIN),
    *linear("mixer.shared_experts.up_proj", "shared_mlp, hidden", _MLP_BIAS, when=_SPARSE),
    *linear("mixer.shared_experts.down_proj", "hidden, shared_mlp", _MLP_BIAS, when=_SPARSE),
    *linear("mixer.fc1_latent_proj", "moe_latent, hidden", _MLP_BIAS, when=both(_SPARSE, _latent)),
    *linear("mixer.fc2_latent_proj", "hidden, moe_latent", _MLP_BIAS, when=both(_SPARSE, _latent)),
    *(param for param in experts("mixer", _SPARSE) if param.name == "mixer.gate.weight"),
    Param("mixer.gate.e_score_correction_bias", "experts", _SPARSE, buffer=True),
)
register_family(
    Family(
        ("nemotron_h",),
        layer=(
            *_NEMOTRON,
            *_experts("mixer.experts.up_proj", "experts, expert_mlp, {}".format),
            *_experts("mixer.experts.down_proj", "experts, {}, expert_mlp".format),
        ),
        stored_layer=(
            *_NEMOTRON,
            *_experts("mixer.experts.{expert}.up_proj.weight", "expert_mlp, {}".format),
            *_experts("mixer.experts.{expert}.down_proj.weight", "{}, expert_mlp".format),
        ),
        outer=(
            Param("model.embeddings.weight", "vocab, hidden"),
            Param("model.norm_f.weight", "hidden"),
            Param("lm_head.weight", "vocab, hidden"),
        ),
        embedding="model.embeddings",
        final_norm="model.norm_f",
        taps=Taps(
            attention_out="mixer.o_proj",
            mlp_down="mixer.down_proj",
            mlp_up="mixer.up_proj",
            scored_norms=("norm",),
            norms=("norm",),
            mamba_in="mixer.in_proj",
            experts="mixer.experts",
        ),
        size_keys={
            "mamba_heads": ("mamba_num_heads",),
            "mamba_dim": ("mamba_head_dim",),
            "mamba_groups": ("n_groups",),
            "mamba_kernel": ("conv_kernel",),
            "mamba_state": ("ssm_state_size",),
            "expert_mlp": ("moe_intermediate_size",),
            "experts": ("n_routed_experts", "num_local_experts"),
            "shared_mlp": ("moe_shared_expert_intermediate_size",),
            "moe_latent": ("moe_latent_size",),
        },
        computed={"mamba_bc": _bc("n_groups", "ssm_state_size")},
        is_sparse=_SPARSE,
        per_layer_keys=(_KINDS,),
        restated={"hybrid_override_pattern": _pattern, "layer_types": lambda config: config[_KINDS]},
        states=_states(_MAMBA),
        stored_names=StoredNames(renamed=(("model.", "backbone."),)),
        fixed=_nemotron_fixed,
        refuses=_unfit,
        approximates={"mamba_heads": _FEWER, "mamba_dim": _FEWER},
    )
)
