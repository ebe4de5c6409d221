"""The public planner of linear_kl_loss: what a call would do, take and cost, on the CPU or a GPU."""

from __future__ import annotations

import torch

from minitron_kernels import _native
from minitron_kernels.ops.kl_loss import plan_cpu, plan_gpu
from minitron_kernels.ops.kl_loss.budget import GPU_WORKSPACE_BYTES, check_schedule
from minitron_kernels.ops.kl_loss.gpu_figures import FIGURES, GpuFigures, figures_of
from minitron_kernels.ops.kl_loss.head_buffer import check_places
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan, grad_dtype
from minitron_kernels.ops.kl_loss.plan_gpu import GpuProblem


def plan_linear_kl_loss(
    num_tokens: int,
    vocab_size: int,
    student_hidden_size: int,
    teacher_hidden_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype | None = None,
    grad_hidden: bool = True,
    grad_head: bool = True,
    grad_bias: bool = False,
    grad_head_accumulator: bool = False,
    divergence_needs_kl: bool = False,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    engine: str | None = None,
    device: str | torch.device = "cpu",
    gpu: str | None = None,
    tp_size: int = 1,
    sparse_ids: int | None = None,
    return_parts: bool = False,
    grad_head_buffer: bool = False,
) -> LinearKLPlan:
    """Plans a call of linear_kl_loss without making it; print(plan.explain()) shows schedule and memory.

    Or one of linear_sparse_kl_loss, where sparse_ids is given.

    On a GPU, which need not be here, it also predicts the time: from the flops at the rate of the vendor's
    GEMMs, with whole waves of their tiles, and the bytes at the rate of a copy. What is predicted has not
    been measured. The sizes are those that a call takes.

    Args:
        num_tokens: valid tokens, those that no mask leaves out; on a GPU all tokens.
        vocab_size: columns of the logits.
        student_hidden_size: width of the student's hidden states.
        teacher_hidden_size: width of the teacher's.
        dtype: of the student's hidden states and head; bf16 operands are planned where the teacher's are
            bf16 too.
        teacher_dtype: of the teacher's; the student's by default.
        grad_hidden: whether the gradient to the student's hidden states is needed.
        grad_head: whether the gradient to the student's head is needed.
        grad_bias: whether the gradient to the student's bias is needed.
        grad_head_accumulator: whether a buffer for it is given; gradients are then made in the backward, and
            the GEMMs and flops are those of forward and backward.
        divergence_needs_kl: JSD with 0 < beta < 1, which looks at the logits once more.
        schedule: "auto", "store" or "recompute".
        workspace_bytes: budget in bytes, 576 MiB by default, 4 GiB on a GPU. It bounds all that the call
            allocates beyond inputs and outputs, but for fp32 sums of gradients (accumulator_bytes).
        engine: what multiplies, by default what runs fastest here. CPU only. "f32" or "f64" operands, in
            vector code of this library; bf16 ones by "amx" or "avx512_bf16", its kernels for these
            instructions, or "bf16", libtorch's. For tests, on any CPU, bf16 ones by "portable_bf16",
            "portable_amx" and "portable_avx512_bf16".
        device: "cpu", or "cuda" for CUDA and ROCm.
        gpu: "A100", "H100", "H200" or "B200", whose rates are assumed. By default those of the GPU at
            `device`, or of an H100 where there is none.
        sparse_ids: ids a token of a sparse teacher, k. teacher_hidden_size must then be 0.
        tp_size: ranks of tp_group, which share the vocabulary: vocab_size is then that of one rank, the
            largest. The time of what they exchange is not in the prediction. GPU only.
        return_parts: whether a cross-entropy or parts are asked for, which take some memory on a CPU.
        grad_head_buffer: whether memory for the head's gradient is lent, into which a CPU writes around the
            caches where it is large.

    Returns:
        The plan; total_bytes, and for a GPU predicted_seconds, say what it costs.

    Raises:
        TypeError: a GPU has no kernels for float64; a buffer is lent for the gradient of a float16 head.
        ValueError: an unknown schedule, engine, device or gpu; both an accumulator and a buffer; a budget too
            small for any plan: says the least that would do.
        RuntimeError: a plan for the CPU, and the extension is not built.
    """
    check_schedule(schedule)
    if sparse_ids is not None and (teacher_hidden_size or sparse_ids < 0):
        raise ValueError(
            "sparse_ids must be at least 0, and teacher_hidden_size 0 beside it; got "
            f"{sparse_ids} and {teacher_hidden_size}"
        )
    check_places(grad_head_accumulator, grad_head_buffer, dtype)
    target, teacher_dtype = torch.device(device), teacher_dtype or dtype
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda'; got {device!r}")
    if target.type == "cuda":
        if engine is not None:
            raise ValueError(f"engine is for plans of the CPU; got {engine!r} with device={device!r}")
        if gpu is not None and gpu not in FIGURES:
            raise ValueError(f"gpu must be one of {', '.join(FIGURES)}; got {gpu!r}")
        problem = _gpu_problem(
            (num_tokens, vocab_size, student_hidden_size, teacher_hidden_size),
            (dtype, teacher_dtype),
            (grad_hidden, grad_head, grad_bias),
            grad_head_accumulator,
            2 if divergence_needs_kl else 1,
            figures_of(target) if gpu is None else FIGURES[gpu],
            tp_size,
            sparse_ids is not None,
        )
        return plan_gpu.plan(
            problem, schedule, GPU_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        )
    if tp_size != 1:
        raise ValueError(f"tp_size is for device='cuda'; got {tp_size} with device={device!r}")
    if gpu is not None:
        raise ValueError(f"gpu is for device='cuda'; got {gpu!r} with device={device!r}")
    if not _native.available():
        raise RuntimeError(
            f"linear_kl_loss has nothing to plan without the C++ extension: {_native.reason()}"
        )
    if engine is not None and engine not in plan_cpu.ENGINES:
        raise ValueError(f"engine must be one of {', '.join(plan_cpu.ENGINES)}; got {engine!r}")
    return plan_cpu.plan(
        num_tokens,
        vocab_size,
        student_hidden_size,
        teacher_hidden_size,
        dtype=dtype,
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        grad_bias=grad_bias,
        grad_head_accumulator=grad_head_accumulator,
        divergence_needs_kl=divergence_needs_kl,
        schedule=schedule,
        workspace_bytes=workspace_bytes,
        engine=engine or plan_cpu.operand_type(dtype, teacher_dtype),
        metrics=return_parts,
        outcomes=0 if sparse_ids is None else sparse_ids + 1,
        lent=grad_head and grad_head_buffer,
    )


def _gpu_problem(
    sizes: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    grads: tuple[bool, bool, bool],
    accumulator: bool,
    looks: int,
    gpu: GpuFigures,
    ranks: int,
    sparse: bool,
) -> GpuProblem:
    """What linear_gpu.py would ask for, where all operands of a side have one dtype."""
    for name, dtype in zip(("dtype", "teacher_dtype"), dtypes, strict=True):
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{name} must be bfloat16, float16 or float32 on a GPU; got {dtype}")
    student, teacher = dtypes
    grad = grad_dtype(student)
    return GpuProblem(
        *sizes,
        itemsize=student.itemsize,
        teacher_itemsize=teacher.itemsize,
        grad_hidden=grads[0],
        grad_head=grads[1],
        grad_bias=grads[2],
        **plan_gpu.sums_with_memory(grad, torch.float32 if accumulator else grad, student, accumulator),
        stats_first=accumulator,  # the forward makes them, the backward the gradients
        looks=looks,
        ranks=ranks,
        spare_columns=int(sparse),
        gpu=gpu,
    )
