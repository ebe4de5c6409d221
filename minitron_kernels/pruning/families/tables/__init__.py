"""The families that the library knows, a call of register_family() each, by the names of transformers 5."""

from minitron_kernels.pruning.families.tables import (  # noqa: F401  they register theirs
    delta_nets,
    dense,
    experts,
    gpt,
    hybrid_heads,
    layernorm,
    mamba,
    older,
    shared_experts,
    short_convolutions,
    wrapped,
)
