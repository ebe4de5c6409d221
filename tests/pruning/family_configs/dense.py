"""Families whose layers have one MLP each."""

from pruning.family_case import TWO, Case, Places

FOUR = (*TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA = dict(
    norm_offset=1.0, places=Places(norms=FOUR, scored=("input_layernorm", "pre_feedforward_layernorm"))
)
FUSED = dict(mlp_in="mlp.gate_up_proj", mlp_part=(1, 2))
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
# of three layers the middle one goes: what stays is of both kinds, and is another pattern than that of two
WINDOWS = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
# head_dim is hidden_size / num_attention_heads: both halve. All heads are together as wide as the stream
SQUARE = dict(
    target={"hidden_size": 24},
    square=(
        *((f"self_attn.{side}_proj.{kind}", 0) for side in "q" for kind in ("weight", "bias")),
        ("self_attn.o_proj.weight", 1),
    ),
)
OLMO2 = dict(
    places=Places(
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        scored=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
)
WIDE = dict(wide_norms=("self_attn.q_norm", "self_attn.k_norm"), approximate=("heads", "kv_heads"))

GEMMA4 = {
    **WINDOWS,
    "attention_bias": True,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 96,
    "global_head_dim": 20,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
GEMMA4_TARGET = {"num_attention_heads": None, "num_key_value_heads": None}

CASES = (
    Case("llama", BIASES),
    Case("internlm3", BIASES),
    Case("iquestcoder", BIASES),
    Case("exaone", BIASES),
    Case(
        "granite",
        {
            **BIASES,
            **TIED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    Case("smollm3", {**BIASES, **TIED, **WINDOWS, "no_rope_layers": [1, 1, 0], "use_sliding_window": True}),
    Case("mistral"),
    Case("ministral", WINDOWS),
    Case("ministral3"),
    Case("cwm", {"mlp_bias": True, **WINDOWS}),
    Case("qwen2", TIED),
    Case("qwen3", {"attention_bias": True}),
    Case("seed_oss", {**BIASES, "attention_out_bias": True}),
    Case("hunyuan_v1_dense", {"attention_bias": True}),
    Case("ernie4_5", {"use_bias": True, **TIED}),
    Case("helium", {**BIASES, "head_dim": 12}, **SQUARE),
    Case(
        "granite_swa",
        {
            **BIASES,
            **TIED,
            **WINDOWS,
            "residual_multiplier": 0.5,
            "layer_rope_theta": [10000.0, 0.0, 500.0],
        },
    ),
    Case(
        "hyperclovax",
        {**BIASES, "residual_multiplier": 0.5},
        places=Places(norms=(*TWO, "post_norm1", "post_norm2")),
    ),
    Case("arcee", BIASES),
    Case(
        "apertus",
        {"attention_bias": True, "hidden_act": "xielu"},
        places=Places(
            norms=("attention_layernorm", "feedforward_layernorm"),
            scored=("attention_layernorm", "feedforward_layernorm"),
        ),
    ),
    Case("gemma", {"attention_bias": True, **TIED}, norm_offset=1.0),
    Case(
        "vaultgemma",
        {"attention_bias": True, "query_pre_attn_scalar": 16, **WINDOWS},
        places=Places(
            norms=("input_layernorm", "pre_feedforward_layernorm"),
            scored=("input_layernorm", "pre_feedforward_layernorm"),
        ),
        norm_offset=1.0,
    ),
    Case("gemma2", {"query_pre_attn_scalar": 16, "attention_bias": True, **WINDOWS, **TIED}, **GEMMA),
    Case("gemma3_text", {"query_pre_attn_scalar": 16, "attention_bias": True, **WINDOWS}, **GEMMA),
    Case("phi3", places=Places(**FUSED)),
    Case("glm", {"attention_bias": True}, places=Places(**FUSED)),
    Case(
        "glm4",
        {"attention_bias": True},
        places=Places(**FUSED, norms=(*TWO, "post_self_attn_layernorm", "post_mlp_layernorm")),
    ),
    Case("exaone4", WINDOWS, **OLMO2),
    Case("olmo2", {"attention_bias": True}, **OLMO2, **WIDE),
    Case("olmo3", {"attention_bias": True, **WINDOWS}, **OLMO2, **WIDE),
    Case(
        "gemma4_text",
        GEMMA4,
        GEMMA4_TARGET,
        places=Places(
            norms=(*FOUR, "post_per_layer_input_norm"),
            scored=("input_layernorm", "pre_feedforward_layernorm"),
        ),
        fixed=("heads", "num_attention_heads", 2),
        stays=True,
    ),
)
