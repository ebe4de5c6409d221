"""FSDP2 of a DistillationTrainer: on CPUs too, which dtypes it works in, and a teacher's."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minitron_kernels._tensors import is_dtensor
from minitron_kernels.distillation.causal_lm import CausalLM, attach
from minitron_kernels.distillation.layers import decoder_layers

# accelerate 1.6 puts the states of an optimizer of FSDP2 back wrongly, without a word; in 1.13 shards too are
# read into what the optimizer has then
OLDEST_ACCELERATE = (1, 13)


def prepare_fsdp(trainer: Any) -> None:
    """Lets a trainer, whose accelerator is new, have the FSDP2 that its args ask for.

    On CPUs accelerate leaves FSDP aside without a word; joined by gloo it works there as on GPUs. Under bf16
    accelerate rounds what the model returns to bf16, the loss and its parts too, and sums gradients in bf16:
    here both stay in fp32.

    Raises:
        ValueError: accelerate is older than OLDEST_ACCELERATE; args.use_cpu with a torch that would shard
            onto a GPU.
    """
    args, state = trainer.args, trainer.accelerator.state
    if not args.fsdp or getattr(trainer, "is_fsdp_xla_enabled", False):
        return
    _check_accelerate()
    if args.device.type == "cpu" and args.world_size > 1:
        _take_on_cpu(state, args)
        trainer.is_fsdp_enabled = True
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and state.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)


def _check_accelerate() -> None:
    version, oldest = importlib.metadata.version("accelerate"), ".".join(map(str, OLDEST_ACCELERATE))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_ACCELERATE:
        raise ValueError(
            f"fsdp needs accelerate {oldest} or later, here is {version}: what an older one resumes "
            "may go on with other states of the optimizer (pip install -U accelerate)"
        )


def _take_on_cpu(state: Any, args: Any) -> None:
    """Sets what accelerate sets for GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        raise ValueError(
            f"args.use_cpu with FSDP2: this torch would shard onto {accelerator.type}; take a torch for CPUs "
            "alone, or leave out use_cpu or fsdp"
        )
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what later instances begin with


def layer_classes(model: nn.Module) -> list[str]:
    """The names of the classes of a model's decoder layers, for transformer_layer_cls_to_wrap.

    Raises:
        ValueError: its layers are not known.
    """
    return sorted({type(layer).__name__ for layer in _layers(model)})


def check_shardable(student: nn.Module) -> None:
    """Checks that FSDP2 can sum the gradients of all of a student's parameters.

    Raises:
        ValueError: experts that are modules of their own: one that got no token on a process has no gradient
            there, and the processes would wait for each other.
    """
    for name, module in student.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "experts":
            raise ValueError(
                f"{type(student).__name__} has experts that are modules of their own ({name}), which may "
                "have no gradient on some of the processes: they are not sharded; leave out fsdp"
            )


def shard_teacher(model: nn.Module, device: torch.device) -> nn.Module:
    """fully_shard() of each decoder layer of a teacher, and of what is around them, over all processes.

    The processes have joined already. The model is attached before, so that its logits are verified while its
    weights are whole; one on the meta device stays there. Each layer goes to the device by itself: the whole
    model is never there.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: a model that is not known; see attach() and layer_classes().
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    attach(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def shard_student(trainer: Any) -> None:
    """Shards a trainer's student as train() would do, in the same groups, while it is on the meta device."""
    from accelerate.utils import fsdp2_prepare_model

    trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # there is nothing to send
    fsdp2_prepare_model(trainer.accelerator, trainer.model)


def parameters_of(optimizer: Any) -> list[list[Any]] | None:
    """The parameters of an optimizer by group, if they are sharded; None: they are not, and will be replaced.

    accelerate's prepare() finds them again by the address of their memory, which those of which this process
    has no rows do not have: it would take one of them for all.

    Raises:
        ValueError: some are sharded and some are not.
    """
    groups = [list(group["params"]) for group in optimizer.param_groups]
    sharded = [is_dtensor(parameter) for group in groups for parameter in group]
    if any(sharded) and not all(sharded):
        raise ValueError(
            f"{len(sharded) - sum(sharded)} of the student's {len(sharded)} trained parameters are not "
            "sharded, and the others are: a forward pass before train() gathered them, or they were added "
            "after fully_shard(); processes would not train them alike"
        )
    return groups if any(sharded) else None


def _layers(model: nn.Module) -> nn.ModuleList:
    lm = CausalLM(model)
    found = decoder_layers(lm.decoder, lm.model.config)
    if found is None:
        raise ValueError(
            f"the layers of {type(model).__name__} are not known, and it cannot be sharded layer by layer: "
            "leave out fsdp"
        )
    return found


def whole_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """A sharded model's state in a dtype, on the first process and in its memory; nothing on the others.

    All processes call. The model itself is cast, for good.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    again = tied_names(model)  # before the cast, which makes two parameters of one
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model.to(dtype), options=options)
    return {name: x for name, x in state.items() if name not in again}


def tied_names(model: nn.Module) -> set[str]:
    """Names of parameters that a model has under another name before, and a plain checkpoint only there."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
