"""Maps the names of parameters, as models and checkpoints have them, to those in the family's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from minitron_kernels.pruning.families.family import Family
from minitron_kernels.pruning.families.wrappers import plain_name

# prefixes that a decoder's parameters may have instead of, or beside, the family's own
PREFIXES = ("model", "language_model", "module", "backbone")


def family_names(names: Iterable[str], family: Family) -> dict[str, str]:
    """{name in a model or checkpoint: name in the family's table}.

    The names may be the family's own; those of the decoder alone, as AutoModel gives it (without "model." in
    front); those with any of "model.", "language_model.", "module." in front, as larger models and training
    loops store them; and those that torch.compile or activation checkpointing has changed. A name that
    belongs neither to the decoder nor to its head stays as it is.

    Raises:
        ValueError: the decoder has an unknown prefix, or several prefixes; names them. Two names are of one
            parameter.

    Example:
        >>> from minitron_kernels.pruning.families.registry import family_of
        >>> llama = family_of({"model_type": "llama"})
        >>> family_names(["embed_tokens.weight", "layers.0.mlp.up_proj.weight"], llama)["embed_tokens.weight"]
        'model.embed_tokens.weight'
    """
    plain = {name: plain_name(name) for name in names}
    if family.text_key is not None:
        return _once({name: own for name, (own, _) in _inside_names(plain, family).items()})
    if has_stored_names(plain, family):
        plain = {name: family.stored_names.in_model(_unwrapped(called)) for name, called in plain.items()}
    root = family.layers.rpartition(".")[0]
    root = f"{root}." if root else ""
    prefix = _decoder_prefix(plain.values(), family.embedding.removeprefix(root), root)
    found: dict[str, str] = {}
    for name, bare in plain.items():
        called = _in_head(bare, family)
        if called is None:
            called = root + bare.removeprefix(prefix) if bare.startswith(prefix) else bare
        found[name] = called
    return _once(found)


def stored_prefixes(names: Iterable[str], family: Family) -> dict[str, tuple[str, str]]:
    """{name: (prefix in a checkpoint, prefix in the family's table)} where both names are otherwise the same.

    For text models inside others, whose checkpoints may have other prefixes than the models.
    """
    return {name: pair for name, (_, pair) in _inside_names({name: name for name in names}, family).items()}


def has_stored_names(names: Iterable[str], family: Family) -> bool:
    """Whether these are names as in the family's checkpoints, where they are others than in its models."""
    bare = (_unwrapped(plain_name(name)) for name in names)
    return family.text_key is None and family.stored_names.used_by(bare, family.embedding)


def _inside_names(plain: Mapping[str, str], family: Family) -> dict[str, tuple[str, tuple[str, str]]]:
    """{name: (name in the family's table, its two prefixes)} by the layout that has the embedding."""
    embedding = f"{family.embedding}.weight"
    top, _, _ = family.embedding.partition(".")
    bare = ((f"{top}.", ""),)  # of the model without its head, as AutoModel gives it
    for layout in ((), *family.layouts, bare):
        found = {}
        for name, called in plain.items():
            called = called.removeprefix("module.")
            pairs = ((there, own) for own, there in layout if called.startswith(there))
            there, own = next(pairs, ("", ""))
            found[name] = own + called.removeprefix(there), (there, own)
        if embedding in (own for own, _ in found.values()):
            return found
    return {name: (called, ("", "")) for name, called in plain.items()}


def _in_head(name: str, family: Family) -> str | None:
    """The name in the family's table of a parameter of the head, under known prefixes; None for others."""
    while True:
        called = family.aliases.get(name, name)
        if family.is_in_head(called):
            return called
        front, _, name = name.partition(".")
        if front not in PREFIXES:
            return None


def _unwrapped(name: str) -> str:
    return name.removeprefix("module.")


def _once(found: dict[str, str]) -> dict[str, str]:
    """`found`, checked to have each value once."""
    came_from: dict[str, str] = {}
    for name, called in found.items():
        if called in came_from:
            raise ValueError(f"{came_from[called]} and {name} are both {called}: keep one of them")
        came_from[called] = name
    return found


def _is_known(prefix: str) -> bool:
    *parts, rest = prefix.split(".")
    return not rest and all(part in PREFIXES for part in parts)


def _decoder_prefix(names: Iterable[str], embedding: str, root: str) -> str:
    """The prefix of the decoder's names; the family's own `root` where there is no embedding."""
    end = f"{embedding}.weight"
    there = {name.removesuffix(end) for name in names if name == end or name.endswith(f".{end}")}
    bare = root.partition(".")[2]  # of a decoder alone, whose names lack the first part
    known = {prefix for prefix in there if prefix in (root, bare) or _is_known(prefix)}
    if len(known) > 1:
        raise ValueError(
            f"there are several decoders, under the prefixes {', '.join(map(repr, sorted(known)))}: keep one"
        )
    if there and not known:
        raise ValueError(
            f"the decoder is under the prefix {sorted(there)[0]!r}, which is not made of "
            f"{', '.join(PREFIXES)}: rename its parameters so that they begin with {root!r}"
        )
    return known.pop() if known else root
