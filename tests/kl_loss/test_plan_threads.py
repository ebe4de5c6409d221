"""Neither threads nor caches change a bit: chunks of tokens are chosen without them, within any budget."""

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import force_operands, make_linear, threads
from minitron_kernels.ops.kl_loss import plan_cpu
from minitron_kernels.ops.kl_loss.blocks_cpu import Caches
from minitron_kernels.ops.kl_loss.planner_cpu import Planner

pytestmark = pytest.mark.native
KIB, MIB = 1 << 10, 1 << 20
COUNTS = (1, 2, 5, 16, 31, 64, 128)
# of small and of large cores; the last has no L3
CACHES = (Caches(), Caches(32 * KIB, 256 * KIB, 8 * MIB), Caches(48 * KIB, 2 * MIB, 300 * MIB), Caches(l3=0))
PROBLEM = {
    "dtype": torch.bfloat16, "grad_hidden": True, "grad_head": True, "grad_bias": False,
    "grad_head_accumulator": False, "divergence_needs_kl": False, "metrics": False, "outcomes": 0,
    "lent": False,
}  # fmt: skip
SHAPES = [(1, 1000, 64, 80), (512, 32768, 1024, 1280), (4096, 131072, 2048, 2560), (1100, 2100, 64, 96)]
CASES = [
    *((shape, "auto") for shape in SHAPES),
    (SHAPES[1], "store"),
    (SHAPES[3], "store"),
    (SHAPES[3], "recompute"),
]


def planned(shape, budget, count=1, caches=CACHES[0], *, schedule="auto", engine="f32", **changes):
    """The plan of a machine with so many threads and these caches; None where the budget is too small."""
    given = PROBLEM | changes
    first = [given.pop(name) for name in (*PROBLEM,)[:6]]
    try:
        return plan_cpu._plan(*shape, *first, schedule, budget, engine, *given.values(), count, caches)
    except ValueError as error:
        assert "too small" in str(error)
        return None


def budgets_of(shape, schedule, **changes):
    """From what is just too small, in steps that fall between all sizes, to what is plenty."""
    with pytest.raises(ValueError, match="would do is") as error:
        mk.plan_linear_kl_loss(*shape, schedule=schedule, workspace_bytes=0, engine="f32", **changes)
    least = int(str(error.value).split("would do is ")[1].split()[0])
    return [least - 1, *(int(least * factor) for factor in (1, 1.3, 1.9, 2.7, 4.1, 7.3, 13, 40)), 512 * MIB]


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_chunks_are_those_of_one_thread(shape, schedule):
    seen = set()
    for budget in budgets_of(shape, schedule):
        alone = planned(shape, budget, schedule=schedule)
        for number, count in enumerate(COUNTS):
            caches = CACHES[number % len(CACHES)]
            plan = planned(shape, budget, count, caches, schedule=schedule)
            assert (plan is None) == (alone is None), (budget, count, caches)
            if plan is None:
                continue
            assert (plan.chunk_rows, plan.tile) == (alone.chunk_rows, alone.tile), (budget, count, caches)
            assert plan.workspace_bytes <= budget and 1 <= plan.threads <= count
            seen.add((plan.chunk_rows, plan.threads, plan.schedule))
    if shape[0] > 512:
        assert len({rows for rows, *_ in seen}) > 2  # the budgets do decide
        assert any(1 < number < 128 for _, number, _ in seen)


@pytest.mark.parametrize("changes", [
    {"grad_head": False, "schedule": "recompute"}, {"grad_head_accumulator": True}, {"outcomes": 65},
    {"metrics": True, "divergence_needs_kl": True}, {"grad_hidden": False}, {"engine": "portable_amx"},
    {"dtype": torch.float32, "lent": True}, {"grad_hidden": False, "grad_head": False},
])  # fmt: skip
def test_of_other_problems(changes):
    shape = (1500, 20000, 256, 0 if "outcomes" in changes else 320)
    for budget in (6 * MIB, 13 * MIB, 40 * MIB, 170 * MIB):
        plans = [planned(shape, budget, count, CACHES[count % 4], **changes) for count in (1, 2, 16, 64, 128)]
        assert len({None if plan is None else plan.chunk_rows for plan in plans}) == 1


@pytest.mark.parametrize(("dtype", "engine"), [(torch.float32, None), (torch.bfloat16, "portable_bf16")])
def test_bits(monkeypatch, dtype, engine):
    """All of a call's, where a budget makes several chunks and threads have no room."""
    force_operands(monkeypatch, engine)
    shape = (200, 1200, 32, 40)
    hidden, head, *teacher = make_linear(*shape[:1], *shape[2:], shape[1], dtype)
    bias, chunks = torch.linspace(-1, 1, shape[1]), set()
    for budget in (400 * KIB, 600 * KIB, 1100 * KIB, 3 * MIB):
        results = []
        for count in (1, 3, 24):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, head, bias)]
            with threads(count):
                loss = mk.linear_kl_loss(
                    leaves[0], leaves[1], *teacher, student_bias=leaves[2], workspace_bytes=budget
                )
                loss.backward()
                plan = mk.plan_linear_kl_loss(
                    *shape, dtype=dtype, engine=engine, grad_bias=True, workspace_bytes=budget
                )
            chunks.add(plan.num_chunks)
            results.append([loss.detach(), *(x.grad for x in leaves)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), budget
    assert len(chunks) > 1


def test_smaller_groups_make_room_for_logits(monkeypatch):
    """What the operands of dX leave of a budget keeps logits; a smaller group of them leaves more."""
    shape, budget, every = (4096, 131072, 2048, 2560), 64 * MIB, Planner.tile_groups
    plan = planned(shape, budget, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "tile_groups", lambda self, rows: every(self, rows)[:1])
        plan_cpu._plan.cache_clear()
        largest = planned(shape, budget, 2)
        plan_cpu._plan.cache_clear()
    assert plan.tile_group < largest.tile_group and plan.flops < largest.flops


def test_few_threads_where_there_is_room_for_few():
    """A budget that one thread can work with is not refused on a machine of many; the plan says so."""
    least = budgets_of(SHAPES[1], "recompute")[0] + 1
    assert planned(SHAPES[1], least - 1, 128, schedule="recompute") is None
    plan = planned(SHAPES[1], least, 128, schedule="recompute")
    assert plan.threads == 1 and "1 thread(s)" in plan.explain()
    plenty = planned(SHAPES[1], 4 << 30, 128, schedule="recompute")
    assert plenty.threads == 128 and plenty.tile_group >= 128


@pytest.mark.parametrize("schedule", ["auto", "store", "recompute"])
@pytest.mark.parametrize("shape", [(5, 0, 64, 80), (0, 0, 64, 80), (0, 1000, 64, 80)])
def test_nothing_to_store_fits(shape, schedule):
    """No vocabulary, or no tokens: a plan, and not an error that names less than the budget as too much."""
    plan = planned(shape, MIB, 2, schedule=schedule)
    assert plan.workspace_bytes <= MIB and schedule in ("auto", plan.schedule)
    assert plan.schedule != "store" or plan.stored_share == 1.0
