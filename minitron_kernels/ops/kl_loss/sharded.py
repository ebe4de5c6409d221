"""What of a sharded head a rank computes with, and how its gradient finds the way back.

A DTensor is taken apart by the dimensions of its mesh. Over the one that is `tp_group` each rank keeps its
rows of the vocabulary. Over all others the ranks have other tokens, or the same ones: there the head is
gathered, and its gradient is averaged and scattered, as FSDP2 and DDP do with the gradients of all other
parameters. Where the ranks had the same tokens, the average of equal gradients is what each of them has.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from minitron_kernels._tensors import check_gathered, is_dtensor
from minitron_kernels.ops.kl_loss.operands import Side


def local_side(
    side: str,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    grad_head_accumulator: Tensor | None = None,
    grad_head_buffer: Tensor | None = None,
) -> Side:
    """Hidden states, head and bias as plain tensors of this rank; those of a teacher as constants.

    Raises:
        TypeError: hidden states that are sharded.
        ValueError: a parameter whose memory is elsewhere, or a place for the gradient of a gathered head.
    """
    for name, x in ((f"{side}_head", head), (f"{side}_bias", bias)):
        if isinstance(x, nn.Parameter):
            check_whole(name, x, ndim=1 if x is bias else 2)
    if not any(map(is_dtensor, (hidden, head, bias))):
        return hidden, head, bias
    places = {"grad_head_accumulator": grad_head_accumulator, "grad_head_buffer": grad_head_buffer}
    given = [name for name, place in places.items() if place is not None]
    if given and is_dtensor(head) and _gathered_dims(head, tp_group):
        raise ValueError(
            f"{given[0]} cannot take the gradient of a {side}_head that is a DTensor: it goes "
            "back to the shards. Leave it out, or pass plain tensors"
        )
    if side == "teacher":
        head, bias = head.detach(), None if bias is None else bias.detach()
    return (
        local_tokens(f"{side}_hidden", hidden, tp_group if sequence_parallel else None),
        local_head(f"{side}_head", head, tp_group),
        None if bias is None else local_head(f"{side}_bias", bias, tp_group),
    )


def local_head(name: str, head: Tensor, tp_group: Any = None) -> Tensor:
    """A head or bias with the vocabulary first, as a plain tensor: this rank's rows, or all without tp_group.

    One collective per mesh dimension that shards it, and its counterpart in the backward. A mesh that has no
    dimension of tp_group's ranks shards what are this rank's rows already (FSDP2 of a head that was cut by
    hand). A plain tensor passes.
    """
    if not is_dtensor(head):
        return head
    from torch.distributed.tensor import Partial, Replicate, Shard

    head_: Any = head
    mesh, device = head_.device_mesh, head_._local_tensor.device
    if device.type not in (mesh.device_type, "meta"):
        raise ValueError(
            f"{name} is offloaded to {device}, where its mesh on {mesh.device_type} cannot gather it: call "
            "the loss inside the forward of the module that fully_shard() was given"
        )
    tp = _tp_dim(mesh, tp_group)
    dims = range(mesh.ndim)
    return head_.redistribute(placements=[Shard(0) if i == tp else Replicate() for i in dims]).to_local(
        grad_placements=[Shard(0) if i == tp else Partial("avg") for i in dims]
    )


def local_tokens(name: str, x: Tensor, sequence_group: Any = None) -> Tensor:
    """Hidden states or logits, which every rank must hold whole; a plain tensor passes.

    sequence_group: with sequence parallelism the ranks over which the first dimension is cut.

    Raises:
        TypeError: they are sharded in another way.
    """
    if not is_dtensor(x):
        return x
    x_: Any = x
    cut = _tp_dim(x_.device_mesh, sequence_group)
    if not all(p.is_shard(0) if i == cut else p.is_replicate() for i, p in enumerate(x_.placements)):
        wanted = "Replicate()" if cut is None else f"Shard(0) over dimension {cut}, else Replicate()"
        raise TypeError(
            f"{name} is a DTensor with placements {x_.placements}, wanted are {wanted}: pass "
            f"{name}.full_tensor() for the loss of all tokens; or, where tokens are sharded, "
            f"{name}.to_local() with this rank's labels and num_items, for the loss of its own"
        )
    return x_.to_local()


def check_whole(name: str, x: Tensor, ndim: int) -> None:
    """Checks that a parameter is not the piece that ZeRO-3 and FSDP1 leave of it.

    Raises:
        ValueError: it is.
    """
    check_gathered(name, x)
    if x.dim() != ndim and x.dim() == 1:
        raise ValueError(
            f"{name} is a parameter of shape {tuple(x.shape)}, as FSDP1 leaves one outside of the wrapped "
            "module's forward: call the loss inside of that forward; or, where it needs no gradient, within "
            "FSDP.summon_full_params()"
        )


def _gathered_dims(head: Any, tp_group: Any) -> list[int]:
    """Mesh dimensions of more than one rank over which a head does not stay as it is."""
    mesh = head.device_mesh
    tp = _tp_dim(mesh, tp_group)
    return [i for i in range(mesh.ndim) if mesh.size(i) > 1 and i != tp]


def _tp_dim(mesh: Any, tp_group: Any) -> int | None:
    """The mesh dimension whose ranks are those of tp_group, in their order."""
    if tp_group is None:
        return None
    wanted = dist.get_process_group_ranks(tp_group)
    for i in range(mesh.ndim):
        if dist.get_process_group_ranks(mesh.get_group(i)) == wanted:
            return i
    return None
