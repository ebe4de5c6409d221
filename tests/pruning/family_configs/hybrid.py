"""Families whose layers are of several kinds: attention in some, something else in the others."""

import numpy as np

from pruning.family_case import Case, Places
from pruning.family_configs.experts import CHOICE, route, sigmoid, softmax

DELTA_NETS = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    # 4 key heads with 2 value heads each become 3 with 1, or 2 with 2
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "attention_bias": True,
}
DELTA = {"norm_offset": 1.0, "fixed": ("delta_dim", "linear_value_head_dim", 4)}
DELTA_PLACES = Places(delta="linear_attn")
FEWER_VALUES = {"linear_num_value_heads": 3, "linear_num_key_heads": 3}
FEWER_KEYS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
CONV = {
    "layer_types": ["conv", "conv", "full_attention"],
    "conv_bias": True,
    "tie_word_embeddings": False,
    "head_dim": 16,
}
CONV_NORMS = ("operator_norm", "ffn_norm")
CONV_PLACES = dict(
    final_norm="model.embedding_norm",
    attention_out="self_attn.out_proj",
    mlp_in="feed_forward.w3",
    mlp_out="feed_forward.w2",
    conv_out="conv.out_proj",
    norms=CONV_NORMS,
    scored=CONV_NORMS,
)
# of the convolution's channels, of which there are as many as of the residual stream's
SQUARE = (("conv.conv.weight", 0), ("conv.conv.bias", 0), ("conv.out_proj.weight", 1))
EXPERTS = {"num_experts": 3, "moe_intermediate_size": 16}

# 8 heads of 12 channels in 2 groups become 4 heads of 8: mamba_expand follows, from 2 to 1
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_chunk_size": 8,
    "mamba_proj_bias": True,
    "mamba_expand": 2,
    "attention_bias": True,
    "mlp_bias": True,
}
FEWER = {"mamba_n_heads": 4, "mamba_d_head": 8}
APPROXIMATE = ("mamba_heads", "mamba_dim")
MAMBA_NORMS = ("input_layernorm", "pre_ff_layernorm")
MAMBA_PLACES = Places(
    final_norm="model.final_layernorm",
    mlp_in="feed_forward.up_proj",
    mlp_out="feed_forward.down_proj",
    mamba="mamba",
    norms=MAMBA_NORMS,
    scored=MAMBA_NORMS,
)
GRANITE = Places(
    mlp_in="shared_mlp.input_linear",
    mlp_part=(1, 2),
    mlp_out="shared_mlp.output_linear",
    experts="block_sparse_moe.experts",
    mamba="mamba",
)
NEMOTRON = Places(
    embedding="model.embeddings",
    final_norm="model.norm_f",
    attention_out="mixer.o_proj",
    mlp_in="mixer.up_proj",
    mlp_out="mixer.down_proj",
    experts="mixer.experts",
    mamba="mixer",
    norms=("norm",),
    scored=("norm",),
)


def _squared_relu(module, expert, x):
    """Experts without a gate."""
    up, down = (getattr(module, key)[expert].detach().double().numpy() for key in ("up_proj", "down_proj"))
    v = np.maximum(up @ x, 0) ** 2
    return v, down @ v


CASES = (
    Case("qwen3_5_text", DELTA_NETS, FEWER_VALUES, DELTA_PLACES, **DELTA),
    Case(
        "qwen3_5_moe_text",
        {**CHOICE, **DELTA_NETS, "shared_expert_intermediate_size": 40},
        {**EXPERTS, **FEWER_KEYS, "intermediate_size": None},
        DELTA_PLACES,
        route=route(softmax, True),
        **DELTA,
    ),
    Case(
        "qwen3_next",
        {**CHOICE, **DELTA_NETS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [2]},
        {**EXPERTS, **FEWER_VALUES},
        DELTA_PLACES,
        route=route(softmax, True),
        **DELTA,
    ),
    Case(
        "lfm2",
        # int(2/3 · 126) = 84, times 0.9 and up to a multiple of 16: 80 neurons
        {**CONV, "intermediate_size": 126, "block_multiple_of": 16, "block_ffn_dim_multiplier": 0.9},
        places=Places(**CONV_PLACES),
        square=SQUARE,
    ),
    Case(
        "lfm2_moe",
        {**CONV, **CHOICE, "num_dense_layers": 1},
        EXPERTS,
        places=Places(**CONV_PLACES, experts="feed_forward.experts"),
        route=route(sigmoid, True, "feed_forward.gate"),
        square=SQUARE,
    ),
    Case(
        "bamba",
        {**MAMBA, "attn_layer_indices": [2]},
        FEWER,
        places=MAMBA_PLACES,
        approximate=APPROXIMATE,
    ),
    Case(
        "falcon_h1",
        {
            **MAMBA,
            "mamba_d_ssm": 96,
            "mamba_rms_norm": True,
            "projectors_bias": True,
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 1.5,
            "mlp_multipliers": [0.8, 1.2],
            "key_multiplier": 0.6,
            "attention_out_multiplier": 1.3,
            "attention_in_multiplier": 0.9,
            "ssm_multipliers": [0.7, 1.1, 1.2, 0.8, 0.9],
            "ssm_in_multiplier": 1.4,
            "ssm_out_multiplier": 0.6,
        },
        FEWER,
        places=MAMBA_PLACES,
        approximate=APPROXIMATE,
    ),
    Case(
        "granitemoehybrid",
        {
            **{key: value for key, value in MAMBA.items() if key != "mlp_bias"},
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "shared_intermediate_size": 80,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
            "position_embedding_type": "rope",
        },
        {**FEWER, "intermediate_size": 16, "shared_intermediate_size": 48, "num_local_experts": 3},
        places=GRANITE,
        route=route(softmax, True, "block_sparse_moe.router"),
        approximate=APPROXIMATE,
    ),
    Case(
        "nemotron_h",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "n_groups": 2,
            "ssm_state_size": 5,
            "chunk_size": 8,
            "use_bias": True,
            "mlp_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 20,
            "routed_scaling_factor": 1.5,
        },
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_routed_experts": 3,
            "moe_intermediate_size": 16,
        },
        places=NEMOTRON,
        route=route(sigmoid, True, "mixer.gate"),
        expert=_squared_relu,
        approximate=APPROXIMATE,
    ),
)
