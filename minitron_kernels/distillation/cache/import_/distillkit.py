"""arcee-ai/DistillKit's offline log-probabilities: parquet files beside a compression_config.yaml.

A row is a sequence: input_ids [T]; compressed_logprobs [T or T - 1, bytes], bytepacked_indices likewise.
The bytes of a position, in the order of their configuration (d tokens, k ids, likeliest first):

    exact_k log-probabilities in exact_dtype
    the coefficients of polynomial_terms in term_dtype: the other ids' log-probabilities, as a function of
        0, 1, 2 ...
    for each residual bin its scale, then num_elements integers of element_bits bits, the highest bit first

Source: DistillKit, distillkit/compression (read at its revision a61c2e7 of March 2026).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_kernels.distillation.cache.import_.tails import check_tail, refuse, topk_payload

CONFIG_FILE = "compression_config.yaml"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SPECIAL = {"sqrt": torch.sqrt, "exp": torch.exp}
_LEGACY = ("packed_indices", "exact_values", "coeffs")


@dataclass(frozen=True)
class DistillKitConfig:
    """What a capture's compression_config.yaml says; names are DistillKit's."""

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[tuple[str, int, int], ...] = ()  # (scale_dtype, element_bits, num_elements)
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @staticmethod
    def of(given: Mapping[str, Any], where: str = "config") -> DistillKitConfig:
        """From the mapping that the YAML holds.

        Raises:
            ValueError: an entry is unknown, missing, or cannot be; `where` is named.
        """
        known = {field.name for field in fields(DistillKitConfig)}
        if not isinstance(given, Mapping) or (unknown := sorted(set(given) - known)):
            what = f"has {unknown[0]!r}" if isinstance(given, Mapping) else f"is {type(given).__name__}"
            refuse(where, f"{what}, which is not known of DistillKit's DistributionQuantizationConfig")
        values = dict(given)
        for name in ("d", "k", "exact_k"):
            value = values.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name != "exact_k"):
                refuse(where, f"{name} must be a positive int, got {value!r}")
        if not values["exact_k"] <= values["k"] <= values["d"]:
            refuse(
                where, f"exact_k <= k <= d must hold, got {values['exact_k']}, {values['k']}, {values['d']}"
            )
        terms = values["polynomial_terms"] = tuple(values.get("polynomial_terms") or ())
        for term in terms:
            if term not in _SPECIAL and (not isinstance(term, int) or isinstance(term, bool)):
                refuse(where, f"polynomial_terms must be integers, 'sqrt' or 'exp', got {term!r}")
        bins = []
        for entry in values.get("residual_bins") or ():
            names = {"scale_dtype", "element_bits", "num_elements"}
            if not isinstance(entry, Mapping) or set(entry) != names:
                refuse(where, f"residual_bins must have {', '.join(sorted(names))}, got {entry!r}")
            bins.append((entry["scale_dtype"], entry["element_bits"], entry["num_elements"]))
            if bins[-1][0] not in _DTYPES or not 1 <= bins[-1][1] <= 62 or bins[-1][2] < 1:
                refuse(where, f"residual_bins has {entry!r}, which cannot be read")
        values["residual_bins"] = tuple(bins)
        config = DistillKitConfig(**values)
        for name in ("exact_dtype", "term_dtype"):
            if getattr(config, name) not in _DTYPES:
                refuse(where, f"{name} must be one of {', '.join(_DTYPES)}, got {getattr(config, name)!r}")
        if sum(elements for _, _, elements in bins) > config.k - config.exact_k:
            refuse(where, f"residual_bins have more elements than k - exact_k, {config.k - config.exact_k}")
        return config

    @property
    def id_bits(self) -> int:
        """Bits of an id: log2(d) in float32, rounded up, as DistillKit has it."""
        return int(torch.log2(torch.tensor(self.d, dtype=torch.float32, device="cpu")).ceil())

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a position's log-probabilities."""
        size = self.exact_k * _DTYPES[self.exact_dtype].itemsize
        size += len(self.polynomial_terms) * _DTYPES[self.term_dtype].itemsize
        return size + sum(
            _DTYPES[dtype].itemsize + -(-bits * n // 8) for dtype, bits, n in self.residual_bins
        )

    @property
    def id_bytes(self) -> int:
        """Bytes of a position's ids."""
        return -(-self.k * self.id_bits // 8)


def read_distillkit(
    source: str | Path | Iterable[Mapping[str, Any]],
    config: DistillKitConfig | Mapping[str, Any] | None = None,
    *,
    pad_id: int | None = None,
    tail: str = "rest",
    slack: float = 0.02,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Sequences of a DistillKit capture.

    Args:
        source: the folder that DistillKit's capture wrote (data_0.parquet, ..., compression_config.yaml;
            needs pyarrow and PyYAML), or rows: mappings with its columns, as a datasets.Dataset gives them.
        config: its configuration; by default that of the folder.
        pad_id: the tokenizer's pad_token_id (or eos_token_id, where it has none). DistillKit appends it to a
            sequence that is shorter than its limit, to have a row at each token before it; it is dropped
            where it is the last token and has no row. Not given, such a sequence is found only by data that
            end in the same token.
        tail: "rest": what the k probabilities leave of 1 (they are of a softmax over all tokens); or
            "renormalise", see tails.py.
        slack: how far above 1 a position's sum may be for what the compression lost, before it is refused.

    Yields:
        (token_ids [T] int64, payload of tier "topk"). A capture has no row at its last token.

    Raises:
        ModuleNotFoundError: pyarrow or PyYAML is needed.
        ValueError: the folder or a row is not of this format, damaged, or of DistillKit's older format (which
            keeps centred logits: their share of the softmax cannot be known); names file and row.
    """
    check_tail(tail, "DistillKit's format")
    if isinstance(source, str | Path):
        folder = Path(source)
        files = _files(folder)
        config = config or _config_of(folder)
        rows: Iterable[tuple[str, Mapping[str, Any]]] = _parquet_rows(files)
    else:
        if config is None:
            raise ValueError(f"config must be given with rows: what {CONFIG_FILE} of the capture says")
        rows = ((f"row {number}", row) for number, row in enumerate(source))
    if not isinstance(config, DistillKitConfig):
        config = DistillKitConfig.of(config)
    return _sequences(rows, config, pad_id, tail, slack)


def _sequences(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    config: DistillKitConfig,
    pad_id: int | None,
    tail: str,
    slack: float,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for where, row in rows:
        if all(name in row for name in _LEGACY):
            refuse(
                where,
                "is of DistillKit's older format, which keeps logits minus their mean: the ids' share of the "
                "softmax cannot be known from them. Capture anew with DistillKit's logprob_compressor",
            )
        for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
            if name not in row:
                refuse(
                    where, f"has no {name!r}: it is not a row of DistillKit's compressed log-probabilities"
                )
        tokens = _numbers(row["input_ids"]).to(torch.int64)
        data = _matrix(row["compressed_logprobs"], config.logprob_bytes, f"{where}: compressed_logprobs")
        packed = _matrix(row["bytepacked_indices"], config.id_bytes, f"{where}: bytepacked_indices")
        if tokens.dim() != 1 or len(data) != len(packed):
            refuse(where, f"has {len(data)} rows of log-probabilities and {len(packed)} of ids")
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= config.d):
            refuse(
                where, f"input_ids must be in [0, {config.d}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        if len(data) == len(tokens) - 1 and pad_id is not None and int(tokens[-1]) == pad_id:
            tokens = tokens[:-1]
        ids = _high_bit_first(packed, config.id_bits, config.k)
        options = {"tail": tail, "vocab_size": config.d, "length": len(tokens), "slack": slack}
        yield tokens, topk_payload(where, ids, _logprobs(data, config), **options)  # type: ignore[arg-type]


def _logprobs(data: Tensor, config: DistillKitConfig) -> Tensor:
    """[T, k] float64 of [T, logprob_bytes]."""
    at = 0

    def take(dtype: str, count: int) -> Tensor:
        nonlocal at
        size = _DTYPES[dtype].itemsize * count
        part = data[:, at : at + size].clone(memory_format=torch.contiguous_format)
        at += size
        return part.view(_DTYPES[dtype]) if count else part.new_empty((len(data), 0), dtype=_DTYPES[dtype])

    exact = take(config.exact_dtype, config.exact_k).to(torch.float64)
    fitted = config.k - config.exact_k
    approximate = torch.zeros(len(data), fitted, dtype=torch.float64, device=data.device)
    if config.polynomial_terms:
        coefficients = take(config.term_dtype, len(config.polynomial_terms))
        if config.normalize_t:
            t = torch.linspace(0, 1, steps=fitted, dtype=coefficients.dtype, device=data.device)
        else:
            t = torch.arange(fitted, device=data.device).to(coefficients.dtype)
        terms = [_SPECIAL[i](t) if isinstance(i, str) else t**i for i in config.polynomial_terms]
        # in term_dtype, in which the capture made the residuals
        approximate += (torch.stack(terms, -1) * coefficients[:, None, :]).sum(-1).to(torch.float64)
    first = 0
    for dtype, bits, count in config.residual_bins:
        scale = take(dtype, 1).to(torch.float64)
        size = -(-bits * count // 8)
        integers = _high_bit_first(data[:, at : at + size], bits, count).to(torch.float64)
        at += size
        steps = 2 * integers - 1 if bits == 1 else integers - 2 ** (bits - 1)
        approximate[:, first : first + count] += steps * scale
        first += count
    logprobs = torch.cat((exact, approximate), -1)
    return logprobs.cumsum(-1) if config.delta_encoding else logprobs


def _high_bit_first(data: Tensor, bits: int, count: int) -> Tensor:
    """[T, count] int64 of integers that lie behind each other, each with its highest bit first."""
    each = (data[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=data.device)) & 1
    each = each.reshape(len(data), data.shape[1] * 8)[:, : bits * count].reshape(len(data), count, bits)
    value = torch.zeros(len(data), count, dtype=torch.int64, device=data.device)
    for i in range(bits):
        value = (value << 1) | each[..., i]
    return value


def _numbers(value: Any) -> Tensor:
    if hasattr(value, "values") and hasattr(value.values, "to_numpy"):  # a list of pyarrow
        return torch.from_numpy(value.values.to_numpy(zero_copy_only=False).astype("int64"))
    return torch.as_tensor(value, device="cpu")


def _matrix(value: Any, width: int, where: str) -> Tensor:
    """[rows, width] uint8 of a list of lists."""
    if hasattr(value, "values") and hasattr(value.values, "value_lengths"):  # lists of lists of pyarrow
        lists = value.values
        widths = set(lists.value_lengths().to_pylist())
        flat = torch.from_numpy(lists.flatten().to_numpy(zero_copy_only=False).copy())
    else:
        rows = value if isinstance(value, Tensor) else list(value)
        widths = {len(row) for row in rows}
        flat = (
            value.reshape(-1)
            if isinstance(value, Tensor)
            else torch.tensor([x for row in rows for x in row], device="cpu")
        )
    if widths - {width}:
        refuse(where, f"rows must have {width} bytes by the configuration, got {sorted(map(str, widths))[0]}")
    if flat.numel() and (flat.is_floating_point() or int(flat.min()) < 0 or int(flat.max()) > 255):
        refuse(where, "must be bytes")
    return flat.to(torch.uint8).reshape(-1, width) if flat.numel() else flat.new_empty((0, width)).byte()


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("data_*.parquet"), key=lambda path: (len(path.name), path.name))
    if not files:
        what = "is not a folder" if not folder.is_dir() else "has no data_0.parquet"
        raise ValueError(f"{folder}: {what}; give the folder that DistillKit's capture wrote, or its rows")
    return files


def _config_of(folder: Path) -> DistillKitConfig:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {CONFIG_FILE} needs PyYAML: pip install pyyaml, or give config="
        ) from None
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: has no {CONFIG_FILE}: give config=, what the capture was made with")
    try:
        return DistillKitConfig.of(yaml.safe_load(path.read_text()), str(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {error}") from None


def _parquet_rows(files: list[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading DistillKit's parquet files needs pyarrow: pip install pyarrow"
        ) from None
    for path in files:
        number = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
                for i in range(batch.num_rows):
                    yield f"{path}: row {number}", {name: batch[name][i] for name in batch.schema.names}
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: is damaged, or not parquet: {error}") from None
