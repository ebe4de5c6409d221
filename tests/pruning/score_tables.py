"""Random score tables of the shapes that a config asks for, and small plans made of them."""

import torch

from minitron_kernels.pruning.families.registry import family_of


def random_tables(config, seed=0):
    """All tables a plan can be made from, as ImportanceScores.tables() gives them."""
    generator = torch.Generator().manual_seed(seed)
    family = family_of(config)
    sizes = family.sizes(config)
    layers = range(sizes["layers"])
    sparse = [layer for layer in layers if family.is_sparse(config, layer)]

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    norms = [f"{family.layers}.{layer}.{norm}" for layer in layers for norm in family.taps.norms]
    tables = {
        "hidden": draw(sizes["hidden"]),
        "heads": {layer: draw(sizes["heads"]) for layer in layers},
        "mlp": {layer: draw(sizes["mlp"]) for layer in layers if layer not in sparse},
        "experts": {layer: draw(sizes["experts"]) for layer in sparse},
        "expert_mlp": {layer: draw(sizes["experts"], sizes["expert_mlp"]) for layer in sparse},
        "layers": draw(sizes["layers"]),
        "energy": {norm: draw(sizes["hidden"]) for norm in [*norms, family.final_norm]},
    }
    return {name: table for name, table in tables.items() if len(table)}


def smaller_sizes(name):
    """A target on every axis for the tiny model of a family."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    if name == "mixtral":
        sizes |= dict(num_local_experts=3)
    if name == "qwen3_moe":
        sizes |= dict(moe_intermediate_size=16, num_experts=3)
    return sizes
