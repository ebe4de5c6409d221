"""Safetensors files and folders of them: reads, checks and makes headers.

A file has 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes, without gaps. So the header gives the position of every tensor before any is read or
written. Headers and indices are untrusted input and are checked: an error is a ValueError that names the
file. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_kernels._files import reason

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors package's own limit
AGAIN = "the file is damaged or was not copied whole: get it again"

# torch's name, which is imported only where tensors are made, and bytes of an element
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch that is called so in a file."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name][0])
    return found


def read_at(fd: int, buffer: memoryview, begin: int) -> int:
    """Fills `buffer` (bytes) from byte `begin` on; returns how many were read: fewer at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], begin + done)
        if count == 0:
            break
        done += count
    return done


def _open_regular(path: Path) -> tuple[int, os.stat_result]:
    """(file descriptor for reading, status of the file); ValueError unless it is a regular file."""
    try:
        # non-blocking: opening a named pipe would wait for its other end
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = reason(error) if isinstance(error, OSError) else error
        raise ValueError(f"{path}: cannot be opened: {why}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ValueError(f"{path}: is not a regular file")
    return fd, status


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `begin` is the position of its first byte in the file."""

    name: str
    file: SafetensorsFile
    dtype_name: str
    shape: tuple[int, ...]
    begin: int

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype in torch."""
        return torch_dtype(self.dtype_name)

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return DTYPES[self.dtype_name][1]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.itemsize


class SafetensorsFile:
    """An open file whose header has been checked; `tensors` by name, in the order of their bytes.

    Args:
        path: the file. Symbolic links are followed, since the hub's cache consists of them.

    Raises:
        ValueError: the file does not exist, cannot be read, is not a regular file, or has a wrong header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd, status = _open_regular(path)
        try:
            self.size, self._mtime_ns = status.st_size, status.st_mtime_ns
            header = self._read_header()
            self.header_sha256 = hashlib.sha256(header).hexdigest()
            data_begin = 8 + len(header)
            parsed = _parse_json(path, header)
            self.metadata: dict[str, str] = parsed.get("__metadata__", {})  # checked with the entries
            self.tensors = {tensor.name: tensor for tensor in _entries(self, parsed, data_begin)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file. Errors are ignored, since it was only read."""
        with contextlib.suppress(OSError):
            os.close(self.fd)

    def fingerprint(self) -> list[Any]:
        """A description of the file that changes with its content: name, size, time, hash of the header."""
        return [self.path.name, self.size, self._mtime_ns, self.header_sha256]

    def check_unchanged(self) -> None:
        """Raises ValueError if the file was written to or replaced since it was opened."""
        for status in (os.fstat(self.fd), os.stat(self.path)):
            if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
                raise ValueError(f"{self.path}: changed while it was read; let nothing write to it and retry")

    def read_into(self, buffer: memoryview, begin: int) -> None:
        """Fills `buffer` (bytes) from byte `begin` of the file on.

        Raises:
            ValueError: the file ends before `buffer` is full.
        """
        try:
            count = read_at(self.fd, buffer, begin)
        except OSError as error:
            raise self.read_error(error) from None
        if count < len(buffer):
            raise ValueError(f"{self.path}: ends at byte {begin + count}, inside a tensor; {AGAIN}")

    def read_error(self, error: OSError) -> OSError:
        """`error` of a read, which names the file."""
        return OSError(error.errno, f"could not be read ({reason(error)})", str(self.path))

    def _read_header(self) -> bytes:
        path, size = self.path, self.size
        if size < 8:
            raise ValueError(f"{path}: {size} bytes are too few for a safetensors file; {AGAIN}")
        first = bytearray(8)
        self.read_into(memoryview(first), 0)
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise ValueError(
                f"{path}: says that its header has {length} bytes, but has {size} in all; {AGAIN}"
            )
        if length > LONGEST_HEADER:
            raise ValueError(
                f"{path}: its header has {length} bytes; a safetensors header has at most {LONGEST_HEADER}"
            )
        header = bytearray(length)
        self.read_into(memoryview(header), 8)
        return bytes(header)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object; a key that appears twice is an error."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{shown(twice)} is in it twice")
        return result

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number too long
        raise ValueError(f"{path}: is not proper JSON where it must be ({error}); {AGAIN}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: holds JSON, but not an object {{name: ...}}; {AGAIN}")
    return parsed


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError names the file if there is none."""
    try:
        fd, status = _open_regular(path)
        try:
            text = bytearray(min(status.st_size, LONGEST_HEADER + 1))
            count = read_at(fd, memoryview(text), 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from None
    if count > LONGEST_HEADER:
        raise ValueError(f"{path}: has {status.st_size} bytes; at most {LONGEST_HEADER} are read")
    return _parse_json(path, bytes(text[:count]))


def shown(name: object) -> str:
    """A name from a file, made fit for a message: on one line and not too long."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _entries(file: SafetensorsFile, header: dict[str, Any], data_begin: int) -> list[StoredTensor]:
    """The tensors of a header, in the order of their bytes; ValueError unless they fill the file exactly."""
    path = file.path
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError(f"{path}: __metadata__ must map strings to strings; {AGAIN}")
    found = []
    for name, entry in header.items():
        what = f"{path}: tensor {shown(name)}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{what} must be described by dtype, shape and data_offsets only; {AGAIN}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{what} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_count, shape)):
            raise ValueError(f"{what} has shape {shown(shape)}, which is not a list of lengths; {AGAIN}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
            raise ValueError(f"{what} has data_offsets {shown(offsets)}, not two positions; {AGAIN}")
        tensor = StoredTensor(name, file, dtype, tuple(shape), data_begin + offsets[0])
        if offsets[1] - offsets[0] != tensor.nbytes:
            raise ValueError(
                f"{what}, {dtype} {shown(shape)}, has {shown(offsets[1] - offsets[0])} bytes, but needs "
                f"another number; {AGAIN}"
            )
        found.append(tensor)
    found.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    at = data_begin
    for tensor in found:
        if tensor.begin != at:
            wrong = "overlaps the tensor before it" if tensor.begin < at else "lies after a gap"
            raise ValueError(f"{path}: tensor {shown(tensor.name)} {wrong}; {AGAIN}")
        at += tensor.nbytes
    if at != file.size:
        raise ValueError(
            f"{path}: its header describes {shown(at)} bytes, and the file has {file.size}; {AGAIN}"
        )
    return found


@dataclass(frozen=True)
class SourceFolder:
    """The weights of a checkpoint folder; all files are open and their headers checked."""

    path: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, StoredTensor]

    def check_unchanged(self) -> None:
        """Raises ValueError if a file has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[SourceFolder]:
    """Opens the weights of a checkpoint folder: model.safetensors, or the files that its index lists.

    Raises:
        ValueError: there is neither, or both; a file is wrong; a tensor is missing or in two files; the index
            names anything but files in its folder.
    """
    with contextlib.ExitStack() as stack:
        files: list[SafetensorsFile] = []

        def opened(name: str) -> SafetensorsFile:
            file = SafetensorsFile(path / name)
            stack.callback(file.close)
            files.append(file)
            return file

        single, index = os.path.lexists(path / SINGLE_FILE), os.path.lexists(path / INDEX_FILE)
        if single and index:
            raise ValueError(f"{path}: has both {SINGLE_FILE} and {INDEX_FILE}; keep the one that is meant")
        if single:
            tensors = dict(opened(SINGLE_FILE).tensors)
        elif index:
            tensors = _read_index(path / INDEX_FILE, opened)
        else:
            raise ValueError(_no_weights(path))
        yield SourceFolder(path, tuple(files), tensors)


def _read_index(index: Path, opened: Any) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map {{tensor: file}}; {AGAIN}")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not plain:
            raise ValueError(
                f"{index}: tensor {shown(name)} is said to be in {shown(file)}; only safetensors files of "
                "the index's own folder are read, named without a path"
            )
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        file = opened(file_name)
        for name, tensor in file.tensors.items():
            if name in tensors:
                other = tensors[name].file.path.name
                raise ValueError(f"{file.path}: holds {shown(name)}, and so does {other}; keep one of them")
            if weight_map.get(name) != file_name:
                where = f"in {shown(weight_map[name])}" if name in weight_map else "nowhere"
                raise ValueError(f"{file.path}: holds {shown(name)}, which {index.name} says is {where}")
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"{index.parent / file_name}: lacks {shown(name)}, which {index.name} puts there"
            )
    return {name: tensors[name] for name in weight_map}


def _no_weights(path: Path) -> str:
    wanted = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if other:
        return (
            f"{path}: has {wanted}, only {', '.join(other[:3])}. Pickled weights are not read: load the "
            "model with transformers and save_pretrained() it, which writes safetensors"
        )
    return f"{path}: has {wanted}; is it the folder of a checkpoint?"


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """(first bytes of a file with these tensors, position of each) for (name, dtype, shape) of each tensor.

    The tensors are in the given order. The metadata says that they come from torch, as transformers requires.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins = []
    at = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype][1]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        begins.append(at)
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8 bytes
    first = struct.pack("<Q", len(text)) + text
    return first, [len(first) + begin for begin in begins]
