"""The parameters of a loss: trained as a part of the student, saved and resumed beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._tensors import is_dtensor

FILE = "distillation_loss.pt"  # in a checkpoint; buffers, which differ by process, in files of their own
_HOOKED = "_minitron_leaves_loss_out"


def add_to_student(model: nn.Module, loss: Any) -> None:
    """Makes the parameters of a loss a submodule of the student, before it is wrapped.

    So they are parameters of what DDP and FSDP2 wrap, of its optimizer and of the norm of its gradient. The
    student's state_dict() leaves them out: what is saved loads as the plain model that it is.
    """
    own = {id(parameter) for parameter in loss.parameters()}
    if not own:
        return
    loss.attach_map(model)
    names = [name for name, module in model.named_children() if own & {id(p) for p in module.parameters()}]
    if missing := own - {id(parameter) for parameter in model.parameters()}:
        raise ValueError(
            f"{len(missing)} parameters of the loss are not in its map of hidden states: nothing would train "
            "them; make them a submodule of the student"
        )
    if getattr(model, _HOOKED, False):
        return
    setattr(model, _HOOKED, True)

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(tuple(f"{prefix}{x}." for x in names))]:
            del state[name]

    def not_missing(module: nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not any(f".{name}." in f".{key}" for name in names)]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(not_missing)


def save_loss(loss: nn.Module, folder: str, process: int, writes: bool) -> None:
    """Writes the state of a loss, if it has one, into a checkpoint's folder; all processes call."""
    parameters = {name: _whole(x) for name, x in loss.named_parameters()}
    buffers = _buffers(loss)
    if parameters or buffers:  # of sharded checkpoints the folder is not there yet
        Path(folder).mkdir(parents=True, exist_ok=True)
    if parameters and writes:
        torch.save(parameters, Path(folder) / FILE)
    if buffers:
        torch.save({name: x.cpu() for name, x in buffers.items()}, _of_process(folder, process))


def load_loss(loss: nn.Module, folder: str, process: int) -> None:
    """Reads what save_loss() wrote.

    A process that there was not yet when the checkpoint was made takes the buffers of the first.

    Raises:
        ValueError: the checkpoint has none, or that of another loss.
    """
    _load(dict(loss.named_parameters()), Path(folder) / FILE)
    path = _of_process(folder, process)
    _load(_buffers(loss), path if path.exists() else _of_process(folder, 0))


def _load(state: dict[str, Tensor], path: Path) -> None:
    if not path.exists():
        if state:
            raise ValueError(
                f"{path} is missing, but the loss has {', '.join(state)}: resume with the loss that the "
                "checkpoint was made with"
            )
        return
    saved = torch.load(path, map_location="cpu", weights_only=True)
    shapes, found = ({name: tuple(x.shape) for name, x in xs.items()} for xs in (state, saved))
    if shapes != found:
        raise ValueError(
            f"the loss must be the one that {path} was made with: that has {found}, this one {shapes}"
        )
    with torch.no_grad():
        for name, x in state.items():
            x.copy_(_placed(saved[name], x))


def _of_process(folder: str, process: int) -> Path:
    return Path(folder) / f"distillation_loss_{process}.pt"


def _buffers(loss: nn.Module) -> dict[str, Tensor]:
    parameters = dict(loss.named_parameters())
    return {name: x for name, x in loss.state_dict().items() if name not in parameters}


def _whole(x: Any) -> Tensor:
    whole: Tensor = x.full_tensor() if is_dtensor(x) else x
    return whole.detach().cpu()


def _placed(value: Tensor, like: Any) -> Tensor:
    value = value.to(like.device, like.dtype)
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
