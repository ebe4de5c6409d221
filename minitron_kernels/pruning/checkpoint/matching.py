"""Finds the parameter of each stored tensor: prefixes of wrappers, tied heads, tensors that are left out.

Whether the head is tied, and which prefix names have, is decided by the files, not by config.json: the files
are what transformers loads.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_kernels.pruning.checkpoint.safetensors_files import SourceFolder, StoredTensor, shown
from minitron_kernels.pruning.cut.cuts import Cut, Cuts
from minitron_kernels.pruning.cut.skeleton import Shapes, check_outside, check_shapes, expected_shapes
from minitron_kernels.pruning.families.configs import config_value
from minitron_kernels.pruning.families.family import MTP_KEYS, TIE_KEY, Family
from minitron_kernels.pruning.families.names import family_names, has_stored_names, stored_prefixes
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan

# buffers that old checkpoints hold, and that transformers computes
_NOT_PARAMETERS = ".rotary_emb.inv_freq"
# layers for multi-token prediction (MTP), which transformers does not load either
_MTP_NAMES = ("mtp.", "mtp_layers.")
_COMPARED_BYTES = 1 << 20


@dataclass(frozen=True)
class Matched:
    """What becomes of the tensors of a checkpoint.

    Args:
        plan: the plan, with tie_word_embeddings in both configs as the files have it.
        pairs: (cut, tensor) for each tensor that stays, in the order of the model.
        stored: whether experts are stored one by one, as is usual in checkpoints.
        headless: whether the checkpoint is of a base model, without a head.
        root: the prefix that its names lack, and that the result's names lack too: "model." for a base model.
        parameters: their number in the source; a tied head counts once.
        left_out: names of tensors that are not part of the model: those in leave_out, and MTP layers.
        called: {name to be written: name in the family's table} of the tensors in its tables.
        head: whether the head is tied, and why, where the files hold another than config.json says, or a copy
            of the embedding; else empty.
    """

    plan: PruningPlan
    pairs: list[tuple[Cut, StoredTensor]]
    stored: bool
    headless: bool
    root: str
    parameters: int
    left_out: tuple[str, ...]
    called: Mapping[str, str]
    head: str

    @property
    def shapes(self) -> Shapes:
        """The names and shapes of the tensors to be written."""
        return {cut.name: cut.shape for cut, _ in self.pairs}


def match(
    source: SourceFolder,
    config: Mapping[str, Any],
    plan: PruningPlan,
    *,
    rescale_norms: bool,
    leave_out: Sequence[str],
) -> Matched:
    """Finds every tensor that stays, and its cut.

    Args:
        source: the checkpoint's weights.
        config: its config.json.
        plan: what stays.
        rescale_norms: see Cuts.
        leave_out: patterns (*, ?, [...]) of stored names that are not part of the model.

    Raises:
        ValueError: a parameter is missing or has another shape; a tensor is not a parameter; a pattern
            matches no tensor.
    """
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    family, asked = cuts.family, _asked_for(source, leave_out)
    stored = {name: tensor for name, tensor in source.tensors.items() if name not in asked}
    try:
        plain = family_names(stored, family)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    mtp = {name for name, inside in plain.items() if _is_mtp(inside, config, cuts)}
    tensors = {
        inside: stored[name]
        for name, inside in plain.items()
        if name not in mtp and not _is_computed(inside, family)
    }
    head = f"{family.head}.weight"
    renamed = has_stored_names(stored, family)
    root = "" if renamed or head in tensors or family.text_key else _lacking_root(tensors, family)
    headless = head not in tensors and (bool(root) or is_class_of_base(config))
    tied = family.tied(config) if headless else _is_tied(tensors, family)
    about_head = "" if headless else _about_head(tied, head in tensors, family.tied(config))
    if tied:
        tensors.pop(head, None)  # as save_pretrained() leaves it out
    plan = _with_tied(plan, tied, family)
    cuts = Cuts(plan, rescale_norms=rescale_norms)
    without = set(filter(family.is_in_head, cuts.names())) if headless else set()
    # experts are stored one by one, as transformers does, or stacked, as they are in the model
    one_by_one = not set(cuts.names(stored=False)) - without <= set(tensors)
    wanted = [name for name in cuts.names(stored=one_by_one) if name not in without]
    copies = [
        (cut, tensor)
        for name, tensor in tensors.items()
        if name not in wanted and (cut := cuts.untouched(name, tensor.shape)) is not None
    ]
    _check_names(source, tensors, [*wanted, *(cut.name for cut, _ in copies)], plan)
    pairs = [
        (dataclasses.replace(cut, name=cut.name.removeprefix(root)), tensor)
        for cut, tensor in (*_pairs(tensors, wanted, cuts, one_by_one), *copies)
    ]
    called = {cut.name: root + cut.name for cut, _ in pairs}
    if renamed:
        stored_name = family.stored_names.in_checkpoint
        pairs = [(dataclasses.replace(cut, name=stored_name(cut.name)), tensor) for cut, tensor in pairs]
        called = {stored_name(name): name for name in called}
    if family.text_key is not None:
        inside = [cut.name for cut, _ in pairs]
        pairs = _as_stored(pairs, family)
        called = {
            cut.name: name for (cut, _), name in zip(pairs, inside, strict=True) if not cuts.copies(name)
        }
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    left_out = tuple(name for name in source.tensors if name in asked | mtp)
    return Matched(plan, pairs, one_by_one, headless, root, parameters, left_out, called, about_head)


def _as_stored(pairs: list[tuple[Cut, StoredTensor]], family: Family) -> list[tuple[Cut, StoredTensor]]:
    """The pairs, with names that have the same prefixes as the tensors they come from."""
    prefixes = stored_prefixes((tensor.name for _, tensor in pairs), family)
    named = []
    for cut, tensor in pairs:
        there, own = prefixes[tensor.name]
        named.append((dataclasses.replace(cut, name=there + cut.name.removeprefix(own)), tensor))
    return named


def _asked_for(source: SourceFolder, patterns: Sequence[str]) -> set[str]:
    """The stored names that match a pattern."""
    asked: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(source.tensors, pattern)
        if not found:
            raise ValueError(f"{source.path}: leave_out has {pattern!r}, which matches no tensor there")
        asked.update(found)
    return asked


def _is_computed(name: str, family: Family) -> bool:
    """Whether a tensor is a buffer that transformers computes: of RoPE, or one that the family names."""
    inside = re.fullmatch(rf"{re.escape(family.layers)}\.\d+\.(.+)", name)
    return name.endswith(_NOT_PARAMETERS) or (
        inside is not None and inside[1] in family.stored_names.computed
    )


def _is_mtp(name: str, config: Mapping[str, Any], cuts: Cuts) -> bool:
    inside = name.removeprefix(f"{cuts.family.layers.rpartition('.')[0]}.")
    if inside.startswith(_MTP_NAMES):
        return True
    layer = re.match(rf"{re.escape(cuts.family.layers)}\.(\d+)\.", name)
    beyond = cuts.family.value(config, MTP_KEYS[0], 0)
    return layer is not None and 0 <= int(layer[1]) - cuts.source["layers"] < beyond


def _lacking_root(tensors: Mapping[str, StoredTensor], family: Family) -> str:
    """The prefix that a base model's names lack ("model."); "" where they have it."""
    root, _, leaf = family.embedding.rpartition(".")
    embedding = tensors.get(f"{root}.{leaf}.weight")
    lacking = root and embedding is not None and root.split(".")[-1] not in embedding.name.split(".")
    return f"{root}." if lacking else ""


def is_class_of_base(config: Mapping[str, Any]) -> bool:
    """Whether a config names classes of a decoder alone, as LlamaModel; LlamaForCausalLM, GPT2LMHeadModel
    are not."""
    classes = config_value(config, "architectures") or ()
    return bool(classes) and not any("For" in str(name) or "LMHead" in str(name) for name in classes)


def _is_tied(tensors: Mapping[str, StoredTensor], family: Family) -> bool:
    """Whether the head is tied to the embedding: it has the same bytes, or is missing.

    Of two tensors that share memory, save_pretrained() stores one, whatever the config says.
    """
    head, embedding = (tensors.get(f"{name}.weight") for name in (family.head, family.embedding))
    return head is None or (embedding is not None and _same_bytes(head, embedding))


def _about_head(tied: bool, stored: bool, said: bool) -> str:
    """What is told of a head: tied to the embedding or not, stored in the files, tied as config.json says."""
    if tied and stored:
        why = "its bytes are the embedding's: it is tied to it, and stored once"
    elif tied != said:
        why = "is its own, and stays" if not tied else "is not stored: it is tied to the embedding"
    else:
        return ""
    return f"{why}; config.json said {TIE_KEY} {str(said).lower()}" if tied != said else why


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
    """The plan with this tie_word_embeddings in its configs."""
    configs: dict[str, Any] = {
        name: with_tied(entries, tied, family)
        for name in ("source_config", "target_config")
        if family.tied(entries := getattr(plan, name)) != tied
    }
    return dataclasses.replace(plan, **configs) if configs else plan


def with_tied(config: Mapping[str, Any], tied: bool, family: Family) -> dict[str, Any]:
    """A config with this tie_word_embeddings, which some classes read in the text model's config too."""
    made, text = {**config, TIE_KEY: tied}, family.text_key
    if text is not None and isinstance(config.get(text), Mapping):
        made[text] = {**config[text], TIE_KEY: tied}
    return made


def _check_names(
    source: SourceFolder, tensors: Mapping[str, StoredTensor], wanted: Sequence[str], plan: PruningPlan
) -> None:
    model = f"a {plan.source_config['model_type']} model of the plan's sizes"
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(
            f"{source.path}: lacks {_listed(missing)}, which {model} has; is the checkpoint complete?"
        )
    known = set(wanted)
    if extra := [tensor for name, tensor in tensors.items() if name not in known]:
        raise ValueError(
            f"{extra[0].file.path}: {_listed([tensor.name for tensor in extra])}: no parameter of {model}. "
            "Name what the model works without in leave_out, by a pattern such as '*.k_scale'"
        )


def _pairs(
    tensors: Mapping[str, StoredTensor], wanted: Sequence[str], cuts: Cuts, stored: bool
) -> Iterator[tuple[Cut, StoredTensor]]:
    """(cut, tensor) for each tensor that stays, in the order of the model; ValueError unless shapes fit."""
    for name in wanted:
        tensor, cut = tensors[name], cuts.of(name, stored=stored)
        if cut is None:
            continue
        if tuple(cut.source_shape) != tensor.shape:
            raise ValueError(
                f"{tensor.file.path}: {tensor.name} has shape {list(tensor.shape)}, and the plan is for "
                f"shape {list(cut.source_shape)}"
            )
        yield cut, tensor


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


def check_result(matched: Matched, config: Mapping[str, Any], where: object) -> None:
    """Checks the names and shapes of the result against the config that is written beside it.

    Raises:
        ValueError: transformers would not load it; names the first difference.
    """
    family = family_of(config)
    try:
        if family.refuses(config) is None:
            expected = expected_shapes(config, stored=matched.stored, headless=matched.headless)
        else:  # the plan was made with loadable=False
            sizes = family.sizes(config)
            params = family.parameters(config, stored=matched.stored)
            expected = {param.name: param.shape(sizes) for param in params}
        if matched.headless:
            expected = {name: shape for name, shape in expected.items() if not family.is_in_head(name)}
        shapes = matched.shapes
        result = {called: shapes[name] for name, called in matched.called.items()}
        if family.refuses(config) is None:
            check_outside(matched.plan.source_config, config)
        check_shapes(result, expected, set(expected), "the config of the result")
    except ValueError as error:
        raise ValueError(
            f"{where}: the result would not be loaded from its own config.json: {error}"
        ) from None
