"""Axes of parameters: how a part of a dimension is written, and how many elements it has.

heads                   an axis; head_dim elements for each head, where nothing else is said
heads*v_dim             as many elements for each of its elements: a number, or the axis of that size
heads(head_dim|v_dim)   groups behind each other, one for each element of the axis, each of which holds
                        the pieces behind each other. A piece of an axis that can be pruned is the group's
                        share of it: "kv_heads(heads|head_dim|head_dim)" is, KV group after KV group, its
                        query heads, its key head and its value head; any other piece is there in each
                        group
qkv                     the same as that example
one                     one element
"""

from __future__ import annotations

from collections.abc import Mapping

PER_HEAD = ("heads", "kv_heads")  # whose elements hold head_dim of a dimension, where nothing else is said
# axes whose elements can be removed
PRUNED = (
    *("hidden", "heads", "kv_heads", "mlp", "experts", "expert_mlp"),
    *("conv", "mamba_heads", "mamba_dim", "delta_heads", "delta_keys"),
)
ONE = "one"
QKV = "qkv"  # queries, keys and values of each KV group in turn
PER_HEAD_ONE = {"num_heads": "heads", "num_kv_heads": "kv_heads"}  # axes of one element a head

Sizes = Mapping[str, int]


def dims_of(axes: str) -> tuple[tuple[str, ...], ...]:
    """The parts of each dimension of what has these axes: "a+b, c" are two dimensions; "" is a scalar."""
    return tuple(tuple(part.split("+")) for part in axes.split(", ")) if axes else ()


def split_part(part: str) -> tuple[str, str]:
    """(axis, what each of its elements holds of the dimension: a number, or the axis whose size it is).

    Not of groups of pieces, which groups_of() splits.
    """
    axis, _, inside = part.partition("*")
    if axis in PER_HEAD_ONE:
        return PER_HEAD_ONE[axis], "1"
    return axis, inside or ("head_dim" if axis in PER_HEAD else "1")


def groups_of(part: str) -> tuple[str, tuple[str, ...]] | None:
    """(axis, pieces) of a part that is made of groups, one for each element of the axis; None of others.

    Example:
        >>> groups_of("qkv")
        ('kv_heads', ('heads', 'head_dim', 'head_dim'))
    """
    if part == QKV:
        return "kv_heads", ("heads", "head_dim", "head_dim")
    axis, bracket, pieces = part.partition("(")
    return (axis, tuple(pieces.removesuffix(")").split("|"))) if bracket else None


def names_in(part: str) -> tuple[str, ...]:
    """All axes and numbers that a part is written with."""
    groups = groups_of(part)
    if groups is None:
        return split_part(part)
    return groups[0], *(name for piece in groups[1] for name in split_part(piece))


def elements_inside(part: str, sizes: Sizes) -> int:
    """How many elements of the dimension each element of a part's axis holds: head_dim for a head."""
    _, inside = split_part(part)
    return int(inside) if inside.isdecimal() else sizes[inside]


def elements(part: str, sizes: Sizes) -> int:
    """The number of elements of a part along a dimension: head_dim for each head."""
    if part == ONE:
        return 1
    groups = groups_of(part)
    if groups is not None:
        return sizes[groups[0]] * sum(of_group(piece, groups[0], sizes) for piece in groups[1])
    return sizes[split_part(part)[0]] * elements_inside(part, sizes)


def of_group(piece: str, groups: str, sizes: Sizes) -> int:
    """The number of elements of a piece in each group; `groups` is the axis that has a group an element."""
    count = elements(piece, sizes)
    return count // sizes[groups] if split_part(piece)[0] in PRUNED else count


def qkv_block(head: int, size: int, part: str = "query") -> int:
    """Where a query head (or the key or value of a KV head) is, in heads, among rows that are grouped.

    size: of query heads in each KV group, which are followed by the group's key and value.
    """
    if part == "query":
        return head // size * (size + 2) + head % size
    return head * (size + 2) + size + (part == "value")
