"""Describes the checkpoint, plan or scores at a path, for `minitron-prune info`. It does not load torch."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_kernels.pruning.checkpoint.model_card import PLAN_FILE
from minitron_kernels.pruning.checkpoint.safetensors_files import SafetensorsFile, open_folder, read_json
from minitron_kernels.pruning.families.registry import family_in, family_of
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
from minitron_kernels.pruning.plan.sizes import size_names
from minitron_kernels.pruning.score import score_files
from minitron_kernels.pruning.score.score_files import ABOUT


def describe(path: Path) -> str:
    """A few lines about the checkpoint, plan or scores at `path`.

    Raises:
        FileNotFoundError, ValueError: there is nothing, something else, or a damaged file.
    """
    if path.is_file():
        with path.open("rb") as stream:
            if not stream.read(64).lstrip().startswith(b"{"):
                raise ValueError(f"{path}: is not a plan (JSON); for a checkpoint or scores give the folder")
        return f"{path}: {PruningPlan.load(path).summary()}"
    if (path / ABOUT).is_file():
        return _about_scores(path)
    if (path / "config.json").is_file():
        return _about_checkpoint(path)
    if path.exists():
        raise ValueError(f"{path}: has neither config.json nor {ABOUT}: it is not a checkpoint, nor scores")
    raise FileNotFoundError(2, "No such file or folder", str(path))


def _about_scores(path: Path) -> str:
    about, tensors = score_files.read_about(path)
    config = score_files.config_in(path, about)
    with contextlib.closing(SafetensorsFile(tensors)) as file:
        try:
            return _described(path, about, config, file)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise score_files.not_scores(path / ABOUT, error) from None


def _described(path: Path, about: Mapping[str, Any], config: dict[str, Any], file: SafetensorsFile) -> str:
    axes, options = about["axes"], about["options"]
    family = family_of(config)
    sizes = family.sizes(config)
    names, text = size_names(family, config), family.text(config)
    lines = [f"{path}: scores of a {config['model_type']} model, {_tokens(axes, file):,} tokens"]
    lines += [f"  {name:<22}{sizes[axis]:>16,}" for name, axis in names.items() if name in text]
    lines.append(f"  scored: {', '.join(axes)}")
    lines.append(
        f"  over tokens: {', '.join(options['seq'])}; MLP at {options['mlp_tap']}; heads by "
        f"{options['head_score']}; experts by {options['expert_score']}"
    )
    return "\n".join(lines)


def _tokens(axes: Mapping[str, Mapping[str, Any]], file: SafetensorsFile) -> int:
    """ImportanceScores.tokens, for which eight bytes are read."""
    for name, axis in axes.items():
        if axis["experts"] is None:
            counts = file.tensors[f"{name}.{'counts' if axis['kind'] == 'TokenMeanState' else 'tokens'}"]
            if counts.dtype_name != "I64":
                raise ValueError(f"{counts.name} must be I64, got {counts.dtype_name}")
            first = bytearray(min(counts.nbytes, 8))
            file.read_into(memoryview(first), counts.begin)
            return int.from_bytes(first, "little", signed=True)
    return 0


def _about_checkpoint(path: Path) -> str:
    config = read_json(path / "config.json")
    family = family_in(path / "config.json", config)
    sizes, names = family.sizes(config), size_names(family, config)
    counted = family.count_parameters(config)
    inside = family.count_parameters(config, embeddings=False)
    with open_folder(path) as folder:
        stored = sum(math.prod(tensor.shape) for tensor in folder.tensors.values())
        dtypes: Counter[str] = Counter()
        for tensor in folder.tensors.values():
            dtypes[tensor.dtype_name] += tensor.nbytes
        files = [(file.path.name, file.size, len(file.tensors)) for file in folder.files]
    lines = [f"{path}: checkpoint of a {config['model_type']} model"]
    lines += [f"  {name:<22}{sizes[axis]:>16,}" for name, axis in names.items() if sizes.get(axis)]
    lines += [
        f"  {name:<22}{sizes[axis]:>16,}" for name, axis in (("head_dim",) * 2, ("vocab_size", "vocab"))
    ]
    lines.append(f"  {'parameters':<22}{counted:>16,}")
    lines.append(f"  {'without embeddings':<22}{inside:>16,}")
    if stored != counted:
        lines.append(f"  {'in the files':<22}{stored:>16,}")
    lines.append("  " + ", ".join(f"{name} {nbytes / 1e9:.3f} GB" for name, nbytes in dtypes.most_common()))
    lines += [f"  {name}: {size / 1e9:.3f} GB, {count} tensors" for name, size, count in files]
    if (path / PLAN_FILE).is_file():
        plan = PruningPlan.load(path / PLAN_FILE)
        lines.append(f"  pruned from {plan.parameters_before:,} parameters: see {PLAN_FILE}")
    return "\n".join(lines)
