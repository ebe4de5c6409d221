"""Models for text and images, with a text model of another family inside."""

import dataclasses

import torch

from pruning.family_case import Case, Places
from pruning.family_configs.dense import FOUR, GEMMA, GEMMA4, GEMMA4_TARGET, SQUARE, WINDOWS
from pruning.family_configs.hybrid import CASES as HYBRID

INSIDE = dict(
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
)
PLACES = Places(**INSIDE)
ENCODER = {"hidden_size": 20, "intermediate_size": 24}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
IMAGE, TOKENS = 95, [[1, 7, 95, 95, 95, 95, 14, 21]]  # an image is four tokens of the text
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
MROPE_12 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
QWEN = {"image_token_id": IMAGE, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
QWEN_ENCODER = {**ENCODER, "hidden_size": 24, "num_heads": 2, "patch_size": 2, "depth": 2}


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def square_image(**more):
    """The arguments of a forward pass with an image of 8 x 8 pixels."""
    return lambda: {"input_ids": torch.tensor(TOKENS), "pixel_values": _random(1, 3, 8, 8), **more}


def patches():
    """Those of Qwen's: 4 x 4 patches of 2 x 2 pixels in two frames."""
    ids = torch.tensor(TOKENS)
    return {
        "input_ids": ids,
        "pixel_values": _random(16, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def placed_patches():
    """Those of Gemma 4: 4 x 4 patches of 2 x 2 pixels with their positions."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    return {
        "input_ids": torch.tensor(TOKENS),
        "pixel_values": _random(1, 16, 3 * 2 * 2),
        "image_position_ids": places[None],
    }


TEXT = {case.model_type: case for case in HYBRID}
QWEN3_5 = {
    "vision_config": {**QWEN_ENCODER, "out_hidden_size": 48, "num_position_embeddings": 16},
    **QWEN,
}


def _around(text, model_type, config, follow, images):
    """The case of a model around a text model that has one of its own."""
    return dataclasses.replace(
        TEXT[text],
        model_type=model_type,
        config={"text_config": {"model_type": text, **TEXT[text].config}, **config},
        places=dataclasses.replace(TEXT[text].places, **INSIDE),
        follow=follow,
        images=images,
    )


CASES = (
    Case(
        "gemma3",
        {
            "text_config": {
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 16,
                "attention_bias": True,
                **WINDOWS,
            },
            "vision_config": {"model_type": "siglip_vision_model", **ENCODER, **LAYERS, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        norm_offset=1.0,
        places=dataclasses.replace(GEMMA["places"], **INSIDE),
        images=square_image(),
        follow=("mm_input_projection_weight",),
    ),
    Case(
        "gemma4",
        {
            "text_config": {"model_type": "gemma4_text", **GEMMA4},
            "vision_config": {
                "model_type": "gemma4_vision",
                **ENCODER,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 12,
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
            "image_token_id": IMAGE,
            "audio_config": None,
        },
        GEMMA4_TARGET,
        places=Places(
            **INSIDE,
            norms=(*FOUR, "post_per_layer_input_norm"),
            scored=("input_layernorm", "pre_feedforward_layernorm"),
        ),
        images=placed_patches,
        follow=("embed_vision.embedding_projection.weight",),
        fixed=("heads", "num_attention_heads", 2),
        stays=True,
    ),
    Case(
        "mistral3",
        {
            "text_config": {"model_type": "mistral"},
            "vision_config": {"model_type": "pixtral", **ENCODER, **LAYERS, "head_dim": 10, "patch_size": 2},
            "image_token_index": IMAGE,
            "multimodal_projector_bias": True,
            "tie_word_embeddings": False,
        },
        places=PLACES,
        images=square_image(image_sizes=torch.tensor([[8, 8]])),
        follow=("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"),
        approximate=("hidden",),
    ),
    Case(
        "llava",
        {
            "text_config": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
            "vision_config": {"model_type": "clip_vision_model", **ENCODER, **LAYERS, "patch_size": 4},
            "vision_feature_layer": [-2, -1],
            "image_token_index": IMAGE,
        },
        places=PLACES,
        images=square_image(),
        follow=("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"),
        approximate=("hidden",),
    ),
    Case(
        "qwen2_5_vl",
        {
            "text_config": {"model_type": "qwen2_5_vl_text", "head_dim": 12, **MROPE_12},
            "vision_config": {
                **QWEN_ENCODER,
                "out_hidden_size": 48,
                "fullatt_block_indexes": [0],
                "window_size": 8,
            },
            **QWEN,
        },
        places=PLACES,
        images=patches,
        follow=("merger.mlp.2.weight", "merger.mlp.2.bias"),
        **SQUARE,
    ),
    Case(
        "qwen3_vl",
        {
            "text_config": {"model_type": "qwen3_vl_text", "attention_bias": True, **MROPE},
            "vision_config": {
                **QWEN_ENCODER,
                "out_hidden_size": 48,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1],
            },
            **QWEN,
            "tie_word_embeddings": True,
        },
        places=PLACES,
        images=patches,
        follow=(
            *(f"merger.linear_fc2.{kind}" for kind in ("weight", "bias")),
            *(f"deepstack_merger_list.0.linear_fc2.{kind}" for kind in ("weight", "bias")),
        ),
        kept_layer=0,
    ),
    *(
        _around(
            f"{name}_text",
            name,
            QWEN3_5,
            ("visual.merger.linear_fc2.weight", "visual.merger.linear_fc2.bias"),
            patches,
        )
        for name in ("qwen3_5", "qwen3_5_moe")
    ),
)
