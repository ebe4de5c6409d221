"""Tiny random models of every family, made from configs."""

import torch

from pruning.family_case import COMMON

SPECIAL = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {},
    "nemotron": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}
FAMILIES = tuple(SPECIAL)


def tiny_config(name, **changes):
    """A config of the family `name`, with everything of it that is optional switched on."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**COMMON, **SPECIAL[name], **changes})


def tiny_model(name, *, seed=0, dtype=torch.float32, **changes):
    """A model of the family `name` in eval mode; norm gains and biases are random too."""
    return random_model(tiny_config(name, **changes), seed=seed, dtype=dtype)


def random_model(config, *, seed=0, dtype=torch.float32, auto="AutoModelForCausalLM"):
    """A model of this config in eval mode; norm gains, biases and learned buffers are random too."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model
