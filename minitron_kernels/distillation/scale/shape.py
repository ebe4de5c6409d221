"""A model's parameters as ranks hold them: what tensor parallelism leaves of each, and FSDP2 of that.

Tensor parallelism is Megatron-LM's (arXiv 1909.08053): rows of q_proj, k_proj, v_proj, gate_proj, up_proj, of
the embedding and of the head; columns of o_proj and down_proj; norms, and biases of what is cut by columns,
are on every rank. FSDP2 cuts the rows of what is left, in equal parts that are padded for the last ranks. It
gathers a group of parameters at once: each decoder layer is one, and all that is around them another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.families.configs import Config, completed
from minitron_kernels.pruning.families.registry import family_of

_CUT = frozenset(("heads", "kv_heads", "mlp", "vocab"))  # axes along which a parameter is cut
Group = tuple[tuple[int, int], ...]  # (rows, elements of a row) of each parameter of a rank


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes, and one rank's parameters before FSDP2 cuts them."""

    model_type: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    gated: bool
    norms: int  # over the residual channels, of a layer
    norms_before_linears: int  # those of them whose output goes into linear layers
    head_norms: bool  # norms of queries and keys
    norm_sums: int  # numbers a token that a norm keeps for its backward
    tied: bool
    tp: int
    parameters: int  # of the whole model, a tied head once
    root: Group
    layer_groups: tuple[Group, ...]

    @property
    def rows_of_vocab(self) -> int:
        """Rows of the embedding and of the head of the rank that has most."""
        return -(-self.vocab // self.tp)

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of them, that around the layers first."""
        return (self.root, *self.layer_groups)

    @property
    def largest_layer(self) -> Group:
        """The group of the layer that has most parameters."""
        return max(self.layer_groups, key=elements)


def elements(group: Group) -> int:
    """Elements of a group's parameters, before FSDP2 cuts them."""
    return sum(rows * row for rows, row in group)


def shard_elements(group: Group, fsdp: int) -> int:
    """Elements of a rank's shards of a group, padding included."""
    return sum(-(-rows // fsdp) * row for rows, row in group)


def shape_of(name: str, config: Config | Mapping[str, Any], tp: int) -> ModelShape:
    """The shape of the model with this config, of which `tp` ranks have a part each.

    Args:
        name: of the argument, for error messages.
        config: the dict of a config.json, or a config of transformers.
        tp: ranks that share each layer.

    Raises:
        ValueError: an unknown family; one with experts; a size that `tp` does not divide: names it.
    """
    config = completed(config)
    family = family_of(config)
    sizes = family.sizes(config)
    if family.taps.experts is not None:
        raise ValueError(
            f"{name} must be a dense decoder, got {config['model_type']}, whose layers have experts: what "
            "ranks exchange for them is not planned"
        )
    for axis in ("heads", "kv_heads", "mlp"):
        if axis not in sizes:
            raise ValueError(f"{name} has no {family.keys_of(axis)[0]}, which a plan needs")
        if sizes[axis] % tp:
            raise ValueError(
                f"tp must divide {family.keys_of(axis)[0]} = {sizes[axis]} of {name}, got {tp}: take "
                "another, or a model whose sizes it divides"
            )
    groups: dict[int | None, list[tuple[int, int]]] = {}
    for parameter in family.parameters(config):
        if parameter.buffer:
            continue
        lengths = list(parameter.shape(sizes))
        for i, parts in enumerate(parameter.dims):
            if not _CUT.isdisjoint(parts):
                lengths[i] = -(-lengths[i] // tp)
                break
        rows, *row = lengths or [1]
        groups.setdefault(parameter.layer, []).append((rows, math.prod(row)))
    names = {parameter.name for parameter in family.layer}
    taps = family.taps
    return ModelShape(
        model_type=config["model_type"],
        vocab=sizes["vocab"],
        hidden=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        mlp=sizes["mlp"],
        gated=any("gate" in parameter for parameter in names),
        norms=len(taps.norms),
        norms_before_linears=len(taps.scored_norms),
        head_norms="self_attn.q_norm.weight" in names,
        norm_sums=2 if f"{taps.norms[0]}.bias" in names else 1,  # a mean too where there is a bias
        tied=family.tied(config),
        tp=tp,
        parameters=family.count_parameters(config),
        root=tuple(groups.pop(None)),
        layer_groups=tuple(tuple(groups[layer]) for layer in range(sizes["layers"])),
    )
