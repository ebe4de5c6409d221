"""Models whose weights each process reads by its own shards: made without memory, divided, then filled.

from_pretrained() would hold the whole model in each process before FSDP2 divides it.

Its own `distributed_config`, which reads by shards too, is not taken: it cuts the rows of a tensor before
transforms that divide or join rows, whose result then has other rows than the model's (the shapes agree), its
trainer refuses checkpoints of such models, and it shards a tied head a second time. torch's
HuggingFaceStorageReader knows no names but the model's, and reads every safetensors file of the folder.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._command.messages import few
from minitron_kernels._command.models import auto_class, check_no_adapter, lacking_error, load_config
from minitron_kernels._tensors import is_dtensor
from minitron_kernels.distillation.trainers.hf_names import (
    Names,
    NotByShardsError,
    Shape,
    Source,
    map_names,
)
from minitron_kernels.pruning.checkpoint.safetensors_files import (
    SourceFolder,
    StoredTensor,
    open_folder,
)

BLOCK_BYTES = 64 << 20  # of a tensor that are in memory at once, beside the shards


@dataclass
class ShardedWeights:
    """What fills an empty model: which rows of which files.

    Args:
        folder: of the checkpoint.
        sources: as map_names() finds them.
        shapes: of the model's parameters and buffers; tied ones under each of their names.
        dtypes: of the model's parameters and buffers, as asked for: values are rounded to them, though a
            parameter may be held in another one.
        fingerprint: of the files; they must be the same when they are read.
        bytes_read: by fill(), of tensors.
    """

    folder: Path
    sources: Mapping[str, list[Source]]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    fingerprint: list[Any]
    bytes_read: int = field(default=0)

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device | str) -> None:
        """Gives a sharded model its weights: each process reads the rows that it holds, and no others.

        Parameters that are not on the meta device (those of a loss) stay as they are. Memory is poisoned with
        NaN before it is filled.

        Args:
            model: whose parameters FSDP2 has sharded on the meta device, by rows.
            device: where they go.

        Raises:
            ValueError: a parameter that nothing fills, or not wholly; files that have changed.
        """
        new: dict[int, tuple[Any, nn.Parameter]] = {}  # with the old one: its id() stays its own
        with open_folder(self.folder) as files:
            if [file.fingerprint() for file in files.files] != self.fingerprint:
                raise ValueError(f"{self.folder}: its weights have changed since they were looked at")
            for prefix, module in model.named_modules():
                for own, parameter in list(module._parameters.items()):
                    if parameter is None or parameter.device.type != "meta":
                        continue
                    name = f"{prefix}.{own}" if prefix else own
                    if id(parameter) not in new:
                        new[id(parameter)] = parameter, self._parameter(name, parameter, files, device)
                    setattr(module, own, new[id(parameter)][1])
            for name, buffer in model.named_buffers():
                if buffer.device.type == "meta":
                    raise ValueError(f"{name} has no values: it is made on the meta device")
                if name in self.sources:
                    buffer.copy_(self._rows(name, buffer.shape, files, 0, len(buffer) if buffer.dim() else 1))
            files.check_unchanged()

    def bytes_of_share(self, ranks: int) -> tuple[int, int]:
        """(bytes that the first of so many processes reads, bytes of all tensors that the model takes)."""
        share = whole = 0
        with open_folder(self.folder) as files:
            seen = set()
            for name, sources in self.sources.items():
                rows = self.shapes[name][0] if self.shapes[name] else 1
                own = -(-rows // ranks)
                for source in sources:
                    if source.key in seen:  # under another name
                        continue
                    seen.add(source.key)
                    nbytes = files.tensors[source.key].nbytes
                    whole += nbytes
                    if source.row is None:
                        share += nbytes // max(rows, 1) * own
                    elif source.row < own:
                        share += nbytes
        return share, whole

    def _parameter(
        self, name: str, empty: Any, files: SourceFolder, device: torch.device | str
    ) -> nn.Parameter:
        """A parameter like an empty one, with this process's rows."""
        from torch.distributed.tensor import DTensor, Shard

        mesh = empty.device_mesh if is_dtensor(empty) else None
        if mesh is None or mesh.ndim != 1 or tuple(empty.placements) != (Shard(0),):
            raise ValueError(f"{name} is not sharded by its rows over one dimension of processes")
        each = -(-empty.shape[0] // mesh.size())
        first = min(each * mesh.get_local_rank(), empty.shape[0])
        last = min(first + each, empty.shape[0])
        local = empty.to_local()
        if local.shape[0] != last - first:
            raise ValueError(f"{name}: this process holds {local.shape[0]} rows of it, not {first} to {last}")
        rows = self._rows(name, empty.shape, files, first, last).to(device=device, dtype=empty.dtype)
        whole = DTensor.from_local(
            rows, mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
        )
        return nn.Parameter(whole, requires_grad=empty.requires_grad)

    def _rows(self, name: str, shape: Any, files: SourceFolder, first: int, last: int) -> Tensor:
        """Rows of a parameter, in the dtype that was asked for."""
        rows = _poisoned((last - first, *shape[1:]) if shape else (), self.dtypes[name])
        filled = 0
        for source in self.sources.get(name, ()):
            stored = files.tensors[source.key]
            if source.row is None:
                filled += self._read(stored, rows, first)
            elif first <= source.row < last:
                part = rows[source.row - first].narrow(0, source.column, stored.shape[0])
                filled += self._read(stored, part, 0)
        if filled != rows.numel():
            raise ValueError(f"{name}: {self.folder} fills {filled:,} of {rows.numel():,} numbers of it")
        return rows

    def _read(self, stored: StoredTensor, into: Tensor, first: int) -> int:
        """Reads the rows from `first` on that a tensor has place for; how many numbers these are."""
        rows = into.reshape(1) if into.dim() == 0 else into  # a view: it is contiguous
        width = math.prod(rows.shape[1:])
        row_bytes = width * stored.itemsize
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for begin in range(0, len(rows) if width else 0, step):
            block = rows[begin : begin + step]
            raw = torch.empty(len(block) * row_bytes, dtype=torch.uint8)
            memory: Any = raw.numpy()
            stored.file.read_into(memoryview(memory), stored.begin + (first + begin) * row_bytes)
            block.copy_(raw.view(stored.dtype).view(block.shape))
            self.bytes_read += len(raw)
        return into.numel()


def _poisoned(shape: Any, dtype: torch.dtype) -> Tensor:
    """Memory that must be filled: NaN, or the largest integer."""
    value = math.nan if dtype.is_floating_point else (1 if dtype is torch.bool else torch.iinfo(dtype).max)
    return torch.full(shape, value, dtype=dtype)


def empty_model(folder: Path, dtype: str, *, otherwise: str) -> tuple[Any, ShardedWeights]:
    """The model in a folder without memory for its parameters, and what fills it once it is sharded.

    Its buffers have their values, but for those that lie in the files. It is in evaluation mode, as
    from_pretrained() leaves it.

    Args:
        folder: of a checkpoint.
        dtype: of DTYPES; "auto" is the config's.
        otherwise: what would happen to random weights, for the error.

    Raises:
        NotByShardsError: from_pretrained() must take it; says why.
        ValueError: the folder does not hold what its config says; there is an adapter.
    """
    from transformers import GenerationConfig

    check_no_adapter(folder)
    config = load_config(folder)
    _check_config(config)
    found: Any = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if found is None:
        raise NotByShardsError("its config.json has no dtype")
    shapes, stored, fingerprint = _headers(folder)
    kind, key_mapping = auto_class(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=found)
    except (RuntimeError, NotImplementedError) as error:
        raise NotByShardsError(f"it cannot be made without memory: {error}") from None
    _check_model(model, found)
    _make_buffers(model)
    names = map_names(model, shapes, key_mapping)
    _check_names(folder, names, model.state_dict(), stored, otherwise)
    model._weight_conversions = names.transforms
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    state = model.state_dict()
    weights = ShardedWeights(
        folder,
        names.sources,
        {name: tuple(x.shape) for name, x in state.items()},
        {name: x.dtype for name, x in state.items()},
        fingerprint,
    )
    return model.eval(), weights


def _make_buffers(model: Any) -> None:
    """Makes buffers as from_pretrained() does, by the classes' initialisation; parameters have no part in it.

    (The constructors' own values may be of lower precision, as they are made in the model's dtype.)
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made.setdefault(id(buffer), (buffer, _poisoned(buffer.shape, buffer.dtype)))
                module._buffers[name] = made[id(buffer)][1]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    kept = model.state_dict().keys()  # those that lie in files
    for name, buffer in model.named_buffers():
        if name not in kept and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise NotByShardsError(f"{type(model).__name__} does not make {name} when it is initialised")


def _headers(folder: Path) -> tuple[dict[str, Shape], dict[str, torch.dtype], list[Any]]:
    """Shapes and dtypes of the tensors in a folder's files, and what tells the files from others."""
    if list(folder.glob("shard-*-model-*.safetensors")):
        raise NotByShardsError("its files are those of a distributed checkpoint")
    try:
        with open_folder(folder) as files:
            tensors = files.tensors
            fingerprint = [file.fingerprint() for file in files.files]
    except ValueError as error:
        begin = f"{folder}: "  # else it is one of its files
        text = str(error)
        raise NotByShardsError(text.replace(begin, "it ", 1) if text.startswith(begin) else text) from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return shapes, {name: tensor.dtype for name, tensor in tensors.items()}, fingerprint


def _check_config(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise NotByShardsError("it is quantised")
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ()):
        raise NotByShardsError("its config names other files of weights")


def _check_model(model: Any, dtype: torch.dtype) -> None:
    """Checks that all parameters are in one dtype, as fully_shard() wants."""
    names = ["_keep_in_fp32_modules_strict"] * (dtype in (torch.float16, torch.bfloat16))
    names += ["_keep_in_fp32_modules"] * (dtype is torch.float16)
    if any(getattr(model, name, None) for name in names):
        raise NotByShardsError(f"transformers keeps parts of {type(model).__name__} in float32")


def _check_names(
    folder: Path,
    names: Names,
    state: Mapping[str, Tensor],
    stored: Mapping[str, torch.dtype],
    otherwise: str,
) -> None:
    """Checks that every parameter is filled, and warns of tensors that are left over."""
    if names.lacking or names.differing:
        raise lacking_error(folder, names.lacking or names.differing, otherwise)
    for name, sources in names.sources.items():
        for source in sources:
            kind = stored[source.key]
            if kind.is_floating_point != state[name].dtype.is_floating_point or kind.itemsize == 1:
                raise NotByShardsError(f"its {source.key} is in {str(kind).removeprefix('torch.')}")
    if names.unused:
        warnings.warn(f"{folder}: nothing takes its {few(names.unused)}", stacklevel=3)
