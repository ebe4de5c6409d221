"""The families that are tested: each one that the library knows, by its model_type."""

from pruning.family_configs import dense, experts, layernorm, wrapped

CASES = {case.model_type: case for case in (*dense.CASES, *layernorm.CASES, *experts.CASES, *wrapped.CASES)}
