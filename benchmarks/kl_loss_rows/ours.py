"""The library's own rows: the KL alone, the full record with a cross-entropy, a sparse teacher, and none."""

from __future__ import annotations

import torch

from kl_loss_rows.cases import CE, SPARSE, SPARSE_K, Inputs, Target
from kl_loss_rows.implementation import Implementation, Loss

RECOMPUTE_WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
RECORD = Target(kl=1.0, ce=0.5)
_BACKENDS = {"native": "CUDA C++, ", "triton": "Triton, "}


def _row(backend: str, device: str, key: str, label: str, build: Loss, **more: object) -> Implementation:
    """Named after its backend where a device has several."""
    return Implementation(
        key if device == "cpu" else f"{backend}-{key}",
        f"minitron, {_BACKENDS[backend] if device == 'cuda' else ''}{label}",
        "minitron",
        lambda: build,
        package="minitron-kernels",
        pip="pip install .",
        devices=(device,),
        backend=backend,
        **more,
    )


def _kl(backend: str, device: str, schedule: str) -> Implementation:
    budget = RECOMPUTE_WORKSPACE_BYTES[device]
    options = {"workspace_bytes": budget} if schedule == "recompute" else {}
    memory = f" in {budget >> 20} MiB" if schedule == "recompute" else ""

    def loss(inputs: Inputs) -> torch.Tensor:
        from minitron_kernels import linear_kl_loss

        return linear_kl_loss(*inputs.operands, schedule=schedule, backend=backend, **options)

    return _row(backend, device, schedule, schedule + memory, loss)


def _record(backend: str, device: str) -> Implementation:
    def loss(inputs: Inputs) -> torch.Tensor:
        from minitron_kernels import linear_kl_loss

        return linear_kl_loss(
            *inputs.operands,
            labels=inputs.labels,
            ce_weight=RECORD.ce,
            return_parts=True,
            schedule="store",
            backend=backend,
        ).loss

    return _row(backend, device, "record", "store, KL + 0.5 CE, all parts", loss, target=RECORD)


def _sparse(backend: str, device: str) -> Implementation:
    def loss(inputs: Inputs) -> torch.Tensor:
        from minitron_kernels import linear_sparse_kl_loss

        return linear_sparse_kl_loss(
            inputs.student_hidden, inputs.student_head, *inputs.sparse, schedule="store", backend=backend
        )

    label = f"store, {SPARSE_K} ids and the rest"
    return _row(backend, device, "sparse", label, loss, target=SPARSE, op="linear_sparse_kl_loss")


def _ce(backend: str, device: str) -> Implementation:
    """A sparse teacher of no ids teaches nothing: what is left is the cross-entropy."""

    def loss(inputs: Inputs) -> torch.Tensor:
        from minitron_kernels import linear_sparse_kl_loss

        ids, logprobs, tail = inputs.sparse
        return linear_sparse_kl_loss(
            inputs.student_hidden,
            inputs.student_head,
            ids[:, :0],
            logprobs[:, :0],
            torch.zeros_like(tail),
            labels=inputs.labels,
            ce_weight=1.0,
            schedule="store",
            backend=backend,
        )

    return _row(
        backend, device, "ce", "store, cross-entropy alone", loss, target=CE, op="linear_sparse_kl_loss"
    )


ROWS = tuple(
    row
    for backend, device in (("native", "cpu"), ("native", "cuda"), ("triton", "cuda"))
    for row in (
        _kl(backend, device, "store"),
        _kl(backend, device, "recompute"),
        _record(backend, device),
        _sparse(backend, device),
        _ce(backend, device),
    )
)
