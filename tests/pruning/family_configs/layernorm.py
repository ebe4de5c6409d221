"""Families with norms that subtract the mean of the channels."""

from pruning.family_case import Case, Places
from pruning.family_configs.dense import BIASES, SQUARE, TIED, WINDOWS

MEAN = dict(centred=True, approximate=("hidden",))
ONE = dict(norms=("input_layernorm",), scored=("input_layernorm",))
DENSE_4H = dict(mlp_in="mlp.dense_h_to_4h", mlp_out="mlp.dense_4h_to_h")
# no key of the number of key/value heads: each query head has its own
ALL_HEADS = {"hidden_size": 24, "num_key_value_heads": None}

CASES = (
    Case("nemotron", BIASES, norm_offset=1.0, **MEAN),
    Case("jais2", BIASES, **MEAN),
    Case("starcoder2", {"use_bias": True}, places=Places(mlp_in="mlp.c_fc", mlp_out="mlp.c_proj"), **MEAN),
    Case(
        "cohere",
        {"attention_bias": True, "use_qk_norm": True, "logit_scale": 0.5, **TIED},
        places=Places(**ONE),
        **MEAN,
    ),
    Case("cohere2", {"attention_bias": True, "logit_scale": 0.5, **WINDOWS}, places=Places(**ONE), **MEAN),
    Case(
        "phi",
        {"qk_layernorm": True, "head_dim": 12},
        target={"hidden_size": 24},
        places=Places(
            attention_out="self_attn.dense",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
            final_norm="model.final_layernorm",
            **ONE,
        ),
        square=(
            ("self_attn.q_proj.weight", 0),
            ("self_attn.q_proj.bias", 0),
            ("self_attn.dense.weight", 1),
        ),
        **MEAN,
    ),
    Case(
        "stablelm",
        {"use_qkv_bias": True, "qk_layernorm": True, "head_dim": 12, "partial_rotary_factor": 0.5},
        **SQUARE,
        **MEAN,
    ),
    Case(
        "persimmon",
        {"head_dim": 12, "num_key_value_heads": None},
        target=ALL_HEADS,
        places=Places(attention_out="self_attn.dense", final_norm="model.final_layernorm", **DENSE_4H),
        square=(("self_attn.dense.weight", 1),),
        **MEAN,
    ),
    Case(
        "gpt_neox",
        {"head_dim": 12, "num_key_value_heads": None, "use_parallel_residual": True},
        target=ALL_HEADS,
        places=Places(
            layers="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            attention_out="attention.dense",
            **DENSE_4H,
        ),
        square=(("attention.dense.weight", 1),),
        stored_as={"lm_head.weight": "embed_out.weight"},
        **MEAN,
    ),
    # the epsilon of its norms, 1e-5, is in its code, where the test cannot take it out
    Case("olmo", {"attention_bias": True, "clip_qkv": 0.5}, tolerance=3e-4, **MEAN),
)
