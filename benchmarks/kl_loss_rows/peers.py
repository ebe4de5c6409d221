"""The implementations that are compared, each as a function from inputs to the mean forward KL.

Each is called as its documentation says: no label is masked, temperature is 1, no cross-entropy is mixed in.
A few are another loss, the cross-entropy of labels: what a kernel with three of the four GEMMs reaches here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kl_loss_rows.cases import CE, Inputs
from kl_loss_rows.implementation import Implementation, Loss
from kl_loss_rows.ours import ROWS as OURS_ROWS


def _kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    log_s, log_t = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def _naive(inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        teacher_logits = F.linear(inputs.teacher_hidden, inputs.teacher_head)
    return _kl(F.linear(inputs.student_hidden, inputs.student_head), teacher_logits)


def _naive_float(inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        teacher_logits = F.linear(inputs.teacher_hidden, inputs.teacher_head).float()
    return _kl(F.linear(inputs.student_hidden, inputs.student_head).float(), teacher_logits)


def _compiled() -> Loss:
    # separate tensors, so that the compiler guards on them and not on the class Inputs
    def loss(X: torch.Tensor, W: torch.Tensor, Y: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = F.linear(Y, U).float()
        return _kl(F.linear(X, W).float(), teacher_logits)

    compiled = torch.compile(loss, dynamic=False)
    return lambda inputs: compiled(*inputs.operands)


def _liger(chunk_size: int, compiled: bool) -> Callable[[], Loss]:
    def build() -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=chunk_size
        )
        return lambda inputs: loss(*inputs.operands, inputs.labels)

    return build


def _liger_jsd(language: str) -> Callable[[], Loss]:
    """Liger's fused linear JSD with its inner kernel in `language`; left alone, Liger chooses by the GPU."""

    def build() -> Loss:
        from liger_kernel.functional import fused_linear_jsd

        options = {"jsd_beta": 0.0, "impl": f"nvidia-{language}"}  # 0 is forward KL
        return lambda inputs: fused_linear_jsd(*inputs.operands, None, **options)

    return build


def _liger_lacks(language: str) -> Callable[[], str | None]:
    def lacks() -> str | None:
        try:
            import liger_kernel.functional  # noqa: F401  says where its kernels are
            from liger_kernel.backends import available_impls

            found = available_impls("fused_linear_jsd")
        except Exception as error:  # an older version, or what it needs itself
            return f"{type(error).__name__}: {error}".splitlines()[0]
        wanted = f"nvidia-{language}"
        return None if wanted in found else f"Liger has {', '.join(found) or 'no kernel'} here, not {wanted}"

    return lacks


def _liger_ce() -> Loss:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    return lambda inputs: Function.apply(inputs.student_hidden, inputs.student_head, inputs.labels).mean()


def _liger_ce_lacks() -> str | None:
    """Why Liger would not run its CuTe kernel but chunks in PyTorch."""
    if (arch := torch.cuda.get_device_capability()) != (9, 0):
        return f"Liger's CuTe kernel is for sm_90, here is sm_{arch[0]}{arch[1]}"
    return None if importlib.util.find_spec("cutlass") else "pip install nvidia-cutlass-dsl"


def _quack_ce() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda inputs: chunked_linear_cross_entropy(
        inputs.student_hidden, inputs.student_head, inputs.labels, chunk_size=4096
    )


def _torch_ce() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks; without them it is the plain expression
    return lambda inputs: F.linear_cross_entropy(
        inputs.student_hidden, inputs.student_head, inputs.labels, options=options
    )


def _torch_ce_lacks() -> str | None:
    there = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if there else f"torch {torch.__version__} has no chunked F.linear_cross_entropy"


def _liger_kl() -> Loss:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    kl = LigerFusedLinearKLDivLoss()

    def loss(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():  # it takes the teacher's probabilities, not its head
            target = F.linear(inputs.teacher_hidden, inputs.teacher_head).softmax(-1)
        return kl(inputs.student_hidden, inputs.student_head, target)

    return loss


def _torchtune() -> Loss:
    # the package's __init__ needs torchao and more, which the loss does not use: load this file only
    package = importlib.util.find_spec("torchtune")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kl = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=8)

    def loss(inputs: Inputs) -> torch.Tensor:
        student = [F.linear(rows, inputs.student_head) for rows in inputs.student_hidden.chunk(8)]
        with torch.no_grad():
            teacher = [F.linear(rows, inputs.teacher_head) for rows in inputs.teacher_hidden.chunk(8)]
        return kl(student, teacher, inputs.labels[None])

    return loss


def _trl_chunked() -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(inputs: Inputs) -> torch.Tensor:
        return _chunked_divergence_loss(
            inputs.student_hidden[None],
            inputs.teacher_hidden[None],
            inputs.student_head,
            inputs.teacher_head,
            completion_mask=torch.ones_like(inputs.labels)[None],
            beta=0.0,
        )[0]

    return loss


def _trl_gkd() -> Loss:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = F.linear(inputs.teacher_hidden, inputs.teacher_head)
        student_logits = F.linear(inputs.student_hidden, inputs.student_head)
        return GKDTrainer.generalized_jsd_loss(
            student_logits[None], teacher_logits[None], inputs.labels[None], beta=0.0
        )

    return loss


_LIGER = {"package": "liger-kernel", "pip": "pip install --no-deps liger-kernel==0.8.5"}
_TRL = {"package": "trl", "pip": "pip install trl==1.16.0"}

IMPLEMENTATIONS = {
    row.key: row
    for row in (
        Implementation("naive", "naive PyTorch", "PyTorch", lambda: _naive),
        Implementation("naive-float", "naive PyTorch, logits.float()", "PyTorch", lambda: _naive_float),
        Implementation("compile", "torch.compile of that", "torch.compile", _compiled, compiles=True),
        Implementation("liger", "Liger, 256 rows a chunk", "Liger", _liger(256, False), **_LIGER),
        Implementation(
            "liger-compiled",
            "Liger, as it comes (1024, compiled)",
            "Liger",
            _liger(1024, True),
            compiles=True,
            **_LIGER,
        ),
        *(
            Implementation(
                key,
                f"Liger FusedLinearJSD ({name})",
                "Liger",
                _liger_jsd(language),
                devices=("cuda",),
                lacks=_liger_lacks(language),
                **_LIGER,
            )
            for key, name, language in (
                ("liger-jsd", "Triton", "triton"),
                ("liger-jsd-cute", "CuTe", "cutedsl"),
            )
        ),
        Implementation(
            "liger-kl",
            "Liger FusedLinearKLDiv (Triton)",
            "Liger",
            _liger_kl,
            devices=("cuda",),
            **_LIGER,
        ),
        Implementation(
            "torchtune",
            "torchtune, 8 chunks",
            "torchtune",
            _torchtune,
            package="torchtune",
            pip="pip install --no-deps torchtune==0.6.1",
            gives_loss=False,
        ),
        Implementation("trl", "TRL chunked divergence", "TRL", _trl_chunked, **_TRL),
        Implementation("trl-gkd", "TRL GKD", "TRL", _trl_gkd, **_TRL),
        Implementation(
            "liger-ce",
            "Liger cross-entropy (CuTe)",
            "Liger",
            _liger_ce,
            devices=("cuda",),
            lacks=_liger_ce_lacks,
            target=CE,
            **_LIGER,
        ),
        Implementation(
            "quack-ce",
            "quack cross-entropy (CuTe)",
            "quack",
            _quack_ce,
            package="quack-kernels",
            pip="pip install quack-kernels",
            devices=("cuda",),
            target=CE,
        ),
        Implementation(
            "torch-ce",
            "F.linear_cross_entropy",
            "PyTorch",
            _torch_ce,
            lacks=_torch_ce_lacks,
            target=CE,
        ),
        *OURS_ROWS,
    )
}
OURS = tuple(key for key, row in IMPLEMENTATIONS.items() if row.family == "minitron")
