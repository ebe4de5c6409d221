"""Documents of files: text, JSON lines, Parquet, Arrow (data sets on disk), token ids; compressed or not.

Files are read, unpacked and decoded a part at a time: what is in memory is a document, not a file.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import functools
import gzip
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

# of files in a folder, those that are read
SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".parquet", ".arrow", ".npy")
_PLAIN = (".txt", ".md")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KEYS = ("text", "messages")  # of which the first that a document has is read, unless a key is named
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"

_CHUNK = 1 << 20  # bytes that are read at once
_LONGEST_LINE = 1 << 26  # characters in which the first line of a text must end, to be looked at

# first bytes of files that are not text -> what unpacks them
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
_ZIP = b"PK\x03\x04"
# first bytes of files that are read by their suffix alone -> what they are, and that suffix
_BINARY = {
    b"PAR1": ("Parquet", ".parquet"),
    _ARROW_FILE: ("Arrow", ".arrow"),
    _ARROW_STREAM: ("Arrow", ".arrow"),
    b"\x93NUMPY": ("an array of NumPy", ".npy"),
}
_HEAD = 8  # bytes by which all of these are known


def expand(files: Sequence[Path]) -> list[Path]:
    """The files, and in place of a folder those in it that have a known suffix, by name.

    What is hidden in a folder is not its data, and a README.md is not where there are files other than text.

    Raises:
        FileNotFoundError, ValueError: there is no such file; a folder has none.
    """
    found = []
    for file in files:
        if not file.exists():
            raise FileNotFoundError(2, "there is no such file", str(file))
        if not file.is_dir():
            found.append(file)
            continue
        if not os.access(file, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        inside = [path for path in sorted(file.rglob("*")) if kind_of(path) in SUFFIXES]
        inside = [path for path in inside if path.is_file() and not _is_hidden(path.relative_to(file))]
        if any(kind_of(path) not in _PLAIN for path in inside):
            inside = [path for path in inside if path.name.lower() != "readme.md"]
        if not inside:
            raise ValueError(f"{file}: is a folder without {', '.join(SUFFIXES)} files")
        found += inside
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def kind_of(file: Path) -> str:
    """The suffix that tells what a file holds, in small letters, that of compression apart."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def is_ids(file: Path) -> bool:
    """Whether the file holds token ids, for which no tokenizer is needed."""
    return file.suffix.lower() == ".npy"


def has_text(files: Sequence[Path]) -> bool:
    """Whether one of the files, or of those in folders, is text, for which a tokenizer is needed."""
    return any(not is_ids(file) for file in expand(files))


def check_files(files: Sequence[str], option: str) -> None:
    """Checks that there are files, before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: there is no such file, said with the option; a folder has none.
    """
    for file in files:
        if not Path(file).exists():
            raise FileNotFoundError(2, f"there is no such file ({option})", file)
    expand([Path(file) for file in files])


def texts(file: Path, tokenizer: Any, text_key: str | None = None) -> Iterator[str]:
    """The texts of a file that is not .npy, one after the other.

    Chat messages, a list of {"role", "content"}, become text by the tokenizer's chat template.

    Args:
        file: as expand() gives them.
        tokenizer: of transformers.
        text_key: the key or column with the text or the messages; None: "text", or else "messages".

    Raises:
        ValueError: the file cannot be read as its suffix says; names it, and what to do.
    """
    kind = kind_of(file)
    if kind in (".parquet", ".arrow"):
        for number, value in enumerate(_column(file, kind, text_key)):
            yield _as_text(value, tokenizer, f"{file}: row {number}", text_key or "text")
        return
    if kind == ".json":
        raise ValueError(
            f'{file}: a .json is not read: write a .jsonl, with an object {{"text": ...}} on each line '
            "(if it has these lines already, rename it)"
        )
    if _is_text(file):
        yield "".join(piece for piece, _ in _pieces_of_text(file, text_key, _CHUNK))
        return
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield _of_line(line, tokenizer, text_key, f"{file}: line {number}")


def pieces(file: Path, tokenizer: Any, text_key: str | None, size: int) -> Iterator[tuple[str, bool]]:
    """The texts() of a file in pieces of `size` characters, each with whether it is the last of its text.

    A text that is a file of its own is never in memory as a whole.
    """
    if _is_text(file):
        yield from _pieces_of_text(file, text_key, size)
        return
    for text in texts(file, tokenizer, text_key):
        for begin in range(0, max(len(text), 1), size):
            yield text[begin : begin + size], begin + size >= len(text)


def _is_text(file: Path) -> bool:
    """Whether the file is one text, and not documents."""
    return kind_of(file) not in (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")


def ids(file: Path) -> np.ndarray:
    """The token ids of a .npy, flat; they stay in the file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read as token ids: {error}") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{file}: token ids must be integers, got {array.dtype}")
    return array.reshape(-1)


def _chunks(file: Path) -> Iterator[bytes]:
    """The bytes of a file of text, unpacked, some at a time.

    Raises:
        ValueError: it cannot be unpacked, or holds something else than text; says what to do.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
        stream.seek(0)
        if not _is_packed(head):
            _check_text(file, head)
            yield from iter(functools.partial(stream.read, _CHUNK), b"")
            return
        begin = b""
        for chunk in _unpacked(file, head, stream):
            if len(begin) < _HEAD:
                begin += chunk[:_HEAD]
                _check_text(file, begin, packed=True)
            yield chunk


def _check_text(file: Path, head: bytes, *, packed: bool = False) -> None:
    """Raises ValueError where what begins so is a format of its own, and not text."""
    if head.startswith(_ZIP):
        raise ValueError(
            f"{file}: must be text, .jsonl or .npy, but is a zip archive (.zip, .npz): unpack it first; "
            "token ids go into a .npy by numpy.save()"
        )
    for magic, (name, suffix) in _BINARY.items():
        if head.startswith(magic) and packed:
            raise ValueError(f"{file}: holds {name}, compressed as a whole: unpack it, to a {suffix}")
        if head.startswith(magic):
            raise ValueError(f"{file}: is {name}, but is not called so: rename it to {suffix}")


def _is_packed(head: bytes) -> bool:
    return head.startswith((*_UNPACKERS, _ZSTD))


def _unpacked(file: Path, head: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    if head.startswith(_ZSTD):
        yield from _unzstd(file, stream)
        return
    unpacked = next(unpacked for magic, unpacked in _UNPACKERS.items() if head.startswith(magic))
    try:
        yield from iter(functools.partial(unpacked(stream).read, _CHUNK), b"")
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file}: cannot be unpacked: {error}") from None


def _unzstd(file: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{file}: is compressed by zstd: pip install zstandard, or unpack it by unzstd"
        ) from None
    frame: Any = None
    for data in iter(
        functools.partial(stream.read, max(1, _CHUNK // 16)), b""
    ):  # it may be far longer unpacked
        while data:  # frame by frame
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise ValueError(f"{file}: cannot be unpacked: {error}") from None
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise ValueError(f"{file}: cannot be unpacked: it ends within a frame")


def _characters(file: Path) -> Iterator[str]:
    """The text of a file, some at a time, without a byte order mark."""
    decoder, at = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for chunk in itertools.chain(_chunks(file), (None,)):
        begin = at - len(decoder.getstate()[0])  # where the first byte is that waits for others
        try:
            text = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            wrong = begin + error.start
            raise ValueError(f"{file}: must be text in UTF-8, but byte {wrong} is not") from None
        at += len(chunk or b"")
        if text:
            yield text


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, ended by line feeds alone: splitlines() would split inside strings, at U+2028."""
    held: list[str] = []
    for text in _characters(file):
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join((*held, line))
            held = []
        held.append(rest)
    yield "".join(held)


def _pieces_of_text(file: Path, text_key: str | None, size: int) -> Iterator[tuple[str, bool]]:
    """A file that is one text, in pieces of `size` characters, each with whether it is the last."""
    held, looked = "", False
    for text in itertools.chain(_characters(file), (None,)):
        held += text or ""
        if not looked:
            begin = held.lstrip()
            line_goes_on = begin.startswith("{") and "\n" not in begin
            if text is not None and len(held) < _LONGEST_LINE and (line_goes_on or not begin):
                continue
            _check_not_lines(file, held, text_key)
            looked = True
        followed = max(0, len(held) - 1) // size * size
        for begins in range(0, followed, size):
            yield held[begins : begins + size], False
        held = held[followed:]
    yield held, True


def _check_not_lines(file: Path, text: str, text_key: str | None) -> None:
    """Raises ValueError if the first line is an object with a text: then the file is not a text."""
    first = next((line for line in text.split("\n", 8) if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return
    try:
        found = json.loads(first)
    except ValueError:
        return
    for key in KEYS if text_key is None else (text_key,):
        if isinstance(found.get(key), str | list):
            raise ValueError(f'{file}: has lines of JSON with a "{key}": rename it to .jsonl')


def _of_line(line: str, tokenizer: Any, text_key: str | None, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    wanted = KEYS if text_key is None else (text_key,)
    key = next((key for key in wanted if isinstance(found, dict) and key in found), None)
    if key is None:
        has = f": it has {', '.join(map(repr, list(found)[:8]))}" if isinstance(found, dict) else ""
        other = "; name another key by text_key" if has else ""
        raise ValueError(f'{where} is not a JSON object with a "{wanted[0]}"{has}{other}')
    return _as_text(found[key], tokenizer, where, key)


def _column(file: Path, kind: str, text_key: str | None) -> Iterator[Any]:
    """The values of a column, read a part at a time."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    if _is_packed(head):
        raise ValueError(f"{file}: is a {kind} that is compressed as a whole: unpack it, to a {kind}")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: needs pyarrow: pip install pyarrow") from None
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            key = _key_of(table.schema_arrow.names, text_key, file)
            parts = table.iter_batches(columns=[key], batch_size=1024)
        else:
            opens = pyarrow.ipc.open_file if head.startswith(_ARROW_FILE) else pyarrow.ipc.open_stream
            source = opens(pyarrow.memory_map(str(file)))
            key = _key_of(source.schema.names, text_key, file)
            whole = opens is pyarrow.ipc.open_file
            parts = map(source.get_batch, range(source.num_record_batches)) if whole else iter(source)
        for part in parts:
            yield from part.column(part.schema.get_field_index(key)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as {kind[1:]}: {error}") from None


def _key_of(names: Sequence[str], text_key: str | None, file: Path) -> str:
    wanted = KEYS if text_key is None else (text_key,)
    for key in wanted:
        if key in names:
            return key
    raise ValueError(
        f"{file}: has no column {wanted[0]!r}, but {', '.join(map(repr, names[:8]))}; name one by text_key"
    )


def _as_text(value: Any, tokenizer: Any, where: str, key: str = "text") -> str:
    if isinstance(value, str):
        return value
    chat = isinstance(value, list) and all(isinstance(each, Mapping) and "role" in each for each in value)
    if not chat or not value:
        raise ValueError(
            f'{where} must have a string as its "{key}", or messages with "role" and "content", got '
            f"{type(value).__name__}"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{where} has chat messages, but the tokenizer has no chat template to write them by"
        )
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # templates raise errors of their own
        raise ValueError(f"{where}: the chat template refuses its messages: {error}") from None
