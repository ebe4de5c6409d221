"""NeMo AutoModel's distillation loss by this library's: KDLoss, a module with the same call.

In the recipe's YAML:

    kd_loss_fn:
      _target_: minitron_kernels.distillation.trainers.automodel.KDLoss
      ignore_index: -100
      temperature: 1.0

Nothing here imports nemo_automodel.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from minitron_kernels._tensors import is_dtensor
from minitron_kernels.distillation.trainers.sharded_logits import sharded_forward_kl
from minitron_kernels.ops.kl_loss.checks import integer, positive
from minitron_kernels.ops.kl_loss.labels import counted
from minitron_kernels.ops.kl_loss.op import kl_loss


class KDLoss(nn.Module):
    """τ² KL(softmax(teacher/τ) ‖ softmax(student/τ)) of logits, as nemo_automodel's KDLoss.

    Args:
        ignore_index: label of the positions that do not count.
        temperature: τ. The loss carries the factor τ², as theirs does.
        fp32_upcast: accepted for their configs. Logits are always widened to fp32, element by element in
            registers; False saves nothing here and changes nothing.
        tp_group: ranks that hold the vocabulary in parts. None: taken from student_logits, where they are a
            DTensor that is sharded along the vocabulary.
        chunk_size: accepted for their configs. No fp32 copy of the logits is made, in chunks or whole.

    The loss is a sum of terms that are all ≥ 0, so that it keeps its digits close to the teacher.
    Attributes may be changed between calls.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index = integer("ignore_index", ignore_index)
        self.temperature = positive("temperature", temperature)
        self.fp32_upcast = fp32_upcast
        self.tp_group = tp_group
        self.chunk_size = integer("chunk_size", chunk_size)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a micro-batch.

        Args:
            student_logits: [..., V]. With tp_group, or as a DTensor that is sharded along V, this rank's part
                of the vocabulary; a DTensor without such a placement is gathered.
            teacher_logits: [..., V], parted as the student's. Their gradient is not wanted.
            labels: [...], those of AutoModel's data sets: the targets of the positions they stand at, shifted
                already. Which tokens they are is not looked at, but for ignore_index.
            num_batch_labels: what the sum is divided by, such as the valid tokens of all micro-batches of a
                step; None: the valid tokens here.

        Returns:
            0-dim float32 (float64 for float64); 0, with a gradient of 0, where no label counts.

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or placements; the message names the argument.
        """
        group, student_logits = _local("student_logits", student_logits, self.tp_group)
        if group is None and is_dtensor(teacher_logits):
            teacher_logits = teacher_logits.full_tensor()  # type: ignore[attr-defined]
        else:
            _, teacher_logits = _local("teacher_logits", teacher_logits, group)
        if is_dtensor(labels):
            labels = labels.full_tensor()  # type: ignore[attr-defined]
        valid = counted(labels, self.ignore_index)
        if valid.numel() == student_logits.shape[:-1].numel():
            valid = valid.reshape(student_logits.shape[:-1])  # labels [B T] of logits [B, T, V], and reverse
        options: dict[str, Any] = {"temperature": self.temperature, "num_items": num_batch_labels}
        if group is not None:
            return sharded_forward_kl(student_logits, teacher_logits, valid, group=group, **options)
        loss: Any = kl_loss(
            student_logits, teacher_logits.detach(), mask=valid, temperature_squared=True, **options
        )
        return loss


def _local(name: str, logits: Tensor, group: Any) -> tuple[Any, Tensor]:
    """The group of the vocabulary's parts, and the logits as a plain tensor."""
    if not is_dtensor(logits):
        return group, logits
    from torch.distributed.tensor import Shard

    dtensor: Any = logits
    last = logits.dim() - 1
    sharded = {i: p for i, p in enumerate(dtensor.placements) if not p.is_replicate()}
    of_vocab = [i for i, p in sharded.items() if isinstance(p, Shard) and p.dim in (-1, last)]
    if not of_vocab:
        if group is not None:
            raise ValueError(
                f"{name} must be sharded along the vocabulary where tp_group is given or the student's are; "
                f"got placements {dtensor.placements}: redistribute them to Shard(-1)"
            )
        return None, dtensor.full_tensor()
    if len(sharded) > 1:
        raise ValueError(
            f"{name} must be sharded along the vocabulary alone, got placements {dtensor.placements}: tokens "
            "of other ranks belong to their own call (to_local() over the mesh's other dimensions)"
        )
    its_group = dtensor.device_mesh.get_group(of_vocab[0])
    ranks = [dist.get_process_group_ranks(its_group), dist.get_process_group_ranks(group or its_group)]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"{name} must be sharded over the ranks of tp_group or of the student's logits, {ranks[1]}; got "
            f"{ranks[0]}: distribute them over that group's mesh"
        )
    return group or its_group, dtensor.to_local()
