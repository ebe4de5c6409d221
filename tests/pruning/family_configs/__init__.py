"""The families that are tested: each one that the library knows, by its model_type."""

from pruning.family_configs import dense, experts, gpt, hybrid, layernorm, wrapped

FILES = (dense, layernorm, gpt, experts, hybrid, wrapped)
CASES = {case.model_type: case for file in FILES for case in file.CASES}
