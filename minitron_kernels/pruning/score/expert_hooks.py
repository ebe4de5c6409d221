"""Scores experts whose weights are stacked in one module, forward(hidden, top_k_index, top_k_weights).

Such a module (MixtralExperts, Qwen3MoeExperts) calls no nn.Linear that could be hooked, and none of its
implementations, "eager", "grouped_mm" and "batched_mm", shows its intermediate results. So a hook on the
module runs the experts a second time on the same tokens, expert by expert, and leaves the model's own output
as it is.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_kernels.ops.importance.moments import Moments, moments_of, num_moments, rows_of
from minitron_kernels.pruning.families.wrappers import fetched
from minitron_kernels.pruning.score.recorder import Recorder

_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
# of experts with a gate, and of those without
GATED, UNGATED = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")


class ExpertsHook:
    """A forward hook on the module of a layer's experts.

    It costs as much as the experts' own forward pass; two thirds of that (gate_up_proj without down_proj)
    where only "expert_mlp" is scored. One expert's tokens are in memory at a time. One host sync per layer.

    Args:
        recorder: what the scores are added to.
        position: of the layer among those that have experts.
        transposed: whether weights are [experts, in, out], not [experts, out, in].

    Where the router's weights multiply the experts' input (Llama 4), each expert gets all tokens, with zeros
    for those that are not routed to it. Then route() must be a forward hook on the router, whose logits say
    which those are. The router's weight is part of the expert's output already, so both kinds of expert
    scores are the norm of that.
    """

    def __init__(self, recorder: Recorder, position: int, transposed: bool = False) -> None:
        self.recorder, self.position, self.transposed = recorder, position, transposed
        self._routing: Tensor | None = None
        self.scores_experts = "experts" in recorder.scores.axes
        self.scores_neurons = "expert_mlp" in recorder.scores.axes
        self.uses_gates = recorder.scores.options.expert_score == "reap"

    def route(self, router: Any, _args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Takes the router's choice: the experts with the top_k largest logits [tokens, experts]."""
        if self.recorder.listens:
            self._routing = output[1].detach().topk(router.top_k, dim=-1).indices

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        """Scores the tokens that the module has just seen."""
        if self.recorder.listens:
            with fetched(module):
                self._score(module, args, kwargs)

    def _score(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number, gates = module.down_proj.shape[0], None
        if self._routing is not None:
            index, self._routing = self._routing, None
            hidden = args[0].detach().reshape(number, -1, args[0].shape[-1])  # of each expert: weight · token
        else:
            given = [*args, *(kwargs[name] for name in _ARGUMENTS[len(args) :])]
            hidden, index, gates = (x.detach() for x in given[:3])
            hidden = hidden.reshape(1, -1, hidden.shape[-1]).expand(number, -1, -1)
        routed = _Routed(hidden[0], index, self.recorder.tokens, number)
        moment_flags = self.recorder.moment_flags("expert_mlp") if self.scores_neurons else 0
        gate_of = None
        if self.uses_gates and gates is not None:
            gate_of = gates.reshape(-1)[routed.order].double()
        values: list[Tensor | None] = []
        sums: list[Tensor] = []
        for expert, (begin, end) in enumerate(routed.spans):
            if begin == end:
                values.append(None)
                sums.append(hidden.new_zeros((), dtype=torch.float64))
                continue
            rows = hidden[expert][routed.order[begin:end] // index.shape[-1]]
            neurons = self._neurons(module, rows, expert)
            if self.scores_neurons:
                borders = F.pad(routed.counts[expert].cumsum(0), (1, 0))
                moments = moments_of(neurons, None, borders, 0, moment_flags, self.recorder.backend)
                values.append(moments.values)
            if self.scores_experts:
                output = self._product(module, neurons, "down_proj", expert)
                norms = rows_of(output, None, self.recorder.backend).double()
                sums.append((norms if gate_of is None else norms * gate_of[begin:end]).sum())
        if self.scores_experts:
            self.recorder.experts(self.position, torch.stack(sums), routed.counts.sum(1))
        if self.scores_neurons:
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            shape = (
                num_moments(moment_flags),
                self.recorder.tokens.num_sequences,
                module.down_proj.shape[1 if self.transposed else 2],
            )
            none = hidden.new_zeros(shape, dtype=wide)
            whole = torch.stack([none if part is None else part for part in values], dim=2)
            moments = Moments(whole.flatten(2), routed.counts.T.contiguous(), moment_flags)
            self.recorder.neurons(self.position, moments)

    def _neurons(self, module: Any, rows: Tensor, expert: int) -> Tensor:
        """An expert's activated neurons, of rows [n, in]."""
        if hasattr(module, GATED[0]):
            return _gated(module, self._product(module, rows, GATED[0], expert))
        return module.act_fn(self._product(module, rows, UNGATED[0], expert))

    def _product(self, module: Any, rows: Tensor, name: str, expert: int) -> Tensor:
        """An expert's projection of rows [n, in], with its bias where the module has one."""
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        bias = None if bias is None else bias[expert]
        return F.linear(rows, weight.T if self.transposed else weight, bias)


class _Routed:
    """The (token, expert) pairs of a layer, ordered by expert, then by sequence.

    Attributes:
        order: [T·K], indices into the flattened top_k_index; those of invalid pairs come last.
        counts: int64 [experts, sequences].
        spans: (begin, end) in `order` of each expert.
    """

    def __init__(self, hidden: Tensor, index: Tensor, tokens: Any, experts: int) -> None:
        device, sequences = hidden.device, tokens.num_sequences
        expert = index.reshape(-1).long()
        pair_owner = tokens.owners(device).repeat_interleave(index.shape[-1])
        valid = (expert >= 0) & (expert < experts)  # others are of another expert-parallel rank
        mask, _ = tokens.on(device)
        if mask is not None:
            valid &= mask.reshape(-1).repeat_interleave(index.shape[-1])
        bins = experts * sequences
        key = torch.where(valid, expert * sequences + pair_owner, bins)
        self.order = key.argsort(stable=True)
        self.counts = torch.bincount(key, minlength=bins + 1)[:bins].view(experts, sequences)
        ends = [0, *self.counts.sum(1).cumsum(0).tolist()]
        self.spans = list(itertools.pairwise(ends))


def _gated(module: Any, gate_up: Tensor) -> Tensor:
    """The activated neurons, computed as the module does."""
    if hasattr(module, "_apply_gate"):  # which transformers' grouped_mm and batched_mm call
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up
