"""Pruning of a checkpoint on disk: a folder of safetensors in, a smaller one out, without a model in memory.

The new checkpoint holds, tensor by tensor, the bits of `prune_model(model, plan).save_pretrained()`: both get
them from `cuts.Cuts`. The parts: `safetensors_files` reads and checks, `shards` streams, `staging` makes the
folder appear whole or not at all, `model_card` writes the note.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels.pruning.cuts import Cut, Cuts
from minitron_kernels.pruning.families import family_of
from minitron_kernels.pruning.model_card import PLAN_FILE, model_card, source_name
from minitron_kernels.pruning.pruning_plan import PruningPlan
from minitron_kernels.pruning.safetensors_files import (
    INDEX_FILE,
    SourceFolder,
    StoredTensor,
    open_folder,
    read_json,
)
from minitron_kernels.pruning.shards import Shard, is_whole, plan_shards, write_shards
from minitron_kernels.pruning.staging import Staging, check_target, write_error

# never copied: weights in any format, and what belongs to training; and what is written anew
_WEIGHTS = tuple(
    f".{kind}"
    for kind in (
        *("safetensors", "index.json", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "ot"),
        *("tflite", "npz", "gguf", "ggml", "onnx", "onnx_data"),
    )
)
_OURS = ("config.json", "README.md", PLAN_FILE)
_SPARE_BYTES = 16 << 20  # beyond the files themselves, for folders and what else is being written
# buffers that old checkpoints hold and transformers makes itself
_NOT_PARAMETERS = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What `prune_checkpoint` made.

    Args:
        path: the folder.
        files: names of its safetensors files.
        parameters_before, parameters_after: counted in the tensors of both.
        nbytes: of the new tensors.
        resumed_files: those of `files` that an earlier call had finished.
    """

    path: Path
    files: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    nbytes: int
    resumed_files: tuple[str, ...]


def prune_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    max_shard_bytes: int = 5_000_000_000,
    threads: int | None = None,
    rescale_norms: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> PrunedCheckpoint:
    """Cuts the checkpoint in `src` by `plan` and writes the smaller one to `dst`.

    Tensors are streamed block by block: memory does not grow with the model. Headers, index, names, shapes
    and config of `src` are checked before anything is written. `dst` appears at the end by one rename, when
    all of it is on the disk: killed at any moment there is either no `dst` or a complete one (with
    `overwrite` the old or the new one, on file systems that can exchange two names). Finished files stay in a
    hidden folder beside it, and the same call goes on from there. `src` is only read.

    Beside the weights: config.json (the plan's target), tokenizer and other small files of `src`,
    minitron_plan.json, and README.md, the source's card with a note of what was done.

    Args:
        src: folder with config.json and safetensors, in one file or sharded with an index.
        dst: folder to be made.
        plan: from make_plan, for a model of src's sizes.
        max_shard_bytes: of tensors in one file of `dst`; a tensor is never split.
        threads: that read, cut and write; default: one for each core, at most 8.
        rescale_norms: multiply norms' gains by the plan's factors; see make_plan().
        overwrite: whether a checkpoint in `dst` is replaced.
        progress: whether tqdm shows a bar, in bytes; None: where standard error is a terminal.

    Raises:
        ValueError: `src` is damaged, quantised, or not what the plan was made for; names the file.
        FileNotFoundError, FileExistsError: there is no `src`; there is a `dst`.
        OSError: `dst` cannot be written, or the disk is or becomes too full; names the file.
    """
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan must be a PruningPlan, got {type(plan).__name__}")
    source_path, target = _check_paths(Path(src), Path(dst), overwrite)
    threads = _check_numbers(max_shard_bytes, threads)
    config = _check_config(source_path / "config.json", plan)
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    with open_folder(source_path) as source:
        pairs = _match(source, cuts)
        shards = plan_shards(pairs, max_shard_bytes)
        others = list(_other_files(source_path))
        with Staging.open(target, _job(source, others, plan, rescale_norms, max_shard_bytes)) as staging:
            resumed = _resume(shards, staging)
            todo = [shard for shard in shards if shard.name not in resumed]
            _check_space(staging.path, todo, [source_path / name for name in others])
            total = sum(shard.nbytes for shard in shards)
            with _bar(progress, target.name, total, total - sum(shard.nbytes for shard in todo)) as on_bytes:
                write_shards(
                    todo,
                    staging.folder,
                    threads=threads,
                    on_bytes=on_bytes,
                    on_shard=lambda shard, digest: staging.finish(shard.name, digest=digest),
                )
            source.check_unchanged()
            try:
                _write_others(source_path, others, staging.folder, plan, config, shards)
                staging.publish(overwrite)
            except FileExistsError:
                raise
            except OSError as error:
                raise write_error(error, Path(error.filename or staging.folder)) from None
    after = sum(math.prod(cut.shape) for cut, _ in pairs)
    before = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    return PrunedCheckpoint(target, tuple(shard.name for shard in shards), before, after, total, resumed)


def _check_paths(src: Path, dst: Path, overwrite: bool) -> tuple[Path, Path]:
    if not src.is_dir():
        raise FileNotFoundError(errno.ENOENT, "src must be the folder of a checkpoint", str(src))
    target = Path(os.path.abspath(dst))
    inside, around = target.resolve(), src.resolve()
    if inside == around or inside in around.parents or around in inside.parents:
        raise ValueError(f"dst must be neither src, nor inside it, nor around it; got {dst} for src {src}")
    check_target(target, overwrite)
    return src, target


def _check_numbers(max_shard_bytes: int, threads: int | None) -> int:
    for name, value in (("max_shard_bytes", max_shard_bytes), ("threads", threads)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or min(8, cores)


def _check_config(path: Path, plan: PruningPlan) -> dict[str, Any]:
    """The source's config, once it is one that the plan was made for."""
    config = read_json(path)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path}: the checkpoint is quantised (quantization_config), and its scales would no longer fit; "
            "prune the checkpoint it was made from"
        )
    planned = plan.source_config
    try:
        family = family_of(config)
        found, wanted = family.sizes(config), family_of(planned).sizes(planned)
    except (ValueError, TypeError, ArithmeticError) as error:  # sizes that are no numbers, no heads
        raise ValueError(f"{path}: {error}") from None
    if config["model_type"] != planned["model_type"]:
        raise ValueError(
            f"{path}: model_type is {config['model_type']}, the plan is for {planned['model_type']}"
        )
    pairs = {axis: (found.get(axis), wanted.get(axis)) for axis in wanted | found}
    pairs["tie_word_embeddings"] = (family.tied(config), family.tied(planned))
    differ = [f"{name} is {here} (plan: {there})" for name, (here, there) in pairs.items() if here != there]
    if differ:
        raise ValueError(f"{path}: this is not the model that the plan was made for: {', '.join(differ)}")
    return config


def _match(source: SourceFolder, cuts: Cuts) -> list[tuple[Cut, StoredTensor]]:
    """Every tensor that stays with its cut, in the order of the model; ValueError unless all fit."""
    names = [name for name in source.tensors if not name.endswith(_NOT_PARAMETERS)]
    # experts may be stored one by one, as transformers does, or stacked as they are in the model
    stored = not set(cuts.names(stored=False)) <= set(names)
    wanted = cuts.names(stored=stored)
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{source.path}: lacks {missing[0]}{more}, which the model has; get it again")
    place = {name: number for number, name in enumerate(wanted)}
    made: dict[str, str] = {}
    pairs = []
    for name in sorted(names, key=lambda name: place.get(name, len(place))):
        tensor = source.tensors[name]
        try:
            cut = cuts.of(name, stored=stored)
        except ValueError as error:
            raise ValueError(f"{tensor.file.path}: {error}") from None
        if cut is None:
            continue
        if tuple(cut.source_shape) != tensor.shape:
            raise ValueError(
                f"{tensor.file.path}: {name} has shape {list(tensor.shape)}, and the plan is for shape "
                f"{list(cut.source_shape)}"
            )
        if cut.name in made:
            raise ValueError(f"{tensor.file.path}: {name} and {made[cut.name]} would both become {cut.name}")
        made[cut.name] = name
        pairs.append((cut, tensor))
    return pairs


def _other_files(src: Path) -> Iterator[str]:
    """Paths inside `src` of what is copied as it is: tokenizer, generation config, licence, templates."""
    for folder, folders, files in os.walk(src):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            ours = Path(folder) == src and name in _OURS
            if not (ours or name.endswith(_WEIGHTS) or name.startswith(".")) and path.is_file():
                yield str(path.relative_to(src))


def _job(
    source: SourceFolder, others: list[str], plan: PruningPlan, rescale_norms: bool, max_shard_bytes: int
) -> str:
    """Tells this work from any other: a change of the plan, a source file or the shards makes another one."""
    copied = [(name, (source.path / name).stat()) for name in others]
    facts = {
        "format": 1,
        "plan": plan.to_dict(),
        "rescale_norms": rescale_norms,
        "weights": [file.fingerprint() for file in source.files],
        "others": [(name, status.st_size, status.st_mtime_ns) for name, status in copied],
        "max_shard_bytes": max_shard_bytes,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _resume(shards: list[Shard], staging: Staging) -> tuple[str, ...]:
    """The files that an earlier call of the same job finished and that are still as it left them."""
    whole = []
    for shard in shards:
        entry = staging.finished.get(shard.name)
        if entry is None:
            continue
        if is_whole(shard, staging.folder, entry["digest"]):
            whole.append(shard.name)
        else:
            staging.forget(shard.name)
    return tuple(whole)


def _check_space(folder: Path, shards: list[Shard], others: list[Path]) -> None:
    needed = sum(shard.size for shard in shards) + sum(path.stat().st_size for path in others) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"needs {needed / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free: free some, or choose a "
            "dst on another disk",
            str(folder),
        )


@contextlib.contextmanager
def _bar(progress: bool | None, name: str, total: int, done: int) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        yield lambda count: None
        return
    disable = None if progress is None else not progress
    with tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True, disable=disable) as bar:
        yield bar.update


def _target_config(source: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """The source's own config.json, with what the plan changes in it, and with every size written out."""
    family = family_of(source)
    sizes = {key for axis in family.sizes(source) for key in family.keys_of(axis)}
    config = dict(source)
    for key, value in plan.target_config.items():
        changed = key not in plan.source_config or plan.source_config[key] != value
        # head_dim follows from other sizes where it is left out, and these have changed
        if changed or (key in sizes and key not in source):
            config[key] = value
    return config


def _write_others(
    src: Path,
    others: list[str],
    folder: Path,
    plan: PruningPlan,
    config: dict[str, Any],
    shards: list[Shard],
) -> None:
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(src / name, folder / name)
    if len(shards) > 1:
        names = {output.cut.name: shard.name for shard in shards for output in shard.outputs}
        metadata = {
            "total_parameters": sum(math.prod(o.cut.shape) for shard in shards for o in shard.outputs),
            "total_size": sum(shard.nbytes for shard in shards),
        }
        _write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": names})
    _write_json(folder / "config.json", _target_config(config, plan))
    plan.save(folder / PLAN_FILE)
    card = src / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    note = model_card(source_name(src), text, config, plan.target_config)
    (folder / "README.md").write_text(note)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
