"""Families whose layers have one MLP each and norms that do not subtract a mean."""

from __future__ import annotations

from minitron_kernels.pruning.families.configs import Config, config_value
from minitron_kernels.pruning.families.family import Family, Param, Taps
from minitron_kernels.pruning.families.parts import (
    FOUR_NORMS,
    FUSED_MLP_TAPS,
    POST_NORMS,
    TWO_NORMS,
    WIDE_NORM,
    attention,
    flag,
    fused_mlp,
    gated_mlp,
    heads_divide_hidden,
    heads_fill_hidden,
    linear,
    norms,
    plain_mlp,
)
from minitron_kernels.pruning.families.registry import register_family
from minitron_kernels.pruning.families.stored_names import StoredNames

_BIAS, _MLP_BIAS = flag("attention_bias"), flag("mlp_bias")
_NORMS = norms(*TWO_NORMS)


def _long_rope_fits(config: Config) -> str | None:
    """Phi-3: transformers checks the factors of long RoPE against hidden_size / num_attention_heads."""
    rope = config_value(config, "rope_parameters") or config_value(config, "rope_scaling") or {}
    hidden, heads = config_value(config, "hidden_size"), config_value(config, "num_attention_heads")
    factors = [key for key in ("short_factor", "long_factor") if rope.get(key)]
    if not factors:
        return None
    part = rope.get("partial_rotary_factor") or config_value(config, "partial_rotary_factor", 1.0)
    wanted = int(hidden // heads * part) // 2
    for key in factors:
        if len(rope[key]) != wanted:
            return (
                f"the {len(rope[key])} entries of RoPE's {key} are not half of hidden_size / "
                f"num_attention_heads = {hidden} // {heads}"
            )
    return None


# ---- Llama, and what differs from it by biases, norms of queries and keys, entries of layers in the config

_LLAMA = (*attention(qkv_bias=_BIAS, out_bias=_BIAS), *gated_mlp(_MLP_BIAS), *_NORMS)
for _type in ("llama", "internlm3", "iquestcoder"):
    register_family(Family((_type,), layer=_LLAMA, refuses=heads_divide_hidden))
# EXAONE 3: Llama, whose checkpoints have other names, and their config.json another key
register_family(
    Family(
        ("exaone",),
        layer=_LLAMA,
        refuses=heads_divide_hidden,
        restated={"num_layers": lambda config: config["num_hidden_layers"]},
        stored_names=StoredNames(
            renamed=(
                ("model.embed_tokens.", "transformer.wte."),
                ("model.layers.", "transformer.h."),
                ("model.norm.", "transformer.ln_f."),
                (".self_attn.o_proj.", ".attn.attention.out_proj."),
                (".self_attn.", ".attn.attention."),
                (".input_layernorm.", ".ln_1."),
                (".post_attention_layernorm.", ".ln_2."),
                (".mlp.gate_proj.", ".mlp.c_fc_0."),
                (".mlp.up_proj.", ".mlp.c_fc_1."),
                (".mlp.down_proj.", ".mlp.c_proj."),
            )
        ),
    )
)
register_family(Family(("granite",), layer=_LLAMA))
register_family(Family(("smollm3",), layer=_LLAMA, per_layer_keys=("layer_types", "no_rope_layers")))
for _type in ("mistral", "ministral", "ministral3"):
    register_family(Family((_type,), layer=(*attention(), *gated_mlp(), *_NORMS)))
register_family(
    Family(("cwm",), layer=(*attention(), *gated_mlp(_MLP_BIAS), *_NORMS), refuses=heads_divide_hidden)
)
register_family(Family(("qwen2",), layer=(*attention(qkv_bias=True), *gated_mlp(), *_NORMS)))
_QWEN3 = (*attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True), *gated_mlp(), *_NORMS)
register_family(Family(("qwen3",), layer=_QWEN3))
_SEED = attention(qkv_bias=_BIAS, out_bias=flag("attention_out_bias"))
register_family(Family(("seed_oss",), layer=(*_SEED, *gated_mlp(_MLP_BIAS), *_NORMS)))
_HUNYUAN = attention(
    qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True, qk_norm_names=("query_layernorm", "key_layernorm")
)
register_family(Family(("hunyuan_v1_dense",), layer=(*_HUNYUAN, *gated_mlp(), *_NORMS)))
_ALL_BIAS = flag("use_bias")
_ERNIE = (*attention(qkv_bias=_ALL_BIAS, out_bias=_ALL_BIAS), *gated_mlp(_ALL_BIAS), *_NORMS)
register_family(Family(("ernie4_5",), layer=_ERNIE))
register_family(
    Family(
        ("helium",),
        layer=(*attention(qkv_bias=_BIAS), *gated_mlp(_MLP_BIAS), *_NORMS),
        refuses=heads_fill_hidden,
    )
)
# sinks: a learned logit that each head's softmax counts beside those of the tokens
register_family(
    Family(
        ("granite_swa",),
        layer=(*_LLAMA, Param("self_attn.sinks", "num_heads")),
        per_layer_keys=("layer_types", "layer_rope_theta"),
    )
)
_POST = ("post_norm1", "post_norm2")
register_family(
    Family(
        ("hyperclovax",),
        layer=(*_LLAMA, *norms(*_POST, when=flag("use_post_norm", True))),
        taps=Taps(norms=(*TWO_NORMS, *_POST)),
        refuses=heads_divide_hidden,
    )
)

# ---- no gate

register_family(
    Family(
        ("arcee",),
        layer=(*attention(qkv_bias=_BIAS, out_bias=_BIAS), *plain_mlp(_MLP_BIAS), *_NORMS),
        refuses=heads_divide_hidden,
    )
)


def _xielu(config: Config, layer: int) -> bool:
    return bool(config_value(config, "hidden_act") == "xielu")


_APERTUS_NORMS = ("attention_layernorm", "feedforward_layernorm")
register_family(
    Family(
        ("apertus",),
        layer=(
            *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True),
            *plain_mlp(),
            Param("mlp.act_fn.alpha_p", "one", _xielu),
            Param("mlp.act_fn.alpha_n", "one", _xielu),
            Param("mlp.act_fn.beta", "", _xielu, buffer=True),
            Param("mlp.act_fn.eps", "", _xielu, buffer=True),
            *norms(*_APERTUS_NORMS),
        ),
        taps=Taps(scored_norms=_APERTUS_NORMS, norms=_APERTUS_NORMS),
    )
)

# ---- Gemma: norms store gain - 1, embeddings are multiplied by √hidden_size

_GEMMA = attention(qkv_bias=_BIAS, out_bias=_BIAS)
_GEMMA3 = attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True)
_PRE_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
for _type, _attention, _names in (
    ("gemma", _GEMMA, TWO_NORMS),
    ("vaultgemma", _GEMMA, _PRE_NORMS),
    ("gemma2", _GEMMA, FOUR_NORMS),
    ("gemma3_text", _GEMMA3, FOUR_NORMS),
):
    register_family(
        Family(
            (_type,),
            layer=(*_attention, *gated_mlp(), *norms(*_names)),
            taps=Taps(scored_norms=TWO_NORMS if _type == "gemma" else _PRE_NORMS, norms=_names),
            norm_offset=1.0,
            scales_embedding=True,
            refuses=heads_divide_hidden,
        )
    )

# ---- the gate and the neurons in one projection

register_family(
    Family(
        ("phi3",),
        layer=(
            *linear("self_attn.qkv_proj", "heads+kv_heads+kv_heads, hidden"),
            *linear("self_attn.o_proj", "hidden, heads"),
            *fused_mlp(),
            *_NORMS,
        ),
        taps=FUSED_MLP_TAPS,
        refuses=_long_rope_fits,
    )
)
_GLM = (*attention(qkv_bias=_BIAS), *fused_mlp())
register_family(Family(("glm",), layer=(*_GLM, *_NORMS), taps=FUSED_MLP_TAPS))
_GLM4_NORMS = (*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
register_family(
    Family(
        ("glm4",),
        layer=(*_GLM, *norms(*_GLM4_NORMS)),
        taps=Taps(mlp_up="mlp.gate_up_proj", mlp_up_part=(1, 2), norms=_GLM4_NORMS),
    )
)

# ---- norms behind attention and MLP alone: their outputs are what the residual stream gets

_POST_TAPS = Taps(scored_norms=POST_NORMS, norms=POST_NORMS)
register_family(
    Family(("exaone4",), layer=(*attention(qk_norm=True), *gated_mlp(), *norms(*POST_NORMS)), taps=_POST_TAPS)
)
_OLMO2 = attention(qkv_bias=_BIAS, out_bias=_BIAS, wide_norm=True)
for _type in ("olmo2", "olmo3"):
    register_family(
        Family(
            (_type,),
            layer=(*_OLMO2, *gated_mlp(), *norms(*POST_NORMS)),
            taps=_POST_TAPS,
            approximates={"heads": WIDE_NORM, "kv_heads": WIDE_NORM},
        )
    )
