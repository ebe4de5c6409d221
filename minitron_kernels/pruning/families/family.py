"""Family, the description of a model family: its parameters with their axes, and where each axis is tapped.

One declarative table serves scoring, planning, pruning in memory and pruning of checkpoints. A parameter is
described by the axes of its dimensions: "heads+kv_heads+kv_heads, hidden" for a fused projection to queries,
keys and values. The axes:

    vocab, hidden       tokens; channels of the residual stream
    heads, kv_heads     query heads and key/value heads, head_dim elements each
    num_heads,          query heads and key/value heads, one element each
    num_kv_heads
    qkv                 KV group after KV group: its query heads, its key head and its value head, head_dim
                        elements each
    head_dim            elements of a head: never pruned
    mlp                 neurons of a layer's MLP
    conv                channels of a layer's short convolution (LFM2)
    mamba_heads         heads of a layer's state space (Mamba-2), mamba_dim channels each
    mamba_dim           channels of such a head, the same in all heads of a layer
    delta_keys          key heads of a layer's gated delta net
    delta_heads         its value heads, equally many of them for each key head, behind each other
    experts             experts of a layer
    expert_mlp          neurons of an expert; ranked within each expert
    layers              whole layers
    one                 a dimension of one element

Any other name to which `Family.size_keys` gives a config key, or `Family.computed` a function of the
config, is an axis that is never pruned, such as the neurons of shared experts.

An element of an axis may hold several elements of the dimension, behind each other: "heads*v_dim" are v_dim
for each head ("heads" alone is "heads*head_dim"), and "expert_mlp*2" are pairs of gate and neuron. axes.py
has the grammar, with "heads(head_dim|head_dim)" for heads that have their query and a gate behind each other.

Names and shapes are those of the causal language models of Hugging Face transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_kernels.pruning.families.axes import dims_of, elements, names_in
from minitron_kernels.pruning.families.configs import (
    Config,
    check_names,
    config_value,
    nested,
    of_layers_alone,
    written_value,
)
from minitron_kernels.pruning.families.states import State, When
from minitron_kernels.pruning.families.stored_names import StoredNames

# axis -> the config keys of its size; the first that is present is used
SIZE_KEYS: dict[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp": ("intermediate_size",),
}
TIE_KEY = "tie_word_embeddings"
# axes of what is looked up, by token or by position: "without embeddings" leaves these out
EMBEDDED = frozenset(("vocab", "input_vocab", "positions"))
# in a parameter's name: its number -> the axis that it counts
NUMBERED = {"{expert}": "experts", "{head}": "heads", "{kv_head}": "kv_heads"}
# config keys of how many layers there are for multi-token prediction (MTP), which no table describes
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers")


@dataclass(frozen=True)
class Param:
    """One parameter of a layer (or of the model around the layers), or one learned buffer.

    Args:
        name: inside a layer, e.g. "self_attn.q_proj.weight"; with "{expert}" where each expert has one, and
            "{head}" or "{kv_head}" where each head has.
        axes: of its dimensions, separated by ", "; "a+b" for concatenated parts; "" for a scalar.
        when: (config, layer) -> whether the layer has this parameter; None for always.
        buffer: whether it is a persistent buffer of the model, such as e_score_correction_bias: cut and
            stored as parameters are, but not counted as one.
    """

    name: str
    axes: str
    when: When | None = None
    buffer: bool = False

    @property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The parts of each dimension."""
        return dims_of(self.axes)


@dataclass(frozen=True)
class Located:
    """A parameter of one model: its layer, and its expert or head, if any, and its dimensions."""

    name: str
    dims: tuple[tuple[str, ...], ...]
    layer: int | None = None
    expert: int | None = None
    pattern: str = ""  # its name with {layer} and a key of NUMBERED for their numbers
    buffer: bool = False
    head: int | None = None  # its query head, or KV head: `axis` says which
    axis: str | None = None  # that its number counts

    @property
    def stacked(self) -> bool:
        """Whether it holds what is cut for each expert by itself, along its first dimension."""
        inside = {name for parts in self.dims[1:] for part in parts for name in names_in(part)}
        return self.dims[:1] == (("experts",),) and (len(self.dims) == 3 or "expert_mlp" in inside)

    def moved(self, layer: int | None, number: int | None) -> str:
        """Its name in a model where its layer, and its expert or head, have these numbers."""
        return _numbered_name(self.pattern or self.name, layer, number)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape in a model with these sizes."""
        return tuple(sum(elements(axis, sizes) for axis in parts) for parts in self.dims)


@dataclass(frozen=True)
class Taps:
    """Where a layer's axes are tapped: names of modules inside a layer.

    Args:
        attention_out: the linear layer whose input is the heads' output, in layers with attention.
        mlp_down: the linear layer whose input is the activated neurons; None in a layer of experts only.
        mlp_up: the linear layer whose output is the neurons before gating.
        mlp_up_part: (index, number of equal parts): the part of mlp_up's output that holds the neurons.
        scored_norms: norms whose output scores the residual channels: those that feed linear layers.
        norms: all norms over residual channels.
        conv_out: the linear layer whose input is the channels of a short convolution.
        mamba_in: the linear layer of a state space whose output is z, x, B, C and Δ; x [heads · mamba_dim],
            behind the equally wide z, scores heads and channels.
        delta_out: the linear layer whose input is the value heads' output, in layers with a gated delta net.
        experts: the module that holds the weights of all experts, forward(hidden, top_k_index,
            top_k_weights); None where there are none.
        router: where all experts get all tokens, multiplied by the router's weights, forward(hidden
            [experts · tokens, hidden]): the router, which returns (weights, logits [tokens, experts]).
    """

    attention_out: str = "self_attn.o_proj"
    mlp_down: str | None = "mlp.down_proj"
    mlp_up: str | None = "mlp.up_proj"
    mlp_up_part: tuple[int, int] = (0, 1)
    scored_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    experts: str | None = None
    router: str | None = None
    conv_out: str | None = None
    mamba_in: str | None = None
    delta_out: str | None = None


@dataclass(frozen=True)
class Family:
    """The description of one family; register_family() (registry.py) makes it known.

    Args:
        model_types: the values of `config.model_type`.
        layer: the parameters of a layer.
        taps: where its axes are tapped.
        stored_layer: the parameters of a layer in checkpoints; None where they are the same as in the model.
        outer: the parameters around the layers; the head's weight is left out of models where it is tied.
        layers, final_norm, embedding, head: names of these modules in the model.
        size_keys: config keys of axes, in addition to SIZE_KEYS or instead of them.
        computed: {axis: (config) -> its size} of axes that no key of the config gives alone.
        follows: {axis: the axis whose size it has}, of axes that share a config key with another.
        derived: {config key: (sizes, config) -> its value} of keys that must agree with several sizes; the
            config is the (text model's) source.
        restated: {config key: (config) -> its value} of keys that say again what others do, and that a
            checkpoint's config.json may have, although transformers does not write them.
        fixed: (config) -> {axis: why it cannot be pruned}: what the model or its config lacks for that.
        reads_residual: linear layers inside a layer that read the residual stream without a norm.
        keeps_first: (config) -> (how many of the first layers must stay, why).
        defaults: of config keys that a config.json may leave out; only for model types that transformers does
            not know: it has its own defaults for the others.
        norm_offset: what a norm adds to its stored weight to get its gain: 1 where it stores gain - 1.
        aliases: {name in checkpoints: name in the model} of parameters around the layers that transformers
            stores under other names; it loads both, and pruned checkpoints have the model's.
        folds: {norm without a gain: linear layers that read it and take over the factor that its gain would
            get}, for norms inside a layer, and for the final norm.
        scales_embedding: whether embeddings are multiplied by √hidden_size.
        is_sparse: (config, layer) -> whether that layer has experts.
        per_layer_keys: config keys that hold one entry for each layer.
        layer_index_keys: config keys that hold a list of layer indices.
        dense_layers: (list of dense layers) -> the config entries that say so; for families where that
            follows from a layer's index, which changes when layers are dropped.
        refuses: (config) -> why transformers would not load it; None where it does.
        states: what layers without attention keep in a cache, or layers keep beside keys and values. A family
            that has any says of all its layers what they keep, so that memory can be counted.
        token_states: what layers keep of each token, where that is not a key and a value for each of
            kv_heads; a family that has any says so of all its layers.
        approximates: {axis: in what the smaller model differs from the whole one with what is cut put out of
            action}; plans say so where the axis is cut. Leave out an axis that is cut exactly.
        layer_entries: (config, layers that stay) -> the entries of these layers, for what the config has in
            another form than per_layer_keys and layer_index_keys.
        stored_names: other names that checkpoints have than the model.
        reads_per_layer: whether the table is of models whose config has a per_layer_config.
        text_key, config_follows, adds_to_residual, layouts: of a text model inside another: see Multimodal.
    """

    model_types: tuple[str, ...]
    layer: tuple[Param, ...]
    taps: Taps = field(default_factory=Taps)
    stored_layer: tuple[Param, ...] | None = None
    outer: tuple[Param, ...] = (
        Param("model.embed_tokens.weight", "vocab, hidden"),
        Param("model.norm.weight", "hidden"),
        Param("lm_head.weight", "vocab, hidden"),
    )
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    size_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    folds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scales_embedding: bool = False
    is_sparse: When = field(default=lambda config, layer: False)
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    layer_index_keys: tuple[str, ...] = ()
    dense_layers: Callable[[list[int]], dict[str, Any]] | None = None
    refuses: Callable[[Config], str | None] = field(default=lambda config: None)
    approximates: Mapping[str, str] = field(default_factory=dict)
    states: tuple[State, ...] = ()
    token_states: tuple[State, ...] = ()
    computed: Mapping[str, Callable[[Config], int]] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Mapping[str, int], Config], int]] = field(default_factory=dict)
    restated: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    fixed: Callable[[Config], Mapping[str, str]] = field(default=lambda config: {})
    keeps_first: Callable[[Config], tuple[int, str]] = field(default=lambda config: (0, ""))
    reads_residual: tuple[str, ...] = ()
    layer_entries: Callable[[Config, list[int]], dict[str, Any]] = field(default=lambda config, layers: {})
    stored_names: StoredNames = field(default_factory=StoredNames)
    reads_per_layer: bool = False
    text_key: str | None = None
    config_follows: Mapping[str, str] = field(default_factory=dict)
    adds_to_residual: tuple[str, ...] = ()
    layouts: tuple[tuple[tuple[str, str], ...], ...] = ()

    def text(self, config: Config) -> Config:
        """The config of the text model; the config itself where it is not inside another."""
        return config if self.text_key is None else nested(config, self.text_key)

    def value(self, config: Config, key: str, default: Any = None) -> Any:
        """`key` of the (text model's) config, else the family's default, else `default`."""
        return config_value(self.text(config), key, self.defaults.get(key, default))

    def tied(self, config: Config) -> bool:
        """Whether the head is tied to the embedding, as the whole config says, not the text model's."""
        return bool(config_value(config, TIE_KEY, self.defaults.get(TIE_KEY, False)))

    def is_in_head(self, name: str) -> bool:
        """Whether a parameter of the model is the head's: its weight or its bias."""
        return name.rpartition(".")[0] == self.head

    def outside(self, name: str) -> bool:
        """Whether a tensor is outside of the text model: copied as it is, unless the table has it."""
        root = self.layers.rpartition(".")[0]
        return self.text_key is not None and not name.startswith((f"{root}.", f"{self.head}."))

    def norms_in(self, config: Config, layer: int, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The norms, of `names` (default: all of taps.norms), that a layer has: a norm whose parameters are
        left out there by their `when` is not in it."""
        there = {param.name.rpartition(".")[0]: False for param in self.layer}
        for param in self.layer:
            there[param.name.rpartition(".")[0]] |= _is_there(param, config, layer)
        return tuple(name for name in (self.taps.norms if names is None else names) if there.get(name, True))

    def keys_of(self, axis: str) -> tuple[str, ...]:
        """The config keys that may hold the size of an axis."""
        return self.size_keys.get(axis, SIZE_KEYS.get(axis, ()))

    def sizes(self, config: Config) -> dict[str, int]:
        """The size of each axis of a model with this config.

        Raises:
            ValueError: the config lacks a size that cannot be inferred, or has it twice, at different values.
        """
        sizes: dict[str, int] = {}
        text = self.text(config)
        if not self.reads_per_layer and (alone := of_layers_alone(text)):
            raise ValueError(
                f"the config has per_layer_config, by which layers differ in {', '.join(alone)}: no table "
                f"describes such a {self.model_types[0]}"
            )
        for axis in dict.fromkeys((*SIZE_KEYS, *self.size_keys)):
            if axis in self.computed:  # its key may hold something else than a number
                continue
            keys = self.keys_of(axis)
            # a key that is written takes precedence over the default of another
            found = [value for key in keys if (value := written_value(text, key)) is not None]
            if any(value != found[0] for value in found):
                check_names(text)
            found = found or [value for key in keys if (value := self.value(config, key)) is not None]
            if found:
                sizes[axis] = int(found[0])
        for axis in ("vocab", "hidden", "layers", "heads"):
            if axis not in sizes:
                raise ValueError(
                    f"the config has no {self.keys_of(axis)[0]}, which {self.model_types[0]} needs"
                )
        sizes.setdefault("kv_heads", sizes["heads"])
        sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
        return sizes | {axis: int(size(config)) for axis, size in self.computed.items()}

    def parameters(
        self, config: Config, *, stored: bool = False, tied: bool | None = None
    ) -> Iterator[Located]:
        """All parameters of a model with this config, and the buffers that are cut like them.

        Args:
            config: of the model.
            stored: whether to give their names in a checkpoint, not those in the model.
            tied: whether the head is tied to the embedding, and so left out; None: as the config says.
        """
        sizes = self.sizes(config)
        tied = self.tied(config) if tied is None else tied
        for param in self.outer:
            if not (tied and param.name == f"{self.head}.weight") and _is_there(param, config, -1):
                yield Located(param.name, param.dims, buffer=param.buffer)
        inside = self.stored_layer if stored and self.stored_layer is not None else self.layer
        for layer in range(sizes["layers"]):
            for param in inside:
                if not _is_there(param, config, layer):
                    continue
                pattern = f"{self.layers}.{{layer}}.{param.name}"
                axis = _numbered(param)
                for number in range(sizes[axis]) if axis else (None,):
                    yield _located(param, layer, number, pattern, axis)

    def layer_axes(self, config: Config, layer: int) -> frozenset[str]:
        """The axes of a layer's parameters: "heads" where it has attention, "mlp" where it has an MLP."""
        there = [param for param in self.layer if _is_there(param, config, layer)]
        parts = {part for param in there for parts in param.dims for part in parts}
        return frozenset(name for part in parts for name in names_in(part))

    def locate(self, name: str, config: Config) -> Located | None:
        """The parameter with this name in the model or in a checkpoint; None if there is none."""
        for param in self.outer:
            if name == param.name:
                return Located(name, param.dims, buffer=param.buffer)
        found = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
        if not found:
            return None
        layer, rest = int(found[1]), found[2]
        for param in (*self.layer, *(self.stored_layer or ())):
            inside = re.fullmatch(re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(param.name)), rest)
            if inside and _is_there(param, config, layer):
                number = int(inside[1]) if inside.groups() else None
                pattern = f"{self.layers}.{{layer}}.{param.name}"
                return _located(param, layer, number, pattern, _numbered(param))
        return None

    def count_parameters(self, config: Config, *, embeddings: bool = True) -> int:
        """The number of parameters, a tied head once.

        embeddings: False leaves out embeddings and the head: what has an axis of EMBEDDED.
        """
        sizes = self.sizes(config)
        total = 0
        for param in self.parameters(config):
            axes = {part for parts in param.dims for part in parts}
            if param.buffer or (not embeddings and axes & EMBEDDED):
                continue
            size = 1
            for length in param.shape(sizes):
                size *= length
            total += size
        return total


def _numbered(param: Param) -> str | None:
    """The axis of which each element has such a parameter; None where there is one in a layer."""
    return next((axis for mark, axis in NUMBERED.items() if mark in param.name), None)


def _located(param: Param, layer: int, number: int | None, pattern: str, axis: str | None) -> Located:
    """A parameter of a layer, and of its expert or head with this number."""
    expert, head = (number, None) if axis == "experts" else (None, number)
    name = _numbered_name(pattern, layer, number)
    return Located(name, param.dims, layer, expert, pattern, param.buffer, head, axis)


def _numbered_name(pattern: str, layer: int | None, number: int | None) -> str:
    return pattern.format(layer=layer, expert=number, head=number, kv_head=number)


def _is_there(param: Param, config: Config, layer: int) -> bool:
    return param.when is None or param.when(config, layer)
