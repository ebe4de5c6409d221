"""Tiny checkpoints on disk and plans for them."""

import json
from pathlib import Path

import torch
from _tiny_models import tiny_model

from minitron_kernels.pruning.families import family_of
from minitron_kernels.pruning.plan import make_plan

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
MLP = {"intermediate_size": 48}
MOE = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 3},
    "qwen3_moe": {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 3},
}


def random_tables(config, seed=0):
    """Scores of every axis of a model with this config."""
    generator = torch.Generator().manual_seed(seed)
    family = family_of(config)
    sizes = family.sizes(config)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    layers = range(sizes["layers"])
    sparse = [layer for layer in layers if family.is_sparse(config, layer)]
    dense = [layer for layer in layers if layer not in sparse]
    norms = [f"{family.layers}.{layer}.{norm}" for layer in layers for norm in family.taps.norms]
    return {
        "hidden": draw(sizes["hidden"]),
        "mlp": {layer: draw(sizes["mlp"]) for layer in dense},
        "heads": {layer: draw(sizes["heads"]) for layer in layers},
        "experts": {layer: draw(sizes["experts"]) for layer in sparse},
        "expert_mlp": {layer: draw(sizes["experts"], sizes["expert_mlp"]) for layer in sparse},
        "layers": draw(sizes["layers"]),
        "energy": {norm: draw(sizes["hidden"]) + 0.1 for norm in [*norms, family.final_norm]},
    }


def plan_for(config, seed=0, **changes):
    """A plan that cuts every axis of a tiny model."""
    name = config.model_type
    sizes = {**SIZES, **MOE.get(name, MLP), "divisor": 8, **changes}
    return make_plan(random_tables(config, seed), config, **sizes)


def save_tiny(folder, name="llama", *, shard_bytes=None, **options):
    """Saves a tiny model with all that lies beside one; returns it."""
    model = tiny_model(name, **options)
    model.save_pretrained(folder, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    folder = Path(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The original\n\nWords.\n")
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    for weights in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (folder / weights).write_bytes(b"weights")
    return model


def snapshot(folder):
    """Every file below a folder: its bytes and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def edit_config(folder, **changes):
    """Changes entries of config.json; None takes one out."""
    path = Path(folder) / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
