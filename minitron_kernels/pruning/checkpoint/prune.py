"""prune_checkpoint(): a folder of safetensors in, a smaller one out, without a model in memory.

The new checkpoint holds, tensor by tensor, the same bits as `prune_model(model, plan).save_pretrained()`:
both get them from `cuts.Cuts`. The parts: `safetensors_files` reads and checks files, `matching` finds the
parameter of each tensor, `shards` streams, `staging` makes the folder appear complete or not at all,
`side_files` chooses the other files to copy, `model_card` writes the README.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels._command.progress import tqdm_for
from minitron_kernels._files import reason
from minitron_kernels.pruning.checkpoint.matching import check_result, match, with_tied
from minitron_kernels.pruning.checkpoint.model_card import PLAN_FILE, model_card, source_name
from minitron_kernels.pruning.checkpoint.safetensors_files import (
    INDEX_FILE,
    SourceFolder,
    open_folder,
    read_json,
)
from minitron_kernels.pruning.checkpoint.shards import Shard, is_whole, plan_shards, write_shards
from minitron_kernels.pruning.checkpoint.side_files import check_plain, side_files
from minitron_kernels.pruning.checkpoint.staging import Staging, check_paths
from minitron_kernels.pruning.families.configs import check_names, config_value, other_names
from minitron_kernels.pruning.families.family import MTP_KEYS
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.checks import other_layers
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

_OURS = ("config.json", "README.md", PLAN_FILE, INDEX_FILE)
_SPARE_BYTES = 16 << 20  # disk space beyond that of the files, for folders, the config and others' writes


@dataclass(frozen=True)
class PrunedCheckpoint:
    """The result of `prune_checkpoint`.

    Args:
        path: the folder.
        files: names of its safetensors files.
        parameters_before, parameters_after: numbers of parameters, counted in the tensors.
        nbytes: bytes of the new tensors.
        resumed_files: those of `files` that an earlier call had finished.
        left_out_files: files beside the source's weights that were not copied.
        left_out_tensors: tensors of the source that were left out: those in leave_out, and MTP layers.
        head: whether the head is tied, and why, where the files hold another than config.json said, or a copy
            of the embedding; else empty.
    """

    path: Path
    files: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    nbytes: int
    resumed_files: tuple[str, ...]
    left_out_files: tuple[str, ...] = ()
    left_out_tensors: tuple[str, ...] = ()
    head: str = ""


def prune_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    max_shard_bytes: int = 5_000_000_000,
    threads: int | None = None,
    rescale_norms: bool = True,
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool | None = None,
) -> PrunedCheckpoint:
    """Cuts the checkpoint in `src` by `plan` and writes the smaller one to `dst`.

    Tensors are streamed block by block: memory does not grow with the model. Headers, index, names, shapes
    and config of `src` are checked before anything is written. `dst` appears at the end by one rename, when
    all of it is on the disk. If the process is killed, there is either no `dst` or a complete one (with
    `overwrite` the old or the new one, on file systems that can exchange two names). Finished files stay in a
    hidden folder beside it, and the same call continues from there. `src` is only read.

    Names in `src` may have prefixes of wrappers (module., _orig_mod., language_model. ...), which are
    removed, or lack "model.", as a base model's do. Whether the head is tied to the embedding is decided by
    the files, and config.json is corrected. The result is compared with the model that transformers makes of
    its config.

    Beside the weights, `dst` gets config.json (the plan's target), the tokenizer, templates, generation
    settings, code and licence of `src`, minitron_plan.json, and README.md: the source's model card with a
    note on the pruning. Other files of `src` are left out, since they may describe the old weights; the
    return value lists them.

    Args:
        src: folder with config.json and safetensors, in one file or sharded with an index.
        dst: folder to create.
        plan: from make_plan(), for a model of src's sizes.
        max_shard_bytes: bytes of tensors in one file of `dst`; a tensor is never split.
        threads: how many read, cut and write; default: one for each core, at most 8.
        rescale_norms: multiply norms' gains by the plan's factors; see make_plan().
        leave_out: names of tensors of `src` that are not part of the model, or patterns ("*.k_scale"). Layers
            for multi-token prediction (MTP) and RoPE's inv_freq are left out without being named.
        overwrite: whether a checkpoint at `dst` is replaced.
        progress: whether tqdm shows a bar, in bytes; None: where standard error is a terminal.

    Raises:
        ValueError: `src` is damaged or quantised, has an adapter or unknown tensors, or is not the model that
            the plan was made for; names the file.
        FileNotFoundError, FileExistsError: `src` does not exist; `dst` does.
        OSError: `dst` cannot be written, or the disk is too full; names the file.
    """
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan must be a PruningPlan, got {type(plan).__name__}")
    source_path, target = check_paths(Path(src), Path(dst), overwrite)
    threads = _check_numbers(max_shard_bytes, threads)
    config = _check_config(source_path, plan)
    with open_folder(source_path) as source:
        matched = match(source, config, plan, rescale_norms=rescale_norms, leave_out=leave_out)
        plan, shards = matched.plan, plan_shards(matched.pairs, max_shard_bytes)
        new_config = target_config(config, plan)
        check_result(matched, new_config, source_path)
        others = side_files(source_path, {*_OURS, *(file.path.name for file in source.files)})
        job = _job(source, others.copied, plan, rescale_norms, max_shard_bytes)
        with Staging.open(target, job, overwrite=overwrite) as staging:
            resumed = _resume(shards, staging)
            todo = [shard for shard in shards if shard.name not in resumed]
            _check_space(staging.path, todo, [source_path / name for name in others.copied])
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
            contents = {name: _read(source_path / name) for name in others.copied}
            contents |= _made(source_path, plan, config, new_config, shards)
            staging.write(contents)
            _check_written(staging.folder, matched.shapes, new_config)
            staging.publish(overwrite)
    return PrunedCheckpoint(
        path=target,
        files=tuple(shard.name for shard in shards),
        parameters_before=matched.parameters,
        parameters_after=sum(math.prod(shape) for shape in matched.shapes.values()),
        nbytes=total,
        resumed_files=resumed,
        left_out_files=others.left_out,
        left_out_tensors=matched.left_out,
        head=matched.head,
    )


def _check_numbers(max_shard_bytes: int, threads: int | None) -> int:
    for name, value in (("max_shard_bytes", max_shard_bytes), ("threads", threads)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or min(8, cores)


def _check_config(folder: Path, plan: PruningPlan) -> dict[str, Any]:
    """The source's config; checks that it is the one that the plan was made for.

    Whether its head is tied is decided by the files, not here.
    """
    path = folder / "config.json"
    config = read_json(path)
    check_plain(folder, config)
    planned = plan.source_config
    try:
        check_names(config)
        family = family_of(config)
        same = family_of(planned)
        found, wanted = family.sizes(config), same.sizes(planned)
        layers = other_layers(family, config, planned) if family is same and found == wanted else None
    except (ValueError, TypeError, ArithmeticError) as error:  # sizes that are not numbers, or are 0
        raise ValueError(f"{path}: {error}") from None
    kinds = [
        (each["model_type"], config_value(family.text(each), "model_type")) for each in (config, planned)
    ]
    if kinds[0] != kinds[1]:
        here, there = (kind if kind == inside else f"{kind} with {inside}" for kind, inside in kinds)
        raise ValueError(f"{path}: model_type is {here}, the plan is for {there}")
    pairs = {axis: (found.get(axis), wanted.get(axis)) for axis in wanted | found}
    differ = [f"{name} is {here} (plan: {there})" for name, (here, there) in pairs.items() if here != there]
    if not differ and layers is not None:
        differ = [layers]
    if differ:
        raise ValueError(f"{path}: this is not the model that the plan was made for: {', '.join(differ)}")
    return config


def _job(
    source: SourceFolder,
    others: Sequence[str],
    plan: PruningPlan,
    rescale_norms: bool,
    max_shard_bytes: int,
) -> str:
    """An identifier of this work. It changes with the plan, the source files and the size of shards."""
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
    """The files that an earlier call of the same job finished, and that have not changed since."""
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
    tqdm = tqdm_for(progress)
    if tqdm is None:
        yield lambda count: None
        return
    with tqdm(desc=name, total=total, initial=done, unit="B", unit_scale=True) as bar:
        yield bar.update


def target_config(source: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """The source's config.json with the plan's changes, and with every size written out."""
    family = family_of(source)
    sizes = {key for axis in family.sizes(source) for key in family.keys_of(axis)}
    config, text = dict(source), family.text_key
    before, after = plan.source_config, plan.target_config
    if text is None:
        _change(config, before, after, sizes)
    else:
        inside = {key: value for key, value in after.items() if key != text}
        _change(config, before, inside, set())
        # old configs have the text model's entries beside the others
        there = config if source.get(text) is None else dict(source[text])
        _change(there, before[text], after[text], sizes)
        if there is not config:
            config[text] = there
    if family.tied(config) != family.tied(after):
        config = with_tied(config, family.tied(after), family)
    for part in (config, config.get(text) if text is not None else None):
        if isinstance(part, dict):
            part.update(
                {key: value(family.text(after)) for key, value in family.restated.items() if key in part}
            )
            part.update({key: 0 for key in MTP_KEYS if part.get(key)})
    return config


def _change(
    config: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], sizes: Set[str]
) -> None:
    """Writes the entries that differ to a config, and those of `sizes` that it lacks."""
    for key, value in after.items():
        old, here = before.get(key), config.get(key)
        changed = key not in before or old != value
        if changed and isinstance(here, dict) and isinstance(old, dict) and "model_type" in old:
            config[key] = inside = dict(here)
            _change(inside, old, value, set())
        # where head_dim is absent or null it follows from other sizes, which have changed
        elif changed or (key in sizes and here is None):
            config[key] = value
    for other, own in other_names(after).items():  # both are read, and one of them would say the old value
        if other in config and own in after and (own not in before or before[own] != after[own]):
            config[other] = after[own]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"could not be read ({reason(error)})", str(path)) from None


def _made(
    src: Path,
    plan: PruningPlan,
    config: Mapping[str, Any],
    new_config: Mapping[str, Any],
    shards: Sequence[Shard],
) -> dict[str, bytes]:
    """{name: content} of the files that are written anew beside the tensors."""
    made = {"config.json": _json(new_config, sort_keys=True), PLAN_FILE: _json(plan.to_dict())}
    if len(shards) > 1:
        names = {output.cut.name: shard.name for shard in shards for output in shard.outputs}
        metadata = {
            "total_parameters": sum(math.prod(o.cut.shape) for shard in shards for o in shard.outputs),
            "total_size": sum(shard.nbytes for shard in shards),
        }
        made[INDEX_FILE] = _json({"metadata": metadata, "weight_map": names}, sort_keys=True)
    card = src / "README.md"
    # surrogateescape keeps bytes that are not UTF-8
    text = _read(card).decode(errors="surrogateescape") if card.is_file() else ""
    note = model_card(source_name(src), text, config, plan.target_config)
    return made | {"README.md": note.encode(errors="surrogateescape")}


def _json(value: Mapping[str, Any], **options: Any) -> bytes:
    return (json.dumps(value, indent=2, **options) + "\n").encode()


def _check_written(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Reads the result back, as a loader will, and compares it, before it is published."""
    try:
        with open_folder(folder) as written:
            found = {name: tensor.shape for name, tensor in written.tensors.items()}
        again = read_json(folder / "config.json")
    except ValueError as error:
        raise OSError(errno.EIO, f"cannot be read again ({error})", str(folder)) from None
    if found != shapes or again != config:
        message = "what was written is not what is read there: check the disk"
        raise OSError(errno.EIO, message, str(folder))
