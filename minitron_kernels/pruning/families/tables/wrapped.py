"""Models for text and images, with a text model of a known family inside."""

from __future__ import annotations

from collections.abc import Callable

from minitron_kernels.pruning.families.configs import Config, config_value, nested, written_value
from minitron_kernels.pruning.families.family import Family, Param, When
from minitron_kernels.pruning.families.multimodal import Multimodal
from minitron_kernels.pruning.families.parts import (
    TWO_NORMS,
    attention,
    flag,
    gated_mlp,
    heads_fill_hidden,
    linear,
    norms,
)
from minitron_kernels.pruning.families.registry import register_multimodal

_PROJECTOR = "model.multi_modal_projector"
# what transformers wrote before its version 5, and writes still
_LLAVA = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    (f"{_PROJECTOR}.", "multi_modal_projector."),
)
_QWEN = (("model.visual.", "visual."), ("model.language_model.", "model."))
_NEURONS_OF_PROJECTOR = (
    "inside, the projector of images is as wide as the text model: of its neurons, which have no scores, "
    "those stay that have the numbers of the channels that stay"
)
_MOST_MERGERS = 32  # of DeepStack: the table has an entry for each, and a config says how many there are


def _vision(key: str, times: Callable[[Config], int] = lambda config: 1) -> Callable[[Config], int]:
    """The size of an axis of the encoder: an entry of its config, times what else the config says."""
    return lambda config: int(config_value(nested(config, "vision_config"), key)) * times(config)


def _feature_layers(config: Config) -> int:
    """The number of the encoder's layers whose outputs the projector reads beside each other."""
    layers = config_value(config, "vision_feature_layer", -1)
    return 1 if isinstance(layers, int) else len(layers)


def _merged_patches(config: Config) -> int:
    return int(config_value(nested(config, "vision_config"), "spatial_merge_size")) ** 2


def _has(key: str) -> When:
    return lambda config, layer: written_value(config, key) is not None


def _projected(key: str) -> Callable[[Config], int]:
    """Gemma 4: the width of what an encoder says; 0 where the model has no such encoder."""

    def width(config: Config) -> int:
        if written_value(config, key) is None:
            return 0
        inside = nested(config, key)
        return int(config_value(inside, "output_proj_dims") or config_value(inside, "hidden_size"))

    return width


register_multimodal(
    Multimodal(
        ("gemma3",),
        params=(Param(f"{_PROJECTOR}.mm_input_projection_weight", "vision, hidden"),),
        adds_to_residual=(f"{_PROJECTOR}.mm_input_projection_weight",),
        computed={"vision": _vision("hidden_size")},
        layouts=(_LLAVA,),
    )
)

register_multimodal(
    Multimodal(
        ("gemma4",),
        params=tuple(
            Param(
                f"model.embed_{kind}.embedding_projection.weight", f"hidden, {kind}", _has(f"{kind}_config")
            )
            for kind in ("vision", "audio")
        ),
        adds_to_residual=tuple(f"model.embed_{kind}.embedding_projection" for kind in ("vision", "audio")),
        computed={kind: _projected(f"{kind}_config") for kind in ("vision", "audio")},
    )
)

for _type in ("mistral3", "llava"):
    _bias = flag("multimodal_projector_bias", _type == "llava")
    register_multimodal(
        Multimodal(
            (_type,),
            params=(
                *linear(f"{_PROJECTOR}.linear_1", "hidden, vision", _bias),
                *linear(f"{_PROJECTOR}.linear_2", "hidden, hidden", _bias),
            ),
            adds_to_residual=(f"{_PROJECTOR}.linear_2",),
            computed={"vision": _vision("hidden_size", _feature_layers)},
            layouts=(_LLAVA,),
            approximates={"hidden": _NEURONS_OF_PROJECTOR},
        )
    )

_QWEN2_5 = (*attention(qkv_bias=True), *gated_mlp(), *norms(*TWO_NORMS))
register_multimodal(
    Multimodal(
        ("qwen2_5_vl",),
        inner={"qwen2_5_vl_text": Family(("qwen2_5_vl_text",), layer=_QWEN2_5, refuses=heads_fill_hidden)},
        params=linear("model.visual.merger.mlp.2", "hidden, vision", True),
        config_follows={"vision_config.out_hidden_size": "hidden"},
        computed={"vision": _vision("hidden_size", _merged_patches)},
        layouts=(_QWEN,),
    )
)


_MERGERS = "model.visual.deepstack_merger_list"


def _mergers(config: Config) -> int:
    return len(config_value(nested(config, "vision_config"), "deepstack_visual_indexes", ()))


def _has_merger(number: int) -> When:
    return lambda config, layer: number < _mergers(config)


def _deepstack_layers(config: Config) -> tuple[int, str]:
    """DeepStack adds what its encoder says to the outputs of the first layers, one merger to each."""
    return _mergers(config), "features of images enter after each of them (DeepStack), by their numbers"


_BIAS = flag("attention_bias")
_QWEN3 = (
    *attention(qkv_bias=_BIAS, out_bias=_BIAS, qk_norm=True),
    *gated_mlp(),
    *norms(*TWO_NORMS),
)
register_multimodal(
    Multimodal(
        ("qwen3_vl",),
        inner={"qwen3_vl_text": Family(("qwen3_vl_text",), layer=_QWEN3)},
        params=(
            *linear("model.visual.merger.linear_fc2", "hidden, vision", True),
            *(
                Param(
                    f"model.visual.deepstack_merger_list.{number}.linear_fc2.{kind}",
                    axes,
                    _has_merger(number),
                )
                for number in range(_MOST_MERGERS)
                for kind, axes in (("weight", "hidden, vision"), ("bias", "hidden"))
            ),
        ),
        config_follows={"vision_config.out_hidden_size": "hidden"},
        computed={"vision": _vision("hidden_size", _merged_patches)},
        keeps_first=_deepstack_layers,
        layouts=(_QWEN,),
    )
)

# ---- Qwen3.5: the same encoder, without DeepStack

for _type in ("qwen3_5", "qwen3_5_moe"):
    register_multimodal(
        Multimodal(
            (_type,),
            params=linear("model.visual.merger.linear_fc2", "hidden, vision", True),
            config_follows={"vision_config.out_hidden_size": "hidden"},
            computed={"vision": _vision("hidden_size", _merged_patches)},
            layouts=(_QWEN,),
        )
    )
