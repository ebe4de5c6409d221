"""What a sparse teacher says, sorted and checked by the native op: to the bit what torch makes of it."""

import math

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import make_linear, threads
from minitron_kernels.ops.kl_loss import sparse_teacher

pytestmark = pytest.mark.native
N, V = 41, 60


def given(k, dtype, *, tau=1.0, missing=True, seed=0):
    """ids in any order, some -1, no two alike; log-probabilities; the tail at `tau`; which rows count."""
    g = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(N, V, generator=g, dtype=torch.float64) * 2).log_softmax(-1)
    ids = torch.rand(N, V, generator=g).argsort(-1)[:, :k].contiguous()
    if missing:
        ids = torch.where(torch.rand(N, k, generator=g) < 0.3, -1, ids)
    named = torch.zeros(N, V + 1, dtype=torch.bool).scatter(1, ids.where(ids >= 0, V), True)[:, :V]
    tail = (log_p / tau).masked_fill(named, -math.inf).logsumexp(-1)
    logprobs = log_p.gather(1, ids.clamp(min=0)).where(
        ids >= 0, math.nan
    )  # not looked at where there is no id
    return ids, logprobs.to(dtype), tail.to(dtype), torch.rand(N, generator=g) < 0.8


def both(ids, logprobs, tail, valid, untempered):
    """Of the native op, which has to accept it, and of torch."""
    *native, fits = torch.ops.minitron_kernels.sparse_outcomes(ids, logprobs, tail, valid, V, untempered)
    assert fits
    order, logprobs, tail = sparse_teacher._sorted_by_torch(ids, logprobs, tail, valid, V, untempered)
    return native, [order, torch.cat((logprobs, tail[:, None]), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0, 1, 5, V])
@pytest.mark.parametrize("tail_of", ["one", "tempered", "none"])
def test_as_torch_has_them(dtype, k, tail_of):
    for seed, some in enumerate((True, False)):
        ids, logprobs, tail, valid = given(k, dtype, tau=2.0 if tail_of == "tempered" else 1.0, seed=seed)
        if tail_of == "none":
            if k == 0:
                continue
            tail, ids[:, 0], logprobs[:, 0] = None, V - 1, -1.0
            ids[:, 1:][ids[:, 1:] == V - 1] = -1
            logprobs[0, 0] = -math.inf if k > 1 and (ids[0, 1:] >= 0).any() else -1.0
        valid = valid if some else None
        if valid is not None:  # what stands in rows that do not count may be anything
            ids[~valid], logprobs[~valid] = V + 7, math.nan
            if tail is not None:
                tail[~valid] = math.nan
        for count in (1, 3):
            with threads(count):
                native, expected = both(ids, logprobs, tail, valid, tail_of == "one")
            assert all(torch.equal(a, b) for a, b in zip(native, expected, strict=True))
            assert all(a.dtype == b.dtype for a, b in zip(native, expected, strict=True))


def test_all_tokens_as_ids_have_no_tail():
    ids, logprobs, tail, _ = given(V, torch.float32, missing=False)
    tail[:] = -30.0  # what rounding has left
    native, expected = both(ids, logprobs, tail, None, True)
    assert torch.equal(native[1], expected[1]) and (native[1][:, -1] == -math.inf).all()


def test_wrong_ones_do_not_fit():
    """Whatever torch refuses, in the first row and in the last; at what it just accepts both agree."""
    log_slack = math.log1p(0.01)
    for row in (0, N - 1):
        for change in (
            {"ids": V}, {"ids": -2}, {"twice": True}, {"logprobs": math.nan}, {"logprobs": math.inf},
            {"logprobs": 2 * log_slack}, {"tail": math.nan}, {"tail": 0.1}, {"tail": -math.inf},
        ):  # fmt: skip
            ids, logprobs, tail, _ = given(4, torch.float64, missing=False)
            if "ids" in change:
                ids[row, 2] = change["ids"]
            if "twice" in change:
                ids[row, 3], logprobs[row, 3] = ids[row, 0], logprobs[row, 0]
            if "logprobs" in change:
                logprobs[row, 1] = change["logprobs"]
            if "tail" in change:
                tail[row] = change["tail"]
            arguments = (ids, logprobs, tail, None, V, True)
            assert not torch.ops.minitron_kernels.sparse_outcomes(*arguments)[-1], change
            with pytest.raises(ValueError, match=f"in row {row}"):
                sparse_teacher._sorted_by_torch(*arguments)
            valid = torch.arange(N) != row  # and fit where the row does not count
            assert torch.ops.minitron_kernels.sparse_outcomes(ids, logprobs, tail, valid, V, True)[-1]
    ids, logprobs, tail, _ = given(4, torch.float64, missing=False)
    for tails, untempered, sampled in (
        (torch.full_like(tail, math.log(V) + 0.02), False, False),
        (torch.full_like(tail, math.nan), False, False),
        (None, True, True),
    ):
        if sampled:
            logprobs[3] = -math.inf
        arguments = (ids, logprobs, tails, None, V, untempered)
        assert not torch.ops.minitron_kernels.sparse_outcomes(*arguments)[-1]
        with pytest.raises(ValueError, match="in row"):
            sparse_teacher._sorted_by_torch(*arguments)


def test_any_dtype_and_strides():
    """int32 ids, bf16 log-probabilities, columns of a wider tensor, more dimensions: as plain copies."""
    hidden, head = make_linear(N, 16, 16, V, torch.float32)[:2]
    ids, logprobs, tail, valid = given(6, torch.float32, missing=False)
    logprobs = logprobs.bfloat16()
    tail = torch.log1p(-logprobs.float().exp().sum(-1))
    expected = mk.linear_sparse_kl_loss(hidden, head, ids, logprobs.float(), tail, mask=valid)
    wide, tall = torch.full((N, 12), -7), torch.full((6, N), math.nan, dtype=torch.bfloat16)
    wide[:, ::2], tall[:] = ids, logprobs.T
    for some_ids, some in ((wide[:, ::2], tall.T), (ids.int(), logprobs)):
        actual = mk.linear_sparse_kl_loss(hidden, head, some_ids, some, tail, mask=valid)
        assert torch.equal(actual, expected)
    deep = mk.linear_sparse_kl_loss(
        hidden[None], head, ids[None].int(), logprobs[None], tail[None], mask=valid[None]
    )
    assert torch.equal(deep, expected)


def test_opcheck():
    ids, logprobs, tail, valid = given(5, torch.float32)
    torch.library.opcheck(
        sparse_teacher._sorted_outcomes.op, (ids, logprobs.nan_to_num(-9.0), tail, valid, V, True)
    )


@pytest.mark.parametrize("name", ["logprobs", "log_tail"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_a_teacher_that_learns_is_refused(name, from_logits):
    """As dense ones are: no gradient flows to it, and silence would hide that."""
    hidden, head = make_linear(N, 16, 16, V, torch.float32)[:2]
    ids, logprobs, tail, _ = given(6, torch.float32, missing=False)
    of_teacher = {"ids": ids, "logprobs": logprobs, "log_tail": tail}
    of_teacher[name].requires_grad_()
    if name == "log_tail":
        of_teacher["log_tail"] = {1.0: tail}

    def call():
        if from_logits:
            return mk.sparse_kl_loss(hidden @ head.T, **of_teacher)
        return mk.linear_sparse_kl_loss(hidden, head, **of_teacher)

    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        call()
    with torch.no_grad():
        call()
