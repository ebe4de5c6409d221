"""GPT-2 and what came before Llama: LayerNorms, learned positions or ALiBi, heads that fill hidden_size.

Their configs have no head_dim: a head has hidden_size / num_attention_heads channels, so that both are cut
alike, or neither. Sizes have the names of their configs (n_embd, ffn_dim) and, beside these, the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps, When
from minitron_kernels.pruning.families.parts import (
    MEAN_OF_FEWER,
    attention,
    both,
    flag,
    linear,
    norms,
    unless,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.states import State
from minitron_kernels.pruning.families.stored_names import StoredNames

HIDDEN = {"hidden": MEAN_OF_FEWER}
# a head of its own for each query; no head_dim
NO_KEYS: dict[str, tuple[str, ...]] = {"kv_heads": (), "head_dim": ()}
_GPT_SIZES = {
    **NO_KEYS,
    "hidden": ("n_embd", "hidden_size"),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "mlp": ("n_inner", "intermediate_size"),
    "positions": ("n_positions", "max_position_embeddings"),
}
_GPT_NORMS = ("ln_1", "ln_2")
ALIBI = "ALiBi gives each head a slope by its number and by the number of heads"
ALIBI_HIDDEN = f"a head has hidden_size / heads channels, and heads stay: {ALIBI}"


def _or_four_times(key: str, hidden: str) -> Callable[[Config], int]:
    """The size of an MLP that is 4 · hidden where the config does not say it."""
    return lambda config: config_value(config, key) or 4 * config_value(config, hidden)


def _outer_of(
    root: str, embedding: str, norm: str, *, positions: str = "", head_bias: bool = False
) -> tuple[Param, ...]:
    """The parameters around the layers; positions: the name of their embedding, "" where there is none."""
    return (
        Param(f"{root}.{embedding}.weight", "vocab, hidden"),
        *((Param(f"{root}.{positions}.weight", "positions, hidden"),) if positions else ()),
        *norms(f"{root}.{norm}", bias=True),
        *linear("lm_head", "vocab, hidden", head_bias),
    )


_IN_TRANSFORMER: dict[str, Any] = dict(
    layers="transformer.h", final_norm="transformer.ln_f", embedding="transformer.wte"
)
_MASKS = StoredNames(computed=("attn.bias", "attn.masked_bias"))
# of GPT-2 and StarCoder, which lay the weights of attention and MLP out differently
_LIKE_GPT2: dict[str, Any] = dict(
    outer=_outer_of("transformer", "wte", "ln_f", positions="wpe"),
    taps=Taps(
        attention_out="attn.c_proj",
        mlp_down="mlp.c_proj",
        mlp_up="mlp.c_fc",
        scored_norms=_GPT_NORMS,
        norms=_GPT_NORMS,
    ),
    size_keys=_GPT_SIZES,
    approximates=HIDDEN,
    stored_names=_MASKS,
    **_IN_TRANSFORMER,
)

# ---- GPT-2: Conv1D, linear layers whose weights are [in, out]


def _conv1d(name: str, inputs: str, outputs: str) -> tuple[Param, ...]:
    return Param(f"{name}.weight", f"{inputs}, {outputs}"), Param(f"{name}.bias", outputs)


def _gpt2_mlp(config: Config) -> int:
    if config_value(config, "add_cross_attention", False):
        raise ValueError("the config has add_cross_attention: prune a decoder without cross-attention")
    return _or_four_times("n_inner", "n_embd")(config)


def _gpt2_fixed(config: Config) -> Mapping[str, str]:
    if config_value(config, "scale_attn_by_inverse_layer_idx", False):
        return {"layers": "attention is divided by a layer's number (scale_attn_by_inverse_layer_idx)"}
    return {}


register_family(
    Family(
        ("gpt2",),
        layer=(
            *_conv1d("attn.c_attn", "hidden", "heads+kv_heads+kv_heads"),
            *_conv1d("attn.c_proj", "heads", "hidden"),
            *_conv1d("mlp.c_fc", "hidden", "mlp"),
            *_conv1d("mlp.c_proj", "mlp", "hidden"),
            *norms(*_GPT_NORMS, bias=True),
        ),
        computed={"mlp": _gpt2_mlp},
        fixed=_gpt2_fixed,
        **_LIKE_GPT2,
    )
)

# ---- StarCoder: one key and value for all queries, or each query, key and value in turn

_MULTI_QUERY = flag("multi_query", True)


def _one_or_all(config: Config) -> int:
    return 1 if config_value(config, "multi_query", True) else config_value(config, "n_head")


register_family(
    Family(
        ("gpt_bigcode",),
        layer=(
            *linear("attn.c_attn", "heads+kv_heads+kv_heads, hidden", True, when=_MULTI_QUERY),
            *linear("attn.c_attn", "qkv, hidden", True, when=unless(_MULTI_QUERY)),
            *linear("attn.c_proj", "hidden, heads", True),
            *linear("mlp.c_fc", "mlp, hidden", True),
            *linear("mlp.c_proj", "hidden, mlp", True),
            *norms(*_GPT_NORMS, bias=True),
        ),
        computed={"mlp": _gpt2_mlp, "kv_heads": _one_or_all},
        derived={"num_key_value_heads": lambda sizes, config: sizes["kv_heads"]},
        **_LIKE_GPT2,
    )
)

# ---- GPT-J: rotary positions, attention and MLP beside each other, a bias of the head

ONE_NORM = ("ln_1",)
GPTJ_MLP = (*linear("mlp.fc_in", "mlp, hidden", True), *linear("mlp.fc_out", "hidden, mlp", True))
# of GPT-J and CodeGen, which order queries, keys and values differently
LIKE_GPTJ: dict[str, Any] = dict(
    outer=_outer_of("transformer", "wte", "ln_f", head_bias=True),
    taps=Taps("attn.out_proj", "mlp.fc_out", "mlp.fc_in", scored_norms=ONE_NORM, norms=ONE_NORM),
    size_keys=_GPT_SIZES,
    computed={"mlp": _or_four_times("n_inner", "n_embd")},
    **_IN_TRANSFORMER,
)
register_family(
    Family(
        ("gptj",),
        layer=(
            *attention(block="attn", out="out_proj"),
            *GPTJ_MLP,
            *norms(*ONE_NORM, bias=True),
        ),
        approximates=HIDDEN,
        stored_names=_MASKS,
        **LIKE_GPTJ,
    )
)

# ---- GPT-Neo: local attention in some layers, named twice in the config


def _gpt_neo_layers(config: Config, layers: list[int]) -> dict[str, Any]:
    kinds = [config_value(config, "attention_layers")[layer] for layer in layers]
    return {"attention_layers": kinds, "attention_types": [[[kind], 1] for kind in kinds]}


register_family(
    Family(
        ("gpt_neo",),
        layer=(
            *attention(block="attn.attention", out="out_proj", out_bias=True),
            *linear("mlp.c_fc", "mlp, hidden", True),
            *linear("mlp.c_proj", "hidden, mlp", True),
            *norms(*_GPT_NORMS, bias=True),
        ),
        outer=_outer_of("transformer", "wte", "ln_f", positions="wpe"),
        taps=Taps(
            "attn.attention.out_proj", "mlp.c_proj", "mlp.c_fc", scored_norms=_GPT_NORMS, norms=_GPT_NORMS
        ),
        size_keys={
            **NO_KEYS,
            "layers": ("num_layers", "num_hidden_layers"),
            "heads": ("num_heads", "num_attention_heads"),
            "positions": ("max_position_embeddings",),
        },
        computed={"mlp": _or_four_times("intermediate_size", "hidden_size")},
        layer_entries=_gpt_neo_layers,
        approximates=HIDDEN,
        stored_names=StoredNames(computed=("attn.attention.bias", "attn.attention.masked_bias")),
        **_IN_TRANSFORMER,
    )
)

# ---- OPT

_OPT_BIAS = flag("enable_bias", True)
OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _opt_positions(config: Config) -> int:
    plain = (
        ("word_embed_proj_dim", config_value(config, "hidden_size")),
        ("do_layer_norm_before", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    )
    for key, wanted in plain:
        found = config_value(config, key, wanted)
        if found != wanted:
            raise ValueError(
                f"the config of this opt has {key} {found}, not {wanted}: no table describes the form of "
                "opt-350m"
            )
    return config_value(config, "max_position_embeddings") + 2  # the first two are never read


register_family(
    Family(
        ("opt",),
        layer=(
            *attention(qkv_bias=_OPT_BIAS, out_bias=_OPT_BIAS, out="out_proj"),
            *linear("fc1", "mlp, hidden", _OPT_BIAS),
            *linear("fc2", "hidden, mlp", _OPT_BIAS),
            *norms(*OPT_NORMS, bias=True),
        ),
        outer=_outer_of("model.decoder", "embed_tokens", "final_layer_norm", positions="embed_positions"),
        taps=Taps("self_attn.out_proj", "fc2", "fc1", scored_norms=OPT_NORMS, norms=OPT_NORMS),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        embedding="model.decoder.embed_tokens",
        size_keys={**NO_KEYS, "mlp": ("ffn_dim", "intermediate_size")},
        computed={"positions": _opt_positions},
        derived={"word_embed_proj_dim": lambda sizes, config: sizes["hidden"]},
        approximates=HIDDEN,
    )
)

# ---- BLOOM: an MLP of 4 · hidden_size, and slopes of ALiBi: whole layers go, and nothing else

_QKV_TAPS: dict[str, Any] = dict(
    attention_out="self_attention.dense", mlp_down="mlp.dense_4h_to_h", mlp_up="mlp.dense_h_to_4h"
)


def _qkv_layer(bias: When | bool) -> tuple[Param, ...]:
    return (
        *linear("self_attention.query_key_value", "qkv, hidden", bias),
        *linear("self_attention.dense", "hidden, heads", bias),
        *linear("mlp.dense_h_to_4h", "mlp, hidden", bias),
        *linear("mlp.dense_4h_to_h", "hidden, mlp", bias),
    )


_BLOOM_NORMS = ("input_layernorm", "post_attention_layernorm")
register_family(
    Family(
        ("bloom",),
        layer=(*_qkv_layer(True), *norms(*_BLOOM_NORMS, bias=True)),
        outer=(
            *norms("transformer.word_embeddings_layernorm", bias=True),
            *_outer_of("transformer", "word_embeddings", "ln_f"),
        ),
        taps=Taps(**_QKV_TAPS, scored_norms=_BLOOM_NORMS, norms=_BLOOM_NORMS),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        embedding="transformer.word_embeddings",
        size_keys={
            **NO_KEYS,
            "layers": ("n_layer", "num_hidden_layers"),
            "heads": ("n_head", "num_attention_heads"),
            "mlp": (),
        },
        computed={"mlp": lambda config: 4 * config_value(config, "hidden_size")},
        fixed=lambda config: {
            **dict.fromkeys(("heads", "kv_heads"), ALIBI),
            "hidden": ALIBI_HIDDEN,
            "mlp": "it has 4 · hidden_size neurons",
        },
    )
)

# ---- Falcon: KV group after KV group; one key and value for all queries is a single group


def _kv_heads(config: Config) -> int:
    if config_value(config, "new_decoder_architecture", False):
        return config_value(config, "num_kv_heads")
    return 1 if config_value(config, "multi_query", True) else config_value(config, "num_attention_heads")


def _falcon_fixed(config: Config) -> Mapping[str, str]:
    fixed = {}
    if not config_value(config, "new_decoder_architecture", False):
        fixed["kv_heads"] = "without new_decoder_architecture there is one, or one for each query head"
    if config_value(config, "alibi", False):
        fixed |= {**dict.fromkeys(("heads", "kv_heads"), ALIBI), "hidden": ALIBI_HIDDEN}
    return fixed


def _has_two(config: Config, layer: int) -> bool:
    """Whether attention and MLP, which are beside each other, have a norm each."""
    two = 2 if config_value(config, "new_decoder_architecture", False) else 1
    return config_value(config, "num_ln_in_parallel_attn", two) == 2


_PARALLEL = flag("parallel_attn", True)
_IS_NEW = flag("new_decoder_architecture")
_TWO = both(_PARALLEL, _has_two)
_FALCON_NORMS = ("ln_attn", "ln_mlp", "input_layernorm", "post_attention_layernorm")
register_family(
    Family(
        ("falcon",),
        layer=(
            *_qkv_layer(flag("bias")),
            *norms("ln_attn", "ln_mlp", bias=True, when=_TWO),
            *norms("input_layernorm", bias=True, when=unless(_TWO)),
            *norms("post_attention_layernorm", bias=True, when=unless(_PARALLEL)),
        ),
        outer=_outer_of("transformer", "word_embeddings", "ln_f"),
        taps=Taps(**_QKV_TAPS, scored_norms=_FALCON_NORMS, norms=_FALCON_NORMS),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        embedding="transformer.word_embeddings",
        size_keys={
            "head_dim": (),  # a property of its config, which cannot be written
            "kv_heads": ("num_kv_heads", "num_key_value_heads"),
            "mlp": ("ffn_hidden_size", "intermediate_size"),
        },
        computed={"kv_heads": _kv_heads},
        fixed=_falcon_fixed,
        restated={"n_embed": lambda config: config["hidden_size"]},
        approximates=HIDDEN,
        # the new architecture repeats keys and values for each query head before it keeps them
        token_states=(State("heads+heads", _IS_NEW), State("kv_heads+kv_heads", unless(_IS_NEW))),
    )
)
