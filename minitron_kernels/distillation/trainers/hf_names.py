"""Which tensors of a checkpoint's files a model's parameters are made of, by names as transformers maps them.

from_pretrained() renames what it reads, and joins some of it: experts that lie one by one become one
parameter. The same tables are asked here, without reading a tensor. What is joined in another way than
experts along the first dimension is left to from_pretrained(): there rows of a parameter are not rows of its
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

Shape = tuple[int, ...]


class NotByShardsError(ValueError):
    """Why a checkpoint is not read by shards; from_pretrained() takes it."""


class Source(NamedTuple):
    """A tensor of the files, and what it is of a parameter.

    Args:
        key: its name in the files.
        row: the one index of the parameter's first dimension that it is; None: it is the whole parameter.
        column: of its rows the first one's index in the parameter's second dimension; with `row` alone.
    """

    key: str
    row: int | None = None
    column: int = 0


class Names(NamedTuple):
    """What map_names() finds.

    Args:
        sources: {name in the model: what fills it}; a tied parameter has an entry under each of its names.
        lacking: names in the model that nothing fills.
        differing: names whose tensors have other shapes.
        unused: names in the files that nothing takes, without those that the model's class says to ignore.
        transforms: of transformers, those that were met; save_pretrained() undoes them.
    """

    sources: dict[str, list[Source]]
    lacking: list[str]
    differing: list[str]
    unused: list[str]
    transforms: list[Any]


def map_names(model: Any, shapes: Mapping[str, Shape], key_mapping: Mapping[str, str] | None) -> Names:
    """Finds what fills a model, of tensors with these shapes.

    Args:
        model: of transformers, on the meta device, tied and neither wrapped nor sharded yet.
        shapes: {name in the files: shape}.
        key_mapping: as in from_pretrained().

    Raises:
        NotByShardsError: what transformers does at loading is not known here.
    """
    found, transforms = _collected(model, shapes, key_mapping)
    state = model.state_dict()
    names_of: dict[int, list[str]] = {}  # tied parameters have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in names_of.values() for name in names}
    if unknown := sorted(state.keys() - tied.keys() - dict(model.named_buffers()).keys()):
        raise NotByShardsError(f"{unknown[0]} is neither a parameter nor a buffer")
    result = Names({}, [], [], _unused(model, found, shapes), transforms)
    for name in state:
        if name in result.sources:
            continue
        names = tied.get(name, [name])
        present = [alias for alias in names if alias in found]
        if len(present) > 1:
            raise NotByShardsError(f"it has {' and '.join(present)}, which the model ties")
        if not present:
            result.lacking.append(name)
            continue
        sources = found[present[0]](tuple(state[name].shape))
        if sources is None:
            result.differing.append(name)
        result.sources.update((alias, sources or []) for alias in names)
    result.lacking[:] = [name for name in result.lacking if tied.get(name, [name])[0] == name]
    if ignored := _matching(result.lacking, getattr(model, "_keys_to_ignore_on_load_missing", None)):
        raise NotByShardsError(f"it lacks {ignored[0]}, which transformers makes anew for this class")
    return result


def _collected(
    model: Any, shapes: Mapping[str, Shape], key_mapping: Mapping[str, str] | None
) -> tuple[dict[str, Any], list[Any]]:
    """({name in the model: shape of it -> its sources, None if they do not fit}, the transforms met)."""
    try:
        from transformers import conversion_mapping, core_model_loading

        mapping: Any = key_mapping
        transforms: list[Any] = list(conversion_mapping.get_model_conversion_mapping(model, mapping))
        rename: Any = core_model_loading.rename_source_key
        order = core_model_loading.dot_natural_key
        kinds: tuple[Any, Any] = core_model_loading.WeightRenaming, core_model_loading.WeightConverter
        joins = core_model_loading.MergeModulelist, core_model_loading.Concatenate
        renamings, converters = ([x for x in transforms if isinstance(x, kind)] for kind in kinds)
        if len(renamings) + len(converters) < len(transforms):
            raise AttributeError("a transform of another kind")
        state = model.state_dict()
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        found: dict[str, Any] = {}
        joined: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for key in sorted(shapes, key=order):
            name, pattern = rename(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:  # as from_pretrained() does
                name, pattern = rename(key, [], [], model.base_model_prefix, state)
            if name not in state:
                continue
            if name in found or (pattern is None and name in joined):
                raise NotByShardsError(f"two of its tensors are the model's {name}")
            if pattern is None:
                found[name] = _Plain(key, shapes[key])
            else:
                joined.setdefault(name, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(key)
        met = [x for x in transforms if x.was_used()]
    except NotByShardsError:
        raise
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        import transformers

        raise NotByShardsError(
            f"transformers {transformers.__version__} names weights in a way that is not known here ({error})"
        ) from None
    for name, (converter, keys) in joined.items():
        if name in found:
            raise NotByShardsError(f"two of its tensors are the model's {name}")
        if not _joins_experts(converter, *joins):
            what = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise NotByShardsError(f"transformers makes {name} of its tensors by {what}")
        found[name] = _Experts([keys.get(pattern, []) for pattern in converter.source_patterns], shapes)
    return found, met


def _joins_experts(converter: Any, stack: Any, concatenate: Any) -> bool:
    """Whether each index of the first dimension is made of tensors of its own, one below the other."""
    operations: list[Any] = list(converter.operations)
    first = operations[0]
    if len(converter.target_patterns) != 1 or not isinstance(first, stack) or first.dim != 0:
        return False
    if len(operations) == 1:
        return len(converter.source_patterns) == 1
    last = operations[1]
    below = isinstance(last, concatenate) and last.dim == 1
    return len(operations) == 2 and below and not getattr(last, "num_shards_attribute", None)


class _Plain(NamedTuple):
    """A tensor that is a parameter."""

    key: str
    shape: Shape

    def __call__(self, shape: Shape) -> list[Source] | None:
        return [Source(self.key)] if self.shape == shape else None


class _Experts(NamedTuple):
    """Lists of tensors, one an expert; those of several lists below each other."""

    lists: Sequence[Sequence[str]]
    shapes: Mapping[str, Shape]

    def __call__(self, shape: Shape) -> list[Source] | None:
        if any(len(keys) != shape[0] for keys in self.lists):
            return None
        sources, heights = [], set()
        for row, keys in enumerate(zip(*self.lists, strict=True)):
            column = 0
            for key in keys:
                height, *rest = self.shapes[key] or (0,)
                if tuple(rest) != shape[2:]:
                    return None
                sources.append(Source(key, row, column))
                column += height
            heights.add(column)
        return sources if heights == {shape[1]} else None


def _unused(model: nn.Module, found: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    """Tensors that nothing takes; those that transformers leaves out without a word are left out here."""
    taken = set()
    for one in found.values():
        taken |= {one.key} if isinstance(one, _Plain) else {key for keys in one.lists for key in keys}
    left = [key for key in shapes if key not in taken]
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    for name in ("rotary_emb.inv_freq", "position_ids"):  # once saved with a model, and made by it today
        if any(buffer.endswith(name) for buffer, _ in model.named_buffers()):
            patterns.add(rf"(^|\.){re.escape(name)}$")
    ignored = set(_matching(left, patterns))
    return [key for key in left if key not in ignored]


def _matching(names: Sequence[str], patterns: Any) -> list[str]:
    """Names in which one of some regular expressions is found."""
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns or ())]
