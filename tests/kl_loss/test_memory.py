"""What linear_kl_loss allocates and multiplies, and the planner's word for it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import minitron_kernels as mk
from kl_loss.problems import force_operands, make_linear, threads
from minitron_kernels import _workspace
from tools.poison import UNGUARDED

pytestmark = pytest.mark.native
MIB = 1 << 20


def allocations(call):
    """Bytes of each allocation that torch made during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    # the profiler's own memory records
    events = prof.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("schedule", ["store", "recompute", "forward"])
def test_no_tensor_of_logits(monkeypatch, schedule):
    """Every allocation is an output or the planned workspace; none is [N, V]."""
    monkeypatch.setattr(_workspace, "borrow", UNGUARDED)
    N, V = 512, 16384
    tensors = make_linear(N, 32, 48, V, torch.bfloat16)
    mk.release_workspaces()
    budget = 24 * MIB if schedule == "store" else 8 * MIB
    if schedule != "forward":
        tensors[0].requires_grad_(), tensors[1].requires_grad_()
    options = {} if schedule == "forward" else {"schedule": schedule}
    plan = mk.plan_linear_kl_loss(
        N, V, 32, 48, workspace_bytes=budget, grad_hidden=schedule != "forward",
        grad_head=schedule != "forward", **options,
    )  # fmt: skip
    assert plan.schedule == schedule and plan.workspace_bytes <= budget < N * V * 4

    def call():
        loss = mk.linear_kl_loss(*tensors, workspace_bytes=budget, **options)
        if schedule != "forward":
            loss.backward()

    made = allocations(call)
    outputs = [x.numel() * x.element_size() for x in tensors[:2]] if schedule != "forward" else []
    assert max(made) == max(plan.total_bytes, *outputs, 0)
    small = N * 8 * 4  # row losses, stats and the like
    assert sum(made) <= plan.total_bytes + sum(outputs) + 8 * small
    assert mk.workspace_bytes_held() == plan.total_bytes
    again = allocations(call)
    assert sum(again) <= sum(outputs) + 8 * small  # the workspace is kept
    mk.release_workspaces()
    assert mk.workspace_bytes_held() == 0


def test_the_allocation_counter_sees_logits():
    """The test above can fail: the reference does make logits."""
    tensors = make_linear(256, 32, 48, 4096, torch.float32)
    with torch.no_grad():
        made = allocations(lambda: mk.linear_kl_loss(*tensors, backend="reference"))
    assert max(made) >= 256 * 4096 * 4


def test_memory_is_flat_in_the_number_of_tokens():
    for schedule, budget in (("store", 512 * MIB), ("recompute", 64 * MIB)):
        for N in (512, 1024, 2048, 8192):
            for H, Ht in ((2048, 2560), (4096, 5120)):
                for engine in ("bf16", "f32"):
                    plan = mk.plan_linear_kl_loss(
                        N, 131072, H, Ht, schedule=schedule, workspace_bytes=budget, engine=engine
                    )
                    assert plan.workspace_bytes <= budget
                    if schedule == "recompute":
                        assert N * H * 4 <= plan.accumulator_bytes < 1.2 * N * H * 4  # dX in fp32
                        assert N > 2048 or plan.total_bytes <= 160 * MIB
                    else:
                        head = 131072 * H * 4 if plan.num_chunks > 1 else 0
                        assert plan.part_bytes[-1] == head


def test_the_head_accumulator_is_avoided():
    one_chunk = mk.plan_linear_kl_loss(256, 131072, 2048, 2560)
    assert one_chunk.num_chunks == 1 and one_chunk.part_bytes[-1] == 0
    for schedule in ("store", "recompute", "auto"):
        for jsd in (False, True):
            lent = mk.plan_linear_kl_loss(
                4096,
                131072,
                2048,
                2560,
                grad_head_accumulator=True,
                schedule=schedule,
                divergence_needs_kl=jsd,
            )
            assert lent.part_bytes[-1] == 0
            # logits for the sums, and once more in the backward
            assert lent.num_gemms == 6 + 2 * jsd
            if schedule == "store":
                assert lent.num_chunks > 1
                assert lent.flops >= 2 * 4096 * 131072 * ((2 + jsd) * (2048 + 2560) + 2 * 2048)
    assert mk.plan_linear_kl_loss(4096, 131072, 2048, 2560, dtype=torch.float32).part_bytes[-1] == 0
    assert mk.plan_linear_kl_loss(4096, 131072, 2048, 2560, grad_head=False).part_bytes[-1] == 0


def test_memory_kept_by_inference_mode_is_written_by_training():
    mk.release_workspaces()
    device = torch.device("cpu")
    with torch.inference_mode(), UNGUARDED(64, device):
        pass
    with UNGUARDED(64, device) as kept:
        kept.zero_()
    mk.release_workspaces()


def test_plan_beyond_32_bits():
    """N * V = 2^31 and more: bytes and flops neither wrap nor lose their sign."""
    plan = mk.plan_linear_kl_loss(1 << 20, 131072, 4096, 5120, schedule="recompute")
    assert plan.flops == 2 * (1 << 20) * 131072 * (2 * (4096 + 5120) + 2 * 4096)
    assert all(part >= 0 for part in plan.part_bytes) and plan.num_chunks * plan.chunk_rows >= 1 << 20
    stored = mk.plan_linear_kl_loss(32768, 131072, 64, 64, workspace_bytes=1 << 40, schedule="store")
    assert stored.part_bytes[0] == 2 * 4096 * 131072 * 4 > 1 << 31  # one chunk's offsets pass 32 bits


def test_offsets_beyond_32_bits():
    """A store chunk whose panels lie more than 2^31 bytes apart agrees with a small-budget call."""
    V, H = 262144, 2
    tensors = make_linear(1088, H, H, V, torch.float32)
    plan = mk.plan_linear_kl_loss(
        1088, V, H, H, dtype=torch.float32, workspace_bytes=3 << 30, schedule="store"
    )
    assert plan.num_chunks == 1 and plan.part_bytes[0] > 1 << 31
    results = []
    for schedule, budget in (("store", 3 << 30), ("recompute", 64 * MIB)):
        hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
        mk.linear_kl_loss(hidden, head, *tensors[2:], schedule=schedule, workspace_bytes=budget).backward()
        results.append((hidden.grad, head.grad))
    mk.release_workspaces()
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-9)


def test_explain():
    text = mk.plan_linear_kl_loss(1024, 131072, 2048, 2560).explain()
    for word in (
        "store: 4 GEMMs",
        "chunk(s) of",
        "head gradient, accumulated",
        "workspace_bytes",
        "1024.0 MiB",
    ):
        assert word in text
    assert "6 GEMMs" in mk.plan_linear_kl_loss(64, 100, 8, 8, schedule="recompute").explain()
    with pytest.raises(ValueError, match="schedule"):
        mk.plan_linear_kl_loss(64, 100, 8, 8, schedule="forward")


@pytest.mark.parametrize("engine", ["f32", "portable_bf16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_plan_counts_what_is_multiplied(monkeypatch, engine, divergence):
    """Flops, with sizes that nothing pads; bytes are the layout's own, which the kernel checks."""
    dtype = {"f32": torch.float32, "portable_bf16": torch.bfloat16}[engine]
    force_operands(monkeypatch, engine)
    N, H, Ht, V = 128, 64, 128, 2048
    count = torch.ops.minitron_kernels.count_gemm_flops
    # with one thread, most tiles are kept but not all, in two chunks
    partly = {"f32": 1300 << 10, "portable_bf16": 1180 << 10}[engine]
    tensors = make_linear(N, H, Ht, V, dtype)
    cases = [  # schedule, budget, whether the student learns, whether a buffer is lent
        ("store", 64 << 20, True, False),
        ("store", partly, True, False),
        ("store", partly, True, True),
        ("recompute", 64 << 20, True, False),
        ("recompute", 64 << 20, True, True),
        ("auto", 64 << 20, False, False),
    ]
    seen = set()
    with threads(1):
        for schedule, budget, learns, lent in cases:
            plan = mk.plan_linear_kl_loss(
                N,
                V,
                H,
                Ht,
                dtype=dtype,
                grad_hidden=learns,
                grad_head=learns,
                grad_head_accumulator=lent,
                divergence_needs_kl=divergence == "jsd",
                schedule=schedule,
                workspace_bytes=budget,
                engine=engine,
            )
            seen.add((plan.schedule, lent, plan.stored_tiles < V // plan.tile))
            hidden, head = (x.detach().requires_grad_(learns) for x in tensors[:2])
            buffer = torch.zeros(V, H) if lent else None
            count(True)
            loss = mk.linear_kl_loss(
                hidden,
                head,
                *tensors[2:],
                divergence=divergence,
                schedule=schedule,
                workspace_bytes=budget,
                grad_head_accumulator=buffer,
            )
            if learns:
                loss.backward()
            assert count(False) == plan.flops, (schedule, budget, learns, lent)
    assert {("store", False, False), ("store", False, True), ("store", True, True)} <= seen
