"""Calls of every CPU op on tensors at guard pages, of odd sizes, for each SIMD level, dtype and engine.

python -m tools.guarded_calls at_end            # before each call prints its name
python -m tools.guarded_calls at_start
python -m tools.guarded_calls beyond            # reads one element beyond a tensor, on purpose
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor

import minitron_kernels as mk
from minitron_kernels import _native
from minitron_kernels.ops.kl_loss import linear_cpu, plan_cpu
from tools.guard_pages import GuardPages

OPS = torch.ops.minitron_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# not a multiple of anything, around vectors, panels and tiles: tokens, both hidden sizes, vocabulary
SIZES = [(1, 1, 1, 1), (3, 5, 7, 11), (17, 33, 65, 130), (67, 66, 31, 65)]
Call = Callable[[GuardPages], "list[Tensor]"]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def guarded(pages: GuardPages, *tensors: Tensor, gap: int = 0) -> list[Tensor]:
    return [pages.rows(x, gap) if gap and x.dim() > 1 else pages.copy(x) for x in tensors]


def engines(dtype: torch.dtype) -> list[str]:
    """Those that multiply operands of this dtype here, exactly."""
    if dtype != torch.bfloat16:
        return ["f32"]
    own = [name for name in ("amx", "avx512_bf16") if not OPS.why_no_engine(name)]
    libtorch = ["bf16"] if _native.build_info()["bf16_microkernel"] else []
    return ["f32", "portable_bf16", "portable_amx", "portable_avx512_bf16", *libtorch, *own]


def dense(size: tuple[int, ...], dtype: torch.dtype, engine: str, gap: int, **options: object) -> Call:
    """linear_kl_loss of a plain teacher: loss per token, and all gradients."""
    N, H, Ht, V = size

    def call(pages: GuardPages) -> list[Tensor]:
        operands = (random(N, H, dtype=dtype), random(V, H, dtype=dtype))
        teacher = (random(N, Ht, dtype=dtype), random(V, Ht, dtype=dtype))
        x, w, y, u = guarded(pages, *operands, *teacher, gap=gap)
        bias, other, mask, labels = guarded(
            pages, random(V), random(V).flip(0), torch.arange(N) % 5 != 2, torch.arange(N) % V
        )
        leaves = [one.requires_grad_() for one in (x, w, bias)]
        with pages.results(), forced(engine):
            record = mk.linear_kl_loss(
                x, w, y, u, student_bias=bias, teacher_bias=other, mask=mask, labels=labels, ce_weight=0.5,
                return_parts=True, **options,  # type: ignore[arg-type]
            )  # fmt: skip
            record.loss.sum().backward()
            with torch.no_grad():
                alone = mk.linear_kl_loss(x, w, y, u, mask=mask, **options)  # type: ignore[arg-type]
        return [record.loss.detach(), alone, *(leaf.grad for leaf in leaves)]

    return call


def sparse(size: tuple[int, ...], dtype: torch.dtype, engine: str, gap: int, schedule: str) -> Call:
    """linear_sparse_kl_loss and sparse_kl_loss."""
    N, H, _, V = size
    k = min(5, V)

    def call(pages: GuardPages) -> list[Tensor]:
        x, w, logits = guarded(
            pages, random(N, H, dtype=dtype), random(V, H, dtype=dtype), random(N, V, dtype=dtype), gap=gap
        )
        ids = torch.stack(
            [torch.randperm(V, generator=torch.Generator().manual_seed(n))[:k] for n in range(N)]
        )
        log_p = random(N, V).log_softmax(-1).gather(1, ids)
        tail = torch.log1p(-log_p.exp().sum(-1).clamp(max=0.99))
        ids, log_p, tail = guarded(pages, ids, log_p, tail, gap=gap)
        leaves = [one.requires_grad_() for one in (x, w, logits)]
        with pages.results(), forced(engine):
            loss = mk.linear_sparse_kl_loss(x, w, ids, log_p, tail, reduction="none", schedule=schedule)
            of_rows = mk.sparse_kl_loss(logits, ids, log_p, tail, reduction="none")
            (loss.sum() + of_rows.sum()).backward()
        return [loss.detach(), of_rows.detach(), *(leaf.grad for leaf in leaves)]

    return call


def of_logits(N: int, V: int, dtype: torch.dtype, gap: int, divergence: str) -> Call:
    """kl_loss, with and without its record."""

    def call(pages: GuardPages) -> list[Tensor]:
        logits, teacher = guarded(
            pages, random(N, V, dtype=dtype), random(N, V, dtype=dtype).flip(0), gap=gap
        )
        mask, labels = guarded(pages, torch.arange(N) % 3 != 1, torch.arange(N) % V)
        logits.requires_grad_()
        with pages.results():
            loss = mk.kl_loss(logits, teacher, mask=mask, divergence=divergence)
            record = mk.kl_loss(logits, teacher, labels=labels, ce_weight=0.3, return_parts=True)
            (loss + record.loss).backward()
        return [loss.detach(), logits.grad]

    return call


def importance(shape: tuple[int, ...], dtype: torch.dtype, gap: int, **options: object) -> Call:
    def call(pages: GuardPages) -> list[Tensor]:
        (x,) = guarded(pages, random(*shape, dtype=dtype), gap=gap)
        tensors = {k: pages.copy(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        with pages.results():
            state = mk.ImportanceState(int(options.get("num_heads") or shape[-1]), seq=("mean", "L2", "var"))  # type: ignore[call-overload]
            mean = mk.ImportanceState(state.num_channels)
            for one in (state, mean):
                mk.accumulate_importance_(one, x, **tensors)  # type: ignore[arg-type]
        return [state.sums, state.squares, mean.sums]

    return call


def rows(N: int, D: int, dtype: torch.dtype, gap: int) -> Call:
    def call(pages: GuardPages) -> list[Tensor]:
        x, y = guarded(pages, random(N, D, dtype=dtype), random(N, D, dtype=dtype).flip(0), gap=gap)
        index, gate = guarded(pages, torch.arange(N) % 4 - 1, random(N).abs())
        with pages.results():
            layers, experts = mk.TokenMeanState(2), mk.TokenMeanState(3)
            mk.accumulate_block_importance_(layers, 1, x, y)
            mk.accumulate_expert_importance_(experts, x, index, gate=gate)
        return [layers.sums, experts.sums]

    return call


def gather(R: int, C: int, dtype: torch.dtype, gap: int, share: int) -> Call:
    def call(pages: GuardPages) -> list[Tensor]:
        weight = torch.arange(2 * R * C).reshape(2, R, C).to(dtype)
        keep_rows, keep_cols = (torch.arange(n)[torch.arange(n) % share != 1] for n in (R, C))
        (weight,) = guarded(pages, weight, gap=gap)
        keep_rows, keep_cols = guarded(pages, keep_rows, keep_cols)
        outs = []
        with pages.results():
            for kept in ((keep_rows, keep_cols), (None, keep_cols), (keep_rows, None), (None, None)):
                outs.append(mk.gather_channels(weight, *kept))
                (lent,) = guarded(pages, torch.empty_like(outs[-1]), gap=gap)
                outs.append(mk.gather_channels(weight, *kept, out=lent))
        return outs

    return call


def floors(nbytes: int) -> Call:
    """The ways to read and to copy that benchmarks compare with."""

    def call(pages: GuardPages) -> list[Tensor]:
        x, out = guarded(pages, *[torch.arange(nbytes // 4, dtype=torch.int32)] * 2)
        for streams, apart, ahead, hint in ((1, 4096, 0, 0), (4, 4096, 1024, 1), (8, 65536, 4096, 2)):
            OPS.read_floor(x, streams, apart, ahead, hint, True)
            OPS.copy_floor_(out, x, 0, streams, apart, ahead, hint, True)
            OPS.copy_floor_(out, x, 2, streams, apart, ahead, hint, True)
        return [out]

    return call


class forced:
    """Products are made by this engine, whatever suits the CPU."""

    def __init__(self, engine: str) -> None:
        self._patches = [
            mock.patch.object(module, "operand_type", lambda *_: engine) for module in (linear_cpu, plan_cpu)
        ]

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def calls() -> Iterator[tuple[str, Call]]:
    """(name, call) for one SIMD level."""
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for i, size in enumerate(SIZES):
            for gap in (0, 3) if i % 2 else (3 * (dtype == torch.bfloat16),):
                for engine in engines(dtype):
                    name = f"{engine} {kind} {size} gap {gap}"
                    for j, schedule in enumerate(("store", "recompute")):
                        divergence = ("forward_kl", "reverse_kl", 0.3)[(j + sum(size)) % 3]
                        options = {"schedule": schedule, "divergence": divergence}
                        yield f"linear_kl_loss {schedule} {name}", dense(size, dtype, engine, gap, **options)
                        yield f"sparse {schedule} {name}", sparse(size, dtype, engine, gap, schedule)
                N, H, Ht, V = size
                name = f"{kind} {size} gap {gap}"
                for divergence in ("forward_kl", "reverse_kl", "jsd"):
                    yield f"kl_loss {divergence} {name}", of_logits(N, V, dtype, gap, divergence)
                yield f"importance {name}", importance((2, N, V), dtype, gap)
                mask = torch.arange(2 * N).reshape(2, N) % 3 > 0
                yield f"importance masked {name}", importance((2, N, Ht), dtype, gap, mask=mask)
                borders = torch.tensor([0, N // 3, N // 3, N])
                yield f"importance packed {name}", importance((N, H), dtype, gap, cu_seqlens=borders)
                yield f"importance heads {name}", importance((2, N, 3 * H), dtype, gap, num_heads=3)
                yield f"rows {name}", rows(N, H, dtype, gap)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128):
        for R, C in ((1, 1), (5, 7), (9, 131), (6, 1037)):
            for gap, share in ((0, 2), (3, 3), (0, 17)):
                yield f"gather {dtype} {R} x {C} gap {gap} share {share}", gather(R, C, dtype, gap, share)
    for nbytes in (4, 60, 4096, 70000):
        yield f"floors {nbytes}", floors(nbytes)


def one_beyond(pages: GuardPages) -> list[Tensor]:
    """A tensor that says to have one channel more than there is memory for."""
    x = pages.empty(3 * 33, torch.float32, beyond=1)
    OPS.importance_moments(x[: 3 * 33].zero_().view(1, 3, 33), None, None, 0, 1)
    print("# all that there is was read", flush=True)
    return list(OPS.importance_moments(x.view(1, 1, 100), None, None, 0, 1))


def run(where: str, named: Iterable[tuple[str, Call]]) -> None:
    """Calls each, with operands that end or begin at a page without access."""
    for name, call in named:
        print(f"{where}: {name}", flush=True)
        with GuardPages(at_end=where.endswith("the end")) as pages:
            results = [x for x in call(pages) if x is not None and x.is_floating_point()]
            assert all(x.isfinite().all() for x in results), f"{where}: {name}: not finite"
            del results


def main(what: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory of C++ is NaN too
    torch.utils.deterministic.fill_uninitialized_memory = True
    compiled = _native.build_info()["simd_compiled"]
    chosen = _native.build_info()["simd_chosen"]
    if what == "beyond":
        run("at the end", [("one beyond", one_beyond)])
    for level in compiled[compiled.index(chosen) :]:
        OPS.set_simd_level(level)
        run(f"{level}, at the end", calls())
        run(f"{level}, at the beginning", calls())
    print("# all calls came back", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
