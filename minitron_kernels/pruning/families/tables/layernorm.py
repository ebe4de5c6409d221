"""Families with LayerNorms, which subtract the mean of the channels: cutting these is not exact."""

from __future__ import annotations

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import (
    MEAN_OF_FEWER,
    TWO_NORMS,
    attention,
    flag,
    gated_mlp,
    head_layernorms,
    heads_alike,
    heads_divide_hidden,
    heads_fill_hidden,
    linear,
    norms,
    outer,
    plain_mlp,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.stored_names import StoredNames

_BIAS, _MLP_BIAS = flag("attention_bias"), flag("mlp_bias")
_HIDDEN = {"hidden": MEAN_OF_FEWER}
_ONE_NORM = ("input_layernorm",)  # which attention and MLP both read
_ONE_NORM_TAPS = Taps(scored_norms=_ONE_NORM, norms=_ONE_NORM)
_PLAIN = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS),
    *plain_mlp(_MLP_BIAS),
    *norms(*TWO_NORMS, bias=True),
)

register_family(
    Family(
        ("nemotron",),
        layer=_PLAIN,
        outer=outer(norm_bias=True),
        norm_offset=1.0,
        approximates=_HIDDEN,
    )
)
register_family(
    Family(
        ("jais2",),
        layer=_PLAIN,
        outer=outer(norm_bias=True),
        approximates=_HIDDEN,
        refuses=heads_divide_hidden,
    )
)

_STARCODER_BIAS = flag("use_bias", True)
register_family(
    Family(
        ("starcoder2",),
        layer=(
            *attention(qkv_bias=_STARCODER_BIAS, out_bias=_STARCODER_BIAS),
            *plain_mlp(_STARCODER_BIAS, "c_fc", "c_proj"),
            *norms(*TWO_NORMS, bias=True),
        ),
        taps=Taps(mlp_down="mlp.c_proj", mlp_up="mlp.c_fc"),
        outer=outer(norm_bias=True),
        approximates=_HIDDEN,
    )
)

# ---- attention and MLP beside each other

_COHERE = (*attention(qkv_bias=_BIAS, out_bias=_BIAS), *gated_mlp(), *norms(*_ONE_NORM))
_QK_NORM = flag("use_qk_norm")
register_family(
    Family(
        ("cohere",),
        layer=(
            *_COHERE,
            Param("self_attn.q_norm.weight", "num_heads, head_dim", _QK_NORM),
            Param("self_attn.k_norm.weight", "num_kv_heads, head_dim", _QK_NORM),
        ),
        taps=_ONE_NORM_TAPS,
        approximates=_HIDDEN,
    )
)
register_family(Family(("cohere2",), layer=_COHERE, taps=_ONE_NORM_TAPS, approximates=_HIDDEN))


def _phi_heads(config: Config) -> str | None:
    """Phi: the norms of queries and keys are as wide as hidden_size / num_attention_heads."""
    return heads_fill_hidden(config) if config_value(config, "qk_layernorm", False) else None


register_family(
    Family(
        ("phi",),
        layer=(
            *attention(qkv_bias=True, out_bias=True, out="dense"),
            *head_layernorms(flag("qk_layernorm")),
            *plain_mlp(True, "fc1", "fc2"),
            *norms(*_ONE_NORM, bias=True),
        ),
        taps=Taps(
            attention_out="self_attn.dense",
            mlp_down="mlp.fc2",
            mlp_up="mlp.fc1",
            scored_norms=_ONE_NORM,
            norms=_ONE_NORM,
        ),
        outer=outer("model.final_layernorm", norm_bias=True, head_bias=True),
        final_norm="model.final_layernorm",
        approximates=_HIDDEN,
        refuses=_phi_heads,
    )
)


def _serial(config: Config, layer: int) -> bool:
    """StableLM: whether the MLP comes behind the attention, with a norm of its own."""
    return not config_value(config, "use_parallel_residual", False)


register_family(
    Family(
        ("stablelm",),
        layer=(
            *attention(qkv_bias=flag("use_qkv_bias")),
            *(
                Param(f"self_attn.{side}_layernorm.norms.{{{head}}}.weight", "head_dim", flag("qk_layernorm"))
                for side, head in (("q", "head"), ("k", "kv_head"))
            ),
            *gated_mlp(),
            *norms("input_layernorm", bias=True),
            *norms("post_attention_layernorm", bias=True, when=_serial),
        ),
        outer=outer(norm_bias=True),
        approximates=_HIDDEN,
        refuses=heads_fill_hidden,
    )
)

# ---- queries, keys and values in one projection, head by head

_DENSE_MLP = plain_mlp(True, "dense_h_to_4h", "dense_4h_to_h")
register_family(
    Family(
        ("persimmon",),
        layer=(
            *linear("self_attn.query_key_value", "qkv, hidden", True),
            *linear("self_attn.dense", "hidden, heads", True),
            *head_layernorms(flag("qk_layernorm", True)),
            *_DENSE_MLP,
            *norms(*TWO_NORMS, bias=True),
        ),
        taps=Taps(attention_out="self_attn.dense", mlp_down="mlp.dense_4h_to_h", mlp_up="mlp.dense_h_to_4h"),
        outer=outer("model.final_layernorm", norm_bias=True),
        final_norm="model.final_layernorm",
        approximates=_HIDDEN,
        refuses=heads_alike,
    )
)

_NEOX_BIAS = flag("attention_bias", True)
register_family(
    Family(
        ("gpt_neox",),
        layer=(
            *linear("attention.query_key_value", "qkv, hidden", _NEOX_BIAS),
            *linear("attention.dense", "hidden, heads", _NEOX_BIAS),
            *_DENSE_MLP,
            *norms(*TWO_NORMS, bias=True),
        ),
        taps=Taps(attention_out="attention.dense", mlp_down="mlp.dense_4h_to_h", mlp_up="mlp.dense_h_to_4h"),
        outer=(
            Param("gpt_neox.embed_in.weight", "vocab, hidden"),
            *norms("gpt_neox.final_layer_norm", bias=True),
            Param("lm_head.weight", "vocab, hidden"),
        ),
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        aliases={"embed_out.weight": "lm_head.weight"},
        stored_names=StoredNames(computed=("attention.bias", "attention.masked_bias")),  # masks of Pythia's
        approximates=_HIDDEN,
        refuses=heads_alike,
    )
)

# ---- norms without gains: the layers that read them take over the factors

register_family(
    Family(
        ("olmo",),
        layer=(*attention(qkv_bias=_BIAS, out_bias=_BIAS), *gated_mlp()),
        outer=outer(norm_weight=False),
        folds={
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
            "model.norm": ("lm_head",),
        },
        approximates={"hidden": f"{MEAN_OF_FEWER}; a tied head does not get the factor of the final norm"},
    )
)
