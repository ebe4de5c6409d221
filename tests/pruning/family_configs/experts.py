"""Families with experts."""

import numpy as np
import torch

from pruning.family_case import Case, Places
from pruning.family_configs.dense import OLMO2, WIDE, WINDOWS

DENSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CHOICE = {"num_experts": 4, **DENSE}
LATENT = {
    **{
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
    },
    **{"num_key_value_heads": 4, "head_dim": None, "attention_bias": True},
}
# as wide as the residual stream, which is all heads, but not of its channels
SQUARE = (
    *((f"self_attn.{name}.{kind}", 0) for name in ("q_proj", "q_norm") for kind in ("weight", "bias")),
    ("self_attn.o_proj.weight", 1),
)


GRANITE_SHARED = {
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    **{"intermediate_size": 24, "shared_intermediate_size": 80, "residual_multiplier": 0.5},
}
GRANITE_PLACES = Places(
    mlp_in="shared_mlp.input_linear",
    mlp_part=(1, 2),
    mlp_out="shared_mlp.output_linear",
    experts="block_sparse_moe.experts",
)


class Routed(torch.nn.Module):
    """A router that sends each token to two of the experts in `keep` only, from the definition.

    Args:
        router: its weights.
        keep: experts.
        how: (logits, mask, correction) -> (weight, what is chosen by), each [tokens, experts].
        renormalized: whether the weights of the two sum to 1.
    """

    def __init__(self, router, keep, how, renormalized):
        super().__init__()
        self.weight, self.bias = router.weight, getattr(router, "bias", None)
        self.correction = getattr(router, "e_score_correction_bias", 0)
        self.mask = torch.full((len(router.weight),), -torch.inf)
        self.mask[list(keep)] = 0
        self.how, self.renormalized, self.factor = (
            how,
            renormalized,
            getattr(router, "routed_scaling_factor", 1),
        )

    def forward(self, hidden, correction=None):
        correction = self.correction if correction is None else correction
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.bias)
        weight, choice = self.how(logits, self.mask, correction)
        chosen = choice.topk(2).indices
        best = weight.gather(1, chosen)
        if self.renormalized:
            best = best / best.sum(-1, keepdim=True)
        return logits, (best * self.factor).to(hidden.dtype), chosen


def softmax(logits, mask, _correction):
    probability = (logits + mask).softmax(-1)
    return probability, probability


def sigmoid(logits, mask, correction):
    weight = logits.sigmoid()
    return weight, weight + correction + mask


def route(how, renormalized, router="mlp.gate"):
    """Lets the router choose among some experts, two for each token."""
    block, _, name = router.rpartition(".")

    def choose(layer, keep):
        there = layer.get_submodule(block)
        if hasattr(there, name) and hasattr(there, "experts"):
            setattr(there, name, Routed(getattr(there, name), keep, how, renormalized))

    return choose


def _route_llama4(layer, keep):
    """Llama 4's router gives 0 to the experts that a token does not go to."""
    router = layer.feed_forward.router
    mask = torch.full((len(router.weight),), -torch.inf)
    mask[list(keep)] = 0

    def forward(hidden):
        logits = hidden @ router.weight.T + mask
        best, chosen = logits.topk(2)
        return torch.zeros_like(logits).scatter(1, chosen, best.sigmoid()), logits

    router.forward = forward


def _gpt_oss_expert(module, expert, x):
    """Weights are [in, out]; gates and neurons take turns, are clipped, and have biases."""
    up, up_bias, down, down_bias = (
        getattr(module, name)[expert].detach().double().numpy()
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    )
    both = x @ up + up_bias
    gate, up = np.minimum(both[0::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
    v = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return v, v @ down + down_bias


def _llama4_expert(module, expert, x):
    """Weights are [in, out]."""
    up, down = (
        getattr(module, key)[expert].detach().double().numpy() for key in ("gate_up_proj", "down_proj")
    )
    gate, up = np.split(x @ up, 2)
    v = gate / (1 + np.exp(-gate)) * up
    return v, v @ down


CASES = (
    Case("mixtral", {"num_local_experts": 4}, {"num_local_experts": 3}, route=route(softmax, True)),
    Case(
        "qwen3_moe",
        {**CHOICE, "mlp_only_layers": [2], "attention_bias": True},
        {"num_experts": 3, "moe_intermediate_size": 16},
        route=route(softmax, False),
    ),
    Case(
        "qwen2_moe",
        {**CHOICE, "mlp_only_layers": [2], "shared_expert_intermediate_size": 40},
        {"num_experts": 3, "moe_intermediate_size": 16},
        route=route(softmax, False),
    ),
    Case(
        "olmoe",
        {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
        {"num_experts": 3},
        route=route(softmax, False),
        square=SQUARE,
        **WIDE,
    ),
    Case(
        "flex_olmo",
        {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
        {"num_experts": 3},
        route=route(softmax, False),
        **OLMO2,
        **WIDE,
    ),
    Case(
        "granitemoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
        {"num_local_experts": 3},
        places=Places(experts="block_sparse_moe.experts"),
        route=route(softmax, True, "block_sparse_moe.router"),
    ),
    Case(
        "granitemoeshared",
        GRANITE_SHARED,
        {"intermediate_size": 16, "shared_intermediate_size": 48, "num_local_experts": 3},
        places=GRANITE_PLACES,
        route=route(softmax, True, "block_sparse_moe.router"),
    ),
    Case(
        "granitemoe_swa",
        {**GRANITE_SHARED, **WINDOWS, "layer_rope_theta": [10000.0, 0.0, 500.0]},
        {"intermediate_size": 16, "shared_intermediate_size": 48, "num_local_experts": 3},
        places=GRANITE_PLACES,
        route=route(softmax, True, "block_sparse_moe.router"),
    ),
    Case(
        "mellum",
        {**{**CHOICE, **WINDOWS, "attention_bias": True}, "mlp_layer_types": ["dense", "dense", "sparse"]},
        {"num_experts": 3, "moe_intermediate_size": 16},
        route=route(softmax, True),
    ),
    Case(
        "dots1",
        {
            **{**DENSE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
            **{"attention_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
        },
        {"n_routed_experts": 3},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "exaone_moe",
        {
            **{**CHOICE, "num_shared_experts": 2, "mlp_layer_types": ["dense", "dense", "sparse"]},
            **{**WINDOWS, "routed_scaling_factor": 1.5},
        },
        {"num_experts": 3},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "solar_open",
        {
            **{**DENSE, "n_routed_experts": 4, "intermediate_size": None},
            **{"attention_bias": True, "routed_scaling_factor": 1.5},
        },
        {"n_routed_experts": 3, "intermediate_size": None},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "glm4_moe",
        {
            **DENSE,
            "n_routed_experts": 4,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
        },
        {"n_routed_experts": 3},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "deepseek_v3",
        {**DENSE, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        {"n_routed_experts": 3, "num_key_value_heads": None},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "deepseek_v2",
        {
            **{**DENSE, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1},
            "routed_scaling_factor": 1.5,
        },
        {"n_routed_experts": 3, "num_key_value_heads": None},
        route=route(softmax, False),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    Case(
        "glm4_moe_lite",
        {**DENSE, **LATENT, "n_routed_experts": 4, "mlp_layer_types": ["dense", "dense", "sparse"]},
        {"n_routed_experts": 3, "num_key_value_heads": None},
        route=route(sigmoid, True),
        fixed=("expert_mlp", "moe_intermediate_size", 16),
    ),
    # its class sets the embedding of a padding token to 0 when it is loaded, whatever the checkpoint says
    Case("youtu", {**LATENT, "pad_token_id": None}, {"num_key_value_heads": None}),
    Case(
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {"num_local_experts": 3},
        places=Places(neurons_first=True),
        route=route(softmax, True, "mlp.router"),
        expert=_gpt_oss_expert,
    ),
    Case(
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"num_local_experts": 3},
        route=route(sigmoid, True),
        **WIDE,
    ),
    Case(
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 80,
            "intermediate_size": 24,
            "moe_layers": [0, 1],
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": 8,
            "attention_bias": True,
        },
        {"num_local_experts": 3, "intermediate_size_mlp": 64, "intermediate_size": None},
        places=Places(
            mlp_in="feed_forward.up_proj",
            mlp_out="feed_forward.down_proj",
            experts="feed_forward.experts",
            neurons_first=True,
            router="feed_forward.router",
        ),
        route=_route_llama4,
        expert=_llama4_expert,
        fixed=("expert_mlp", "intermediate_size", 16),
    ),
)
