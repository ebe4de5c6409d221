"""Which stored tensor is which parameter: prefixes of wrappers, heads tied or not, tensors that are more.

What a checkpoint's config says of its head, and what its names begin with, is taken from the files themselves:
they are what is loaded.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.cuts import Cut, Cuts
from minitron_kernels.pruning.families import Family, config_value
from minitron_kernels.pruning.pruning_plan import PruningPlan
from minitron_kernels.pruning.safetensors_files import AGAIN, SourceFolder, StoredTensor, shown

# of torch.compile, FSDP and activation checkpointing, anywhere in a name
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEADING = ("module.", "language_model.")  # of DDP; of models that hold others beside the language model
# buffers that old checkpoints hold and transformers makes itself
_NOT_PARAMETERS = ".rotary_emb.inv_freq"
# layers that guess tokens further ahead (multi-token prediction): transformers does not load them either
_MTP_NAMES = ("mtp.", "mtp_layers.")
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "mtp_num_layers")
_COMPARED_BYTES = 1 << 20


@dataclass(frozen=True)
class Matched:
    """What becomes of the tensors of a checkpoint.

    Args:
        plan: the plan, with the true tie_word_embeddings in both of its configs.
        pairs: each tensor that stays with its cut, in the order of the model.
        parameters: those of the source, a tied head once.
        left_out: names of tensors that are not the model's: those asked for, and MTP layers.
    """

    plan: PruningPlan
    pairs: list[tuple[Cut, StoredTensor]]
    parameters: int
    left_out: tuple[str, ...]


def plain_names(names: Iterable[str], family: Family) -> tuple[dict[str, str], str]:
    """Each stored name -> the name in the causal language model; and what base models' names lack ("model.").

    Raises:
        ValueError: two would be the same.
    """
    base = _base(family)
    plain = {name: _unwrapped(name, base) for name in names}
    headless = bool(base) and not any(name.startswith(base) for name in plain.values())
    headless = headless and f"{family.embedding.removeprefix(base)}.weight" in plain.values()
    if headless:
        plain = {name: base + inside for name, inside in plain.items()}
    seen: dict[str, str] = {}
    for name, inside in plain.items():
        if inside in seen:
            raise ValueError(f"{shown(seen[inside])} and {shown(name)} would both be {shown(inside)}")
        seen[inside] = name
    return plain, base if headless else ""


def _base(family: Family) -> str:
    """What the names of the model around the layers begin with, as "model."; "" for nothing."""
    return family.embedding.removesuffix(family.embedding.rpartition(".")[2])


def _unwrapped(name: str, base: str) -> str:
    name = _WRAPPED.sub("", name)
    for prefix in _LEADING:
        while name.startswith(prefix):
            name = name.removeprefix(prefix)
    inside = f"{base}language_model."
    return base + name.removeprefix(inside) if base and name.startswith(inside) else name


def match(
    source: SourceFolder,
    config: Mapping[str, Any],
    plan: PruningPlan,
    *,
    rescale_norms: bool,
    leave_out: Sequence[str],
) -> Matched:
    """Every tensor that stays with its cut.

    Args:
        source: the checkpoint's weights.
        config: its config.json.
        plan: what stays.
        rescale_norms: see Cuts.
        leave_out: patterns (*, ?, [...]) of stored names that are no part of the model.

    Raises:
        ValueError: a parameter is not there, or in another shape; a tensor is no parameter; a pattern fits none.
    """
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    family, asked = cuts.family, _asked_for(source, leave_out)
    stored = {name: tensor for name, tensor in source.tensors.items() if name not in asked}
    try:
        plain, base = plain_names(stored, family)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    mtp = {name for name, inside in plain.items() if _is_mtp(inside, config, cuts)}
    tensors = {
        inside: stored[name]
        for name, inside in plain.items()
        if name not in mtp and not inside.endswith(_NOT_PARAMETERS)
    }
    head = f"{family.head}.weight"
    has_head = head in tensors
    tied = _is_tied(tensors, config, family, base)
    if tied:
        tensors.pop(head, None)  # as save_pretrained() leaves it out
    plan = _with_tied(plan, tied, family)
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    pairs = _pairs(source, tensors, cuts, without={head} if not tied and not has_head else set())
    if base:
        pairs = [
            (dataclasses.replace(cut, name=cut.name.removeprefix(base)), tensor) for cut, tensor in pairs
        ]
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    return Matched(plan, pairs, parameters, tuple(name for name in source.tensors if name in asked | mtp))


def _asked_for(source: SourceFolder, patterns: Sequence[str]) -> set[str]:
    """The stored names that the patterns fit."""
    asked: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(source.tensors, pattern)
        if not found:
            raise ValueError(f"{source.path}: leave_out has {pattern!r}, which fits no tensor there")
        asked.update(found)
    return asked


def _is_mtp(name: str, config: Mapping[str, Any], cuts: Cuts) -> bool:
    inside = name.removeprefix(f"{cuts.family.layers.rpartition('.')[0]}.")
    if inside.startswith(_MTP_NAMES):
        return True
    layer = re.match(rf"{re.escape(cuts.family.layers)}\.(\d+)\.", name)
    beyond = config_value(config, MTP_KEYS[0], 0)
    return layer is not None and 0 <= int(layer[1]) - cuts.source["layers"] < beyond


def _is_tied(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], family: Family, base: str
) -> bool:
    """Whether the head is the embedding: it has the same bytes, or it is not there.

    save_pretrained() stores one of two tensors that share memory, whatever the config says of them. A base
    model has no head: there the config tells what a head would be.
    """
    head, embedding = tensors.get(f"{family.head}.weight"), tensors.get(f"{family.embedding}.weight")
    if head is None:
        return family.tied(config) if is_headless(config, base) else True
    return embedding is not None and _same_bytes(head, embedding)


def is_headless(config: Mapping[str, Any], base: str) -> bool:
    """Whether it is the checkpoint of a base model, without a head: its names or its config's class say so."""
    classes = config_value(config, "architectures") or ()
    return bool(base) or (bool(classes) and not any("For" in str(name) for name in classes))


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    for done in range(0, one.nbytes, _COMPARED_BYTES):
        size = min(_COMPARED_BYTES, one.nbytes - done)
        blocks = bytearray(size), bytearray(size)
        for tensor, block in zip((one, other), blocks, strict=True):
            tensor.file.read_into(memoryview(block), tensor.begin + done)
        if blocks[0] != blocks[1]:
            return False
    return True


def _with_tied(plan: PruningPlan, tied: bool, family: Family) -> PruningPlan:
    """The plan for a model whose head is tied or is not."""
    configs = {
        name: {**entries, "tie_word_embeddings": tied}
        for name in ("source_config", "target_config")
        if family.tied(entries := getattr(plan, name)) != tied
    }
    return dataclasses.replace(plan, **configs) if configs else plan


def _pairs(
    source: SourceFolder, tensors: Mapping[str, StoredTensor], cuts: Cuts, without: set[str]
) -> list[tuple[Cut, StoredTensor]]:
    """Every tensor that stays with its cut, in the order of the model; ValueError unless all fit."""
    # experts may be stored one by one, as transformers does, or stacked as they are in the model
    stored = not set(cuts.names(stored=False)) - without <= set(tensors)
    wanted = [name for name in cuts.names(stored=stored) if name not in without]
    _check_names(source, tensors, wanted, cuts)
    pairs = []
    for name in wanted:
        tensor, cut = tensors[name], cuts.of(name, stored=stored)
        if cut is None:
            continue
        if tuple(cut.source_shape) != tensor.shape:
            raise ValueError(
                f"{tensor.file.path}: {tensor.name} has shape {list(tensor.shape)}, and the plan is for shape "
                f"{list(cut.source_shape)}"
            )
        pairs.append((cut, tensor))
    return pairs


def _check_names(
    source: SourceFolder, tensors: Mapping[str, StoredTensor], wanted: Sequence[str], cuts: Cuts
) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        embedding = f"{cuts.family.embedding}.weight"
        end = embedding.removeprefix(_base(cuts.family))
        found = [name for name in tensors if name.endswith(f".{end}")]
        if embedding in missing and found:
            prefix = found[0].removesuffix(end).removesuffix(_base(cuts.family))
            raise ValueError(
                f"{source.path}: its names begin with {shown(prefix)}, as {shown(found[0])}, and no such prefix "
                f"is known: rename them, so that this one is {embedding}"
            )
        raise ValueError(f"{source.path}: lacks {_listed(missing)}, which the model has; {AGAIN}")
    known = set(wanted)
    if extra := [tensor for name, tensor in tensors.items() if name not in known]:
        raise ValueError(
            f"{extra[0].file.path}: {_listed([tensor.name for tensor in extra])} is no parameter of a "
            f"{cuts.plan.source_config['model_type']} model of these sizes. Where the model works without, "
            "name it in leave_out, by a pattern as '*.k_scale'"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
