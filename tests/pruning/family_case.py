"""What a test of a model family needs to know of it, written independently of the library's tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

TWO = ("input_layernorm", "post_attention_layernorm")
COMMON = dict(
    # the residual stream's width is the size of no other dimension, by which its dimensions are found
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# the middle layer goes, so that entries of layers in the config must move
TARGET = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
DROPPED_LAYER = 1


@dataclass(frozen=True)
class Places:
    """Names of modules: of the model, and inside a layer; what a layer lacks is not there.

    Args:
        layers, embedding, final_norm: of the model.
        attention_out: the linear layer that reads the heads.
        mlp_in, mlp_part: the linear layer that gives the neurons before their gate; (index, number) of the
            equal part of its output that is them.
        mlp_out: the linear layer that reads the neurons.
        experts: the module that holds the stacked weights of the experts; `neurons_first`: of down_proj's two
            dimensions inside an expert.
        router: that which gives [tokens, experts] weights where the experts read tokens times these; or None.
        conv_out: the linear layer that reads the channels of a short convolution; None where there are none.
        mamba, delta: the state space, the gated delta net; None where there are none.
        norms: all norms over the residual stream; `scored` those of them whose output scores its channels.
        positions: the embedding of positions; None where they are not learned.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    attention_out: str = "self_attn.o_proj"
    mlp_in: str = "mlp.up_proj"
    mlp_part: tuple[int, int] = (0, 1)
    mlp_out: str = "mlp.down_proj"
    experts: str = "mlp.experts"
    neurons_first: bool = False
    router: str | None = None
    conv_out: str | None = None
    mamba: str | None = None
    delta: str | None = None
    norms: tuple[str, ...] = TWO
    scored: tuple[str, ...] = TWO
    positions: str | None = None


@dataclass(frozen=True)
class Case:
    """A family's tiny model and the smaller one.

    Args:
        model_type: of its config.
        config: entries beside or instead of COMMON, with everything optional on; None takes one out.
        target: sizes beside or instead of TARGET; None takes one out.
        places: where its parts are.
        norm_offset: what norms add to their weight.
        centred: whether norms subtract the mean of the channels. The pruned model is then compared with the
            masked one where that mean is 0.
        wide_norms: norms inside a layer, over the width of all query ("q" in the name) or key/value heads.
            The pruned model is then compared with a masked one in which they are over the kept heads.
        square: (end of a parameter's name, dimension) of those that are as wide as the residual stream, but
            are not of its channels.
        approximate: axes that the plan's summary must call approximate where they are cut.
        tolerance: of the logits, beside rounding, in units of the largest.
        stored_as: {name in the model: name in checkpoints of transformers} where they differ.
        route: (layer, kept experts), which lets the layer's router choose among these only.
        expert: (module of all experts, number, token [hidden]) -> (neurons, output) of one expert, in numpy.
        fixed: (axis, name of its size, a size): cannot be pruned, and is not scored.
        unscored: other axes without scores, by the names of their tables.
        transposed: whether the linear layers of a layer have weights [in, out].
        stays: whether all layers stay, since none can go.
        kept_layer: one that cannot be dropped; None where each can.
        images: of models that read images: the arguments of a forward pass with one.
        follow: ends of the names of parameters outside of the text model that follow it.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    places: Places = Places()
    norm_offset: float = 0.0
    centred: bool = False
    wide_norms: tuple[str, ...] = ()
    square: tuple[tuple[str, int], ...] = ()
    approximate: tuple[str, ...] = ()
    tolerance: float = 0.0
    stored_as: Mapping[str, str] = field(default_factory=dict)
    route: Callable[[Any, tuple[int, ...]], None] | None = None
    expert: Callable[[Any, int, Any], tuple[Any, Any]] | None = None
    fixed: tuple[str, str, int] | None = None
    unscored: tuple[str, ...] = ()
    transposed: bool = False
    stays: bool = False
    kept_layer: int | None = None
    images: Callable[[], dict[str, Any]] | None = None
    follow: tuple[str, ...] = ()

    @property
    def auto(self):
        """The class of transformers that loads it."""
        return "AutoModelForCausalLM" if self.images is None else "AutoModelForImageTextToText"

    def is_of_text(self, name):
        """Whether a parameter of the model is of the text model, or follows it."""
        root = self.places.layers.rpartition(".")[0]
        if self.images is None or name.startswith(f"{root}.") or name.endswith(self.follow):
            return True
        return "lm_head" in name.split(".")

    def make_config(self, **changes):
        """The config of the tiny model; `config` goes to that of its text model.

        Skips where this transformers does not have the type.
        """
        from transformers import CONFIG_MAPPING, AutoConfig, __version__

        if self.model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {__version__} has no {self.model_type}")
        outer = dict(self.config)
        inner = outer.pop("text_config", None)
        entries = {**COMMON, **(outer if inner is None else inner), **changes}
        entries = {key: value for key, value in entries.items() if value is not None}
        if inner is not None:
            entries = {**outer, "text_config": entries}
        return AutoConfig.for_model(self.model_type, **entries)

    @property
    def sizes(self):
        """The sizes of the smaller model."""
        return {key: value for key, value in {**TARGET, **self.target}.items() if value is not None}
