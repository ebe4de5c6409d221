"""The calls whose overhead is measured, each beside the plain torch calls that do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import minitron_kernels as mk

Call = Callable[[], object]
IDS = 16  # of a sparse teacher


@dataclass(frozen=True)
class Row:
    """A call of the library, the plain calls beside it, and what both give, for the check before."""

    op: str
    mode: str
    plain_label: str
    ours: Call
    plain: Call
    results: Callable[[], tuple[list[Tensor], list[Tensor]]]


def rows(sizes: dict[str, int]) -> list[Row]:
    """All of them at N tokens, V entries, H and Ht hidden columns, C channels."""
    N, V, H, Ht, C = (sizes[name] for name in ("N", "V", "H", "Ht", "C"))
    g = torch.Generator().manual_seed(0)
    x, w, y, u = (torch.randn(shape, generator=g) for shape in ((N, H), (V, H), (N, Ht), (V, Ht)))
    w, u = w / H**0.5, u / Ht**0.5
    logits, teacher = x @ w.T, y @ u.T
    log_p, ids = teacher.log_softmax(-1).topk(min(IDS, V))
    tail = torch.log1p(-log_p.exp().sum(-1))

    def plain_kl(student: Tensor, other: Tensor) -> Tensor:
        return F.kl_div(
            student.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True
        )

    def plain_sparse(hidden: Tensor, head: Tensor) -> Tensor:
        log_q = F.linear(hidden, head).log_softmax(-1).gather(-1, ids)
        rest = torch.log1p(-log_q.exp().sum(-1))
        return ((log_p.exp() * (log_p - log_q)).sum(-1) + tail.exp() * (tail - rest)).mean()

    made: list[Row] = []

    def loss(
        op: str, label: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], *of: Tensor
    ) -> None:
        for backward in (True, False):
            leaves = [one.clone().requires_grad_(backward) for one in of]

            def step(function: Callable[..., Tensor], leaves=leaves, backward=backward) -> Tensor:
                if not backward:
                    with torch.no_grad():
                        return function(*leaves)
                value = function(*leaves)
                value.backward()
                return value

            def cleared(function: Callable[..., Tensor], leaves=leaves, step=step) -> Call:
                def call() -> None:
                    for leaf in leaves:
                        leaf.grad = None
                    step(function)

                return call

            def results(leaves=leaves, step=step, backward=backward) -> tuple[list[Tensor], list[Tensor]]:
                both = []
                for function in (ours, plain):
                    for leaf in leaves:
                        leaf.grad = None
                    value = step(function)
                    both.append([value.detach(), *(leaf.grad for leaf in leaves if backward)])
                return both[0], both[1]

            mode = "forward + backward" if backward else "no gradient"
            made.append(Row(op, mode, label, cleared(ours), cleared(plain), results))

    loss(
        "kl_loss",
        "log_softmax twice, kl_div",
        lambda s: mk.kl_loss(s, teacher),
        lambda s: plain_kl(s, teacher),
        logits,
    )
    loss(
        "linear_kl_loss",
        "linear, log_softmax twice, kl_div",
        lambda a, b: mk.linear_kl_loss(a, b, y, u),
        lambda a, b: plain_kl(F.linear(a, b), F.linear(y, u)),
        x,
        w,
    )
    loss(
        "linear_sparse_kl_loss",
        "linear, log_softmax, gather, sums",
        lambda a, b: mk.linear_sparse_kl_loss(a, b, ids, log_p, tail),
        plain_sparse,
        x,
        w,
    )
    made += [*_gather(C, g), *_importance(N, C, g), *_optimizer(C, g)]
    return made


def _gather(C: int, g: torch.Generator) -> list[Row]:
    weight, out = torch.randn(C, C, generator=g), torch.empty(C // 2, C // 2)
    keep = torch.randperm(C, generator=g)[: C // 2].sort()[0]
    index = mk.ChannelIndex(keep, C)

    def plain() -> Tensor:
        return torch.index_select(weight.index_select(0, keep), 1, keep, out=out)

    def row(mode: str, ours: Callable[[], Tensor]) -> Row:
        return Row(
            "gather_channels",
            mode,
            "index_select twice, out=",
            ours,
            plain,
            lambda: ([ours().clone()], [plain().clone()]),
        )

    return [
        row("a ChannelIndex, out=", lambda: mk.gather_channels(weight, index, index, out=out)),
        row("tensors, to be checked", lambda: mk.gather_channels(weight, keep, keep)),
    ]


def _importance(N: int, C: int, g: torch.Generator) -> list[Row]:
    x = torch.randn(1, N, C, generator=g)
    state, fresh = mk.ImportanceState(C), mk.ImportanceState(C)
    sums, squares = torch.zeros(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)

    def plain() -> None:
        mean = x.abs().mean(1).double()
        sums.add_(mean.sum(0))
        squares.add_(mean.square().sum(0))

    def results() -> tuple[list[Tensor], list[Tensor]]:
        mk.accumulate_importance_(fresh, x)
        mean = x.double().abs().mean(1)
        return [fresh.sums[0], fresh.squares[0]], [mean.sum(0), mean.square().sum(0)]

    def ours() -> None:
        mk.accumulate_importance_(state, x)

    return [
        Row("accumulate_importance_", "mean", "abs, mean, sums of it and of its square", ours, plain, results)
    ]


def _optimizer(C: int, g: torch.Generator) -> list[Row]:
    keep = torch.randperm(C, generator=g)[: C // 2].sort()[0]
    index = mk.ChannelIndex(keep, C)
    old = torch.nn.Parameter(torch.randn(C, C, generator=g))
    new = torch.nn.Parameter(old.detach()[keep][:, keep])
    optimizer = torch.optim.AdamW([old])
    old.grad = torch.randn(C, C, generator=g)
    optimizer.step()
    state = dict(optimizer.state[old])

    def ours() -> None:
        optimizer.param_groups[0]["params"][0] = old
        optimizer.state.clear()
        optimizer.state[old] = dict(state)
        mk.gather_optimizer_state_(optimizer, [(old, new, index, index, None)])

    def plain() -> list[Tensor]:
        return [state[name].index_select(0, keep).index_select(1, keep) for name in ("exp_avg", "exp_avg_sq")]

    def results() -> tuple[list[Tensor], list[Tensor]]:
        ours()
        return [optimizer.state[new][name] for name in ("exp_avg", "exp_avg_sq")], plain()

    label = "index_select twice, of both moments"
    return [Row("gather_optimizer_state_", "AdamW, one parameter", label, ours, plain, results)]
