"""GPT-2 and its like: LayerNorms, learned positions or ALiBi, heads as wide as the residual stream."""

from pruning.family_case import Case, Places
from pruning.family_configs.layernorm import ALL_HEADS, MEAN

# the names that these have instead of those of COMMON; no head_dim
OTHER = dict.fromkeys(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    )
)
GPT = {**OTHER, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 64}
NO_HEAD_DIM = {"head_dim": None, "num_key_value_heads": None}
IN_TRANSFORMER = dict(
    layers="transformer.h", embedding="transformer.wte", final_norm="transformer.ln_f", mlp_in="mlp.c_fc"
)
GPT_NORMS = dict(norms=("ln_1", "ln_2"), scored=("ln_1", "ln_2"))
# a target without what the others have
NOTHING = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
LIKE_OPT = dict(
    attention_out="self_attn.out_proj",
    mlp_in="fc1",
    mlp_out="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    scored=("self_attn_layer_norm", "final_layer_norm"),
)
BIOGPT = dict(
    layers="biogpt.layers",
    embedding="biogpt.embed_tokens",
    positions="biogpt.embed_positions",
    final_norm="biogpt.layer_norm",
)
WPE = dict(positions="transformer.wpe")
QKV = dict(
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    attention_out="self_attention.dense",
    mlp_in="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
)


def square(block, out, sides="qkv"):
    """Of all heads, of which there are as many channels as of the residual stream."""
    projections = (f"{block}.{side}_proj.{kind}" for side in sides for kind in ("weight", "bias"))
    return (*((name, 0) for name in projections), (f"{block}.{out}.weight", 1))


CASES = (
    Case(
        "gpt2",
        GPT,
        ALL_HEADS,
        places=Places(
            **IN_TRANSFORMER, **GPT_NORMS, **WPE, attention_out="attn.c_proj", mlp_out="mlp.c_proj"
        ),
        square=(("attn.c_proj.weight", 0),),
        transposed=True,
        **MEAN,
    ),
    Case(
        "gpt_bigcode",
        GPT,
        ALL_HEADS,
        places=Places(
            **IN_TRANSFORMER, **GPT_NORMS, **WPE, attention_out="attn.c_proj", mlp_out="mlp.c_proj"
        ),
        square=(("attn.c_proj.weight", 1),),
        **MEAN,
    ),
    Case(
        "gptj",
        {**GPT, "rotary_dim": 8},
        # by the names that its config has
        {**NOTHING, "n_embd": 24, "n_inner": 48, "n_head": 2},
        places=Places(
            **{**IN_TRANSFORMER, "mlp_in": "mlp.fc_in"},
            mlp_out="mlp.fc_out",
            attention_out="attn.out_proj",
            norms=("ln_1",),
            scored=("ln_1",),
        ),
        square=square("attn", "out_proj"),
        **MEAN,
    ),
    Case(
        "gpt_neo",
        {
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")),
            "num_layers": 3,
            "num_heads": 4,
            # the middle layer goes: what stays is another pattern than that of two layers
            "attention_types": [[["global"], 2], [["local"], 1]],
            "window_size": 4,
        },
        ALL_HEADS,
        places=Places(
            **IN_TRANSFORMER,
            **GPT_NORMS,
            **WPE,
            mlp_out="mlp.c_proj",
            attention_out="attn.attention.out_proj",
        ),
        square=square("attn.attention", "out_proj"),
        **MEAN,
    ),
    Case(
        "opt",
        {**NO_HEAD_DIM, "intermediate_size": None, "ffn_dim": 80},
        ALL_HEADS,
        places=Places(
            layers="model.decoder.layers",
            embedding="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            final_norm="model.decoder.final_layer_norm",
            **LIKE_OPT,
        ),
        square=square("self_attn", "out_proj"),
        **MEAN,
    ),
    Case(
        "bloom",
        {
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "intermediate_size")),
            **NO_HEAD_DIM,
            "n_layer": 3,
            "n_head": 4,
        },
        NOTHING,
        places=Places(**QKV),
        fixed=("hidden", "hidden_size", 32),
        unscored=("energy", "heads", "mlp"),
    ),
    Case(
        "falcon",
        {
            **NO_HEAD_DIM,
            "intermediate_size": None,
            "ffn_hidden_size": 80,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
        },
        {"hidden_size": 24},
        places=Places(**QKV, norms=("ln_attn", "ln_mlp"), scored=("ln_attn", "ln_mlp")),
        square=(("self_attention.dense.weight", 1),),
        **MEAN,
    ),
    Case(
        "biogpt",
        NO_HEAD_DIM,
        ALL_HEADS,
        places=Places(**BIOGPT, **LIKE_OPT),
        square=square("self_attn", "out_proj"),
        **MEAN,
    ),
    Case(
        "codegen",
        {**GPT, "rotary_dim": 8},
        {**NOTHING, "n_inner": 48},
        places=Places(
            **{**IN_TRANSFORMER, "mlp_in": "mlp.fc_in"},
            mlp_out="mlp.fc_out",
            attention_out="attn.out_proj",
            norms=("ln_1",),
            scored=("ln_1",),
        ),
        fixed=("hidden", "n_embd", 24),
        unscored=("energy", "heads"),
    ),
    Case(
        "mpt",
        {**OTHER, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
        NOTHING,
        places=Places(
            layers="transformer.blocks",
            embedding="transformer.wte",
            final_norm="transformer.norm_f",
            attention_out="attn.out_proj",
            mlp_in="ffn.up_proj",
            mlp_out="ffn.down_proj",
            norms=("norm_1", "norm_2"),
            scored=("norm_1", "norm_2"),
        ),
        fixed=("hidden", "d_model", 24),
        unscored=("energy", "heads", "mlp"),
    ),
)
