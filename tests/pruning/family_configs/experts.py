"""Families with experts."""

import torch

from pruning.family_case import Case


class Routed(torch.nn.Module):
    """A router that sends tokens to the experts in `keep` only, from the definition."""

    def __init__(self, router, keep, top_k, renormalized):
        super().__init__()
        self.weight, self.top_k, self.renormalized = router.weight, top_k, renormalized
        self.mask = torch.full((len(router.weight),), -torch.inf)
        self.mask[list(keep)] = 0

    def forward(self, hidden):
        scores = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T + self.mask
        probability = scores.float().softmax(-1)
        best, chosen = probability.topk(self.top_k)
        if self.renormalized:
            best = best / best.sum(-1, keepdim=True)
        return scores, best.to(hidden.dtype), chosen


def softmax_route(renormalized):
    """Lets the softmax router at layer.mlp.gate choose among some experts, two for each token."""

    def route(layer, keep):
        layer.mlp.gate = Routed(layer.mlp.gate, keep, 2, renormalized)

    return route


CASES = (
    Case(
        "mixtral",
        {"num_local_experts": 4},
        {"num_local_experts": 3},
        route=softmax_route(True),
    ),
    Case(
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [2],
            "attention_bias": True,
        },
        {"num_experts": 3, "moe_intermediate_size": 16},
        route=softmax_route(False),
    ),
)
