"""The families that the library knows, a call of register_family() each, by the names of transformers 5."""

from minitron_kernels.pruning.families.tables import (  # noqa: F401  they register theirs
    dense,
    experts,
    hybrid_heads,
    layernorm,
    shared_experts,
    wrapped,
)
