"""Heads of state spaces and of gated delta nets: which numbers of them can stay."""

from __future__ import annotations

from collections.abc import Container, Mapping

# axes of layers that keep a state instead of keys and values
STATE_AXES = ("mamba_heads", "mamba_dim", "delta_heads", "delta_keys")


def following_keys(before: Mapping[str, int], after: dict[str, int], given: Container[str]) -> None:
    """Lets key heads of a delta net follow its value heads, where each of these has a key head of its own."""
    if "delta_keys" in before and before["delta_heads"] == before["delta_keys"] and "delta_keys" not in given:
        after["delta_keys"] = after["delta_heads"]


def impossible_heads(before: Mapping[str, int], after: Mapping[str, int]) -> str | None:
    """Why these numbers of heads cannot stay; None where they can.

    Equally many stay in each group: of a state space the heads that share B and C, of a gated delta net the
    value heads that share a key head.
    """
    heads, groups = after.get("mamba_heads", 0), after.get("mamba_groups", 1)
    if heads % groups:
        return (
            f"the heads of a state space must be a multiple of its {groups} groups, each of which keeps "
            f"equally many, got {heads}"
        )
    if "delta_keys" not in before:
        return None
    values, keys = after["delta_heads"], after["delta_keys"]
    most = before["delta_heads"] // before["delta_keys"]
    if values % keys:
        return (
            f"linear_num_value_heads must be a multiple of linear_num_key_heads, {keys}, got {values}: every "
            "key head keeps equally many value heads"
        )
    if values > most * keys:
        return (
            f"linear_num_key_heads {keys} would serve {values // keys} value heads each, but a key head has "
            f"{most}: keep at most {most * keys} linear_num_value_heads"
        )
    return None
