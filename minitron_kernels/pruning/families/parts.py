"""Groups of parameters that many families share, and conditions on their configs, for use in their tables."""

from __future__ import annotations

import dataclasses

from minitron_kernels.pruning.families.configs import OLDER_KINDS, Config, config_value
from minitron_kernels.pruning.families.family import Param, Taps, When

TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
# of gate_up_proj's output the second half are the neurons
FUSED_MLP_TAPS = Taps(mlp_up="mlp.gate_up_proj", mlp_up_part=(1, 2))
# what families do only nearly, for Family.approximates
MEAN_OF_FEWER = "LayerNorms subtract the mean of the channels that stay, not of all"
WIDE_NORM = "q_norm and k_norm divide by the root mean square of the heads that stay, not of all"


def always(config: Config, layer: int) -> bool:
    """A `when`, or an `is_sparse`, of all layers."""
    return True


def unless(when: When) -> When:
    """A `when` of the layers that `when` leaves out."""
    return lambda config, layer: not when(config, layer)


def both(*whens: When) -> When:
    """A `when` of the layers that none of these leaves out."""
    return lambda config, layer: all(when(config, layer) for when in whens)


def flag(key: str, default: bool = False) -> When:
    """A `when` for a parameter that exists if the config sets `key`."""
    return lambda config, layer: bool(config_value(config, key, default))


def is_of(kind: str, key: str = "layer_types") -> When:
    """A `when` of the layers that a list in the config, with one entry for each, calls `kind`.

    A config.json may have older names, which transformers replaces when it reads them.
    """

    def when(config: Config, layer: int) -> bool:
        written = config_value(config, key)[layer]
        return OLDER_KINDS.get(written, written) == kind

    return when


def linear(name: str, axes: str, bias: When | bool = False, *, when: When | None = None) -> tuple[Param, ...]:
    """The weight of a linear layer, with axes "out, in", and its bias if, or where, `bias` says so.

    when: of both.
    """
    return Param(f"{name}.weight", axes, when), *_if(bias, f"{name}.bias", axes.split(", ")[0], when)


def _if(there: When | bool, name: str, axes: str, when: When | None) -> tuple[Param, ...]:
    """A parameter that exists if, or where, `there` says so, in the layers of `when`."""
    if there is False:
        return ()
    return (Param(name, axes, when if there is True else there if when is None else both(when, there)),)


def attention(
    *,
    qkv_bias: When | bool = False,
    out_bias: When | bool = False,
    qk_norm: When | bool = False,
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm"),
    wide_norm: bool = False,
    out: str = "o_proj",
    block: str = "self_attn",
    query: str = "heads",
    when: When | None = None,
) -> tuple[Param, ...]:
    """Attention with separate projections to queries, keys and values.

    qk_norm: norms of queries and keys, over the channels of a head; wide_norm: over those of all heads.
    query: the axis of what q_proj gives. when: of all of it.
    """
    axes = ("heads", "kv_heads") if wide_norm else ("head_dim", "head_dim")
    return (
        *linear(f"{block}.q_proj", f"{query}, hidden", qkv_bias, when=when),
        *linear(f"{block}.k_proj", "kv_heads, hidden", qkv_bias, when=when),
        *linear(f"{block}.v_proj", "kv_heads, hidden", qkv_bias, when=when),
        *linear(f"{block}.{out}", "hidden, heads", out_bias, when=when),
        *(
            param
            for name, axis in zip(qk_norm_names, axes, strict=True)
            for param in _if(wide_norm or qk_norm, f"{block}.{name}.weight", axis, when)
        ),
    )


def head_layernorms(when: When) -> tuple[Param, ...]:
    """LayerNorms of queries and keys, over the channels of a head."""
    return tuple(
        Param(f"self_attn.{side}_layernorm.{kind}", "head_dim", when)
        for side in "qk"
        for kind in ("weight", "bias")
    )


def gated_mlp(bias: When | bool = False, when: When | None = None) -> tuple[Param, ...]:
    """An MLP of gate_proj, up_proj and down_proj."""
    params = (*linear("mlp.gate_proj", "mlp, hidden", bias), *plain_mlp(bias))
    if when is None:
        return params
    return tuple(
        dataclasses.replace(param, when=both(when, param.when) if param.when else when) for param in params
    )


def plain_mlp(bias: When | bool = False, up: str = "up_proj", down: str = "down_proj") -> tuple[Param, ...]:
    """An MLP of two linear layers, without a gate."""
    return (*linear(f"mlp.{up}", "mlp, hidden", bias), *linear(f"mlp.{down}", "hidden, mlp", bias))


def fused_mlp() -> tuple[Param, ...]:
    """An MLP whose gate and neurons come from one projection; tapped by FUSED_MLP_TAPS."""
    return (*linear("mlp.gate_up_proj", "mlp+mlp, hidden"), *linear("mlp.down_proj", "hidden, mlp"))


def stacked(module: str, when: When | None = None) -> tuple[Param, ...]:
    """The weights of all experts, stacked in three-dimensional tensors."""
    return (
        Param(f"{module}.gate_up_proj", "experts, expert_mlp+expert_mlp, hidden", when),
        Param(f"{module}.down_proj", "experts, hidden, expert_mlp", when),
    )


def experts(block: str, when: When | None = None) -> tuple[Param, ...]:
    """The router, and the weights of all experts, stacked."""
    return (
        Param(f"{block}.gate.weight", "experts, hidden", when),
        *stacked(f"{block}.experts", when),
    )


def one_by_one(
    block: str,
    when: When | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Param, ...]:
    """The router, and the weights of each expert by themselves, as most checkpoints hold them."""
    inside = ("expert_mlp, hidden", "expert_mlp, hidden", "hidden, expert_mlp")
    return (
        Param(f"{block}.gate.weight", "experts, hidden", when),
        *(
            Param(f"{block}.experts.{{expert}}.{name}.weight", axes, when)
            for name, axes in zip(names, inside, strict=True)
        ),
    )


def norms(*names: str, bias: bool = False, when: When | None = None) -> tuple[Param, ...]:
    """Norms over the residual channels, with biases or without."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return tuple(Param(f"{name}.{kind}", "hidden", when) for name in names for kind in kinds)


def outer(
    norm: str = "model.norm", *, norm_bias: bool = False, norm_weight: bool = True, head_bias: bool = False
) -> tuple[Param, ...]:
    """The parameters around the layers: embedding, final norm, head."""
    return (
        Param("model.embed_tokens.weight", "vocab, hidden"),
        *((Param(f"{norm}.weight", "hidden"),) if norm_weight else ()),
        *((Param(f"{norm}.bias", "hidden"),) if norm_bias else ()),
        *linear("lm_head", "vocab, hidden", head_bias),
    )


def heads_divide_hidden(config: Config) -> str | None:
    """A `refuses` for configs that must have heads that divide hidden_size, although head_dim is written."""
    hidden, heads = config_value(config, "hidden_size"), config_value(config, "num_attention_heads")
    return (
        f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}" if hidden % heads else None
    )


def heads_fill_hidden(config: Config) -> str | None:
    """A `refuses` for models that take head_dim to be hidden_size / num_attention_heads, whatever it says."""
    keys = ("hidden_size", "num_attention_heads", "head_dim")
    hidden, heads, dim = (config_value(config, key) for key in keys)
    if dim is None or heads * dim == hidden:
        return None
    return (
        f"its class takes head_dim to be hidden_size / num_attention_heads = {hidden} / {heads}, but each "
        f"has {dim}: cut hidden_size and num_attention_heads alike"
    )


def one_key_for_each_head(config: Config) -> str | None:
    """A `refuses` for models whose query heads each have a key and a value, whatever the config says."""
    heads, kv = (config_value(config, f"num_{kind}_heads") for kind in ("attention", "key_value"))
    if kv in (None, heads):
        return None
    return f"its class has a key and a value for each of {heads} heads, but num_key_value_heads is {kv}"


def heads_alike(config: Config) -> str | None:
    """A `refuses` for models that take both from hidden_size and num_attention_heads alone."""
    return one_key_for_each_head(config) or heads_fill_hidden(config)


def two_experts(config: Config, key: str = "n_routed_experts") -> str | None:
    """A `refuses` for routers that add up the two best experts of each group, of which there may be one.

    key: of the number of experts.
    """
    experts, groups = config_value(config, key, 2), config_value(config, "n_group", 1) or 1
    if not experts or experts // groups >= 2:
        return None
    return f"its router compares groups by their two best experts, but {key} is {experts}"
