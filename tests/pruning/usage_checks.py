"""count_usage() of a model against its tensors, its gradients and its cache."""

import copy

import torch
from transformers import DynamicCache

from minitron_kernels.pruning import count_usage


def check_usage(model, counts=lambda name: True):
    """All parameters, those that a token meets, and bytes of weights and of a cache of 14 tokens.

    counts: (name) -> whether a parameter is of the text model.
    """
    dtype = next(model.parameters()).dtype
    weights = {part.data_ptr(): part for name, part in model.named_parameters() if counts(name)}
    counted = count_usage(model.config, memory_dtype=dtype)
    assert counted.parameters == sum(parameter.numel() for parameter in weights.values())
    assert counted.memory_bytes == sum(parameter.nbytes for parameter in weights.values())
    encoder = sum(part.numel() for name, part in model.named_parameters() if not counts(name))
    assert counted.active_parameters == active_parameters(model) - encoder
    keys, states = cache_of(model)
    assert keys > 0
    options = dict(kv_tokens=14, kv_sequences=2)
    with_cache = count_usage(model.config, memory_dtype=str(dtype).removeprefix("torch."), **options)
    assert with_cache.memory_bytes == counted.memory_bytes + keys + states
    if states:  # some are kept in float32 in any case
        half = copy.deepcopy(model).bfloat16()
        if hasattr(half, "set_experts_implementation"):
            half.set_experts_implementation("eager")  # the others want rows of 16 bytes
        keys, states = cache_of(half)
        with_cache = count_usage(model.config, memory_dtype="bfloat16", **options)
        assert with_cache.memory_bytes == 2 * counted.parameters + keys + states


def active_parameters(model):
    """Those of experts count if a token was routed to the expert: else it has a gradient of zero."""
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return sum(parameter.numel() for parameter in model.parameters())
    model(torch.tensor([[5]])).logits.square().sum().backward()
    met = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parts = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts = parts.flatten(1)
            met += int((parts != 0).any(1).sum()) * parts.shape[1]
        else:
            met += parameter.numel()
    model.zero_grad(set_to_none=True)
    assert met < sum(parameter.numel() for parameter in model.parameters())
    return met


@torch.no_grad()
def cache_of(model):
    """What two sequences of 7 tokens leave in a cache: (bytes of keys and values, bytes of states).

    Layers with a sliding window keep all tokens, as in a cache that knows no config.
    """
    ids = torch.arange(14).view(2, 7) + 3
    layers = model(ids, use_cache=True).past_key_values.layers
    states = sum(
        part.nbytes
        for layer in layers
        for name in ("conv_states", "recurrent_states")
        for part in getattr(layer, name, {}).values()
        if part is not None
    )
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        layers = model(ids, use_cache=True, past_key_values=DynamicCache()).past_key_values.layers
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(part.nbytes for part in held if part is not None), states
