"""Tiny checkpoints on disk and plans for them."""

import json
from pathlib import Path

from minitron_kernels.pruning.plan.make_plan import make_plan
from pruning.score_tables import random_tables, smaller_sizes
from pruning.tiny_models import tiny_model

OTHER_WEIGHTS = ("consolidated.safetensors", "model.gguf", "pytorch_model.bin")


def plan_for(config, seed=0, **changes):
    """A plan that cuts every axis of a tiny model."""
    sizes = {**smaller_sizes(config.model_type), "num_key_value_heads": 1, "divisor": 8, **changes}
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
    for weights in OTHER_WEIGHTS:
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
