"""What activations are compared with: scores at random, and by the magnitude of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels.pruning.families.axes import ONE, elements, elements_inside, groups_of, split_part
from minitron_kernels.pruning.families.registry import family_of

ENERGY = "energy"  # by which norms are rescaled: always measured, whatever ranks the channels
_BY_LAYER = ("mlp", "heads")


def random_tables(tables: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Uniform random numbers in the shapes of scores; the energy of the norms' inputs is kept.

    Args:
        tables: of ImportanceScores.tables().
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(scores: Any) -> Any:
        if isinstance(scores, Mapping):
            return {key: draw(value) for key, value in scores.items()}
        return torch.rand(scores.shape, generator=generator, dtype=torch.float64, device="cpu")

    return {axis: scores if axis == ENERGY else draw(scores) for axis, scores in tables.items()}


def magnitude_tables(model: nn.Module, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of hidden channels, MLP neurons, query heads and layers by the weights that belong to them.

        score = √Σ w²

    over all parameters w of which the channel, neuron or head is an index, and of a layer over all of its
    parameters. Summed in float64.

    Args:
        model: of a known family.
        tables: of ImportanceScores.tables(), of which the energy is kept.

    Raises:
        ValueError: an unknown family, or one with other axes: experts, state spaces, convolutions.

    Source: magnitude pruning as the baseline of activations; for channels, Li et al. (arXiv 1608.08710).
    """
    config: Any = getattr(model, "config", None)
    family = family_of(config)
    sizes = family.sizes(config)
    if other := sorted({"experts", "conv", "mamba_heads"} & set(sizes)):
        raise ValueError(
            f'by = "magnitude" knows hidden channels, neurons, heads and layers, and {config.model_type} has '
            f'{", ".join(other)}: take by = "random" to compare with'
        )
    hidden = torch.zeros(sizes["hidden"], dtype=torch.float64, device="cpu")
    layers = torch.zeros(sizes["layers"], dtype=torch.float64, device="cpu")
    found: dict[str, dict[int, Tensor]] = {axis: {} for axis in _BY_LAYER}
    for parameter in family.parameters(config):
        if parameter.buffer:
            continue
        squares = model.get_parameter(parameter.name).detach().to("cpu", torch.float64).square()
        if parameter.layer is not None:
            layers[parameter.layer] += squares.sum()
        for dim, parts in enumerate(parameter.dims):
            others = [other for other in range(squares.dim()) if other != dim]
            along = squares.sum(others) if others else squares  # of no dimensions torch would sum all
            for axis, piece in _pieces(along, parts, sizes):
                if axis == "hidden":
                    hidden += piece
                elif axis in _BY_LAYER and parameter.layer is not None:
                    of_layer = found[axis].setdefault(parameter.layer, torch.zeros_like(piece))
                    of_layer += piece
    return {
        "hidden": hidden.sqrt(),
        "layers": layers.sqrt(),
        **{axis: {layer: x.sqrt() for layer, x in by.items()} for axis, by in found.items()},
        ENERGY: tables[ENERGY],
    }


def _pieces(along: Tensor, parts: tuple[str, ...], sizes: Mapping[str, int]) -> list[tuple[str, Tensor]]:
    """(axis, sums of its elements) of the parts of a dimension, whose sums are `along`."""
    found, begin = [], 0
    for part in parts:
        length = elements(part, sizes)
        piece = along[begin : begin + length]
        begin += length
        # of fused groups the output projection has the heads by themselves
        if part != ONE and groups_of(part) is None:
            piece = piece.view(-1, elements_inside(part, sizes)).sum(1)
            found.append((split_part(part)[0], piece))
    return found


def even_tables(config: Any) -> dict[str, Any]:
    """Rising scores in the shapes of all that a model of this config can be scored for, to try a target."""
    family = family_of(config)
    sizes = family.sizes(config)

    def rising(*shape: int) -> Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)

    lengths = {"mlp": sizes.get("mlp"), "heads": sizes["heads"], "experts": sizes.get("experts")}
    lengths |= {"conv": sizes.get("conv"), "delta": sizes.get("delta_heads")}
    if "mamba_heads" in sizes:
        lengths["mamba"] = sizes["mamba_heads"] * sizes["mamba_dim"]
    tables: dict[str, Any] = {"hidden": rising(sizes["hidden"]), "layers": rising(sizes["layers"])}
    for axis, length in lengths.items():
        if length:
            tables[axis] = dict.fromkeys(range(sizes["layers"]), rising(length))
    if sizes.get("experts") and sizes.get("expert_mlp"):
        table = rising(sizes["experts"], sizes["expert_mlp"])
        tables["expert_mlp"] = dict.fromkeys(range(sizes["layers"]), table)
    return tables
