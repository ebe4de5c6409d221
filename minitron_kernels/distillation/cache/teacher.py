"""CachedTeacher: a teacher that is read from a cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels.distillation.cache.fill import as_teacher
from minitron_kernels.distillation.cache.fingerprint import (
    head_fingerprint,
    model_fingerprint,
    tokenizer_hash,
)
from minitron_kernels.distillation.cache.outputs import payloads_of
from minitron_kernels.distillation.cache.payload import decode, encode
from minitron_kernels.distillation.cache.reader import TeacherCache, assembled
from minitron_kernels.distillation.cache.sampling import sampled_logprobs
from minitron_kernels.distillation.cache.sequences import sequences_of
from minitron_kernels.distillation.cache.spec import CacheSpec
from minitron_kernels.distillation.signals import DenseSignal, SparseSignal, TeacherSignal


class CachedTeacher:
    """A Teacher whose signals come from a cache: SparseSignal for tiers sampled and topk, DenseSignal for
    hidden.

    Rows are found by the tokens of their sequence, whatever batch, padding or packing they come in.

    Args:
        cache: a folder, or a TeacherCache.
        head: tier hidden: the teacher's output layer: its weight [V, H], (weight, bias), a module, or the
            folder of a checkpoint, of which nothing else is read but config.json. It must be the one that was
            cached.
        fallback: a ModelTeacher or model that is run for sequences that are not in the cache; by default
            they are an error. It must be the teacher that was cached.
        vocab_size: the student's; must be the cache's.
        tokenizer: the student's; must have the cache's tokens.
        device: where signals are to be; by default that of `input_ids`.

    Raises:
        ValueError: not a cache; another head, vocabulary or teacher than the cache's.
        TypeError: an argument of a wrong kind; a head for a tier that has none.
    """

    def __init__(
        self,
        cache: str | Path | TeacherCache,
        *,
        head: Any = None,
        fallback: Any = None,
        vocab_size: int | None = None,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self.device = None if device is None else torch.device(device)
        self._weight, self._bias = _head(head, self.spec)
        self._fallback = None
        if fallback is not None:
            self._fallback, self._fallback_device = as_teacher(fallback)
            model = getattr(self._fallback, "model", None)
            if not self.spec.teacher.startswith("model:"):
                pass  # known by a name, which a model does not have
            elif not isinstance(model, nn.Module):
                raise TypeError(
                    "fallback must be a model or a ModelTeacher, to be compared with the cached one"
                )
            elif self.spec.teacher != model_fingerprint(
                model, disable_adapters=getattr(self._fallback, "disable_adapters", False)
            ):
                raise ValueError("fallback is not the teacher that was cached: its config or weights differ")
        self.check_student(vocab_size, tokenizer)

    @property
    def spec(self) -> CacheSpec:
        """What the cache holds."""
        return self.cache.spec

    def check_student(self, vocab_size: int | None = None, tokenizer: Any = None) -> None:
        """Refuses a student with another vocabulary than the cache's.

        Raises:
            ValueError: vocab_size or the tokenizer's tokens differ.
        """
        if vocab_size is not None and vocab_size != self.spec.vocab_size:
            raise ValueError(
                f"{self.cache.folder}: is of a vocabulary of {self.spec.vocab_size}, and the student's has "
                f"{vocab_size}: cached tokens would mean others"
            )
        if tokenizer is not None and self.spec.tokenizer not in (None, tokenizer_hash(tokenizer)):
            raise ValueError(f"{self.cache.folder}: was made with another tokenizer than the student's")

    def __call__(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> TeacherSignal:
        """The signal for a batch; see sequences_of() for what a batch is.

        Raises:
            UncachedError: a sequence is not in the cache, and there is no fallback.
            ValueError: outputs of layers, which are not kept, other than the last one's of tier hidden.
        """
        layers = tuple(layers)
        last = None if self.spec.num_layers is None else self.spec.num_layers - 1
        if refused := [layer for layer in layers if layer != last]:
            raise ValueError(
                f"{self.cache.folder}: keeps no output of layer {refused[0]}: losses of hidden states need a "
                "ModelTeacher" + ("" if last is None else f", or layer {last}, the last")
            )
        with torch.no_grad():
            rows = self._lookup(batch)
            device = self.device or batch["input_ids"].device
            rows = {name: x.to(device, non_blocking=True) for name, x in rows.items()}
            return self._signal(rows, layers)

    def _lookup(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self._fallback is None and "input_ids" in batch:
            return self.cache.lookup(**batch)
        sequences = sequences_of(batch)
        absent = [found for found in sequences if found.tokens not in self.cache]
        of_model: dict[bytes, dict[str, Tensor]] = {}
        if absent:
            fresh = payloads_of(self._fallback, absent, self.spec, self._fallback_device)
            for found, payload in zip(absent, fresh, strict=True):
                # as they would come out of the cache
                fields = encode(found.tokens, payload, self.spec)
                of_model[found.tokens.numpy().tobytes()] = decode(fields, len(found.tokens), self.spec)
        payloads = [
            of_model[key]
            if (key := found.tokens.numpy().tobytes()) in of_model
            else self.cache.row(found.tokens)
            for found in sequences
        ]
        return assembled(sequences, payloads, tuple(batch["input_ids"].shape), self.spec)

    def _signal(self, rows: dict[str, Tensor], layers: tuple[int, ...]) -> TeacherSignal:
        spec = self.spec
        if spec.tier == "hidden":
            assert self._weight is not None
            hidden = rows["hidden"]
            if self._weight.device != hidden.device:
                self._weight = self._weight.to(hidden.device)
                self._bias = None if self._bias is None else self._bias.to(hidden.device)
            hidden = hidden.to(self._weight.dtype)
            kept = {layer: hidden for layer in layers}
            return DenseSignal(hidden, self._weight, self._bias, spec.logit_scale or 1.0, spec.softcap, kept)
        if spec.tier == "sampled":
            logprobs = sampled_logprobs(rows["counts"])
            return SparseSignal(rows["ids"], logprobs, None, vocab_size=spec.vocab_size)
        tail = {t: rows["log_tail"][..., i] for i, t in enumerate(spec.temperatures)}
        return SparseSignal(rows["ids"], rows["logprobs"], tail, vocab_size=spec.vocab_size)


def _head(head: Any, spec: CacheSpec) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of the teacher's head, after a comparison with the one that was cached."""
    if spec.tier != "hidden":
        if head is not None:
            raise TypeError(f"head is for tier hidden; a cache of tier {spec.tier} needs none")
        return None, None
    if head is None:
        raise TypeError(
            "head must be given for a cache of hidden states: the teacher's output layer, or the folder of "
            "its checkpoint"
        )
    bias: Any = None
    weight: Any = head
    if isinstance(head, str | Path):
        weight, bias = _read_head(Path(head), spec)
    elif isinstance(head, nn.Module):
        weight, bias = head.weight, getattr(head, "bias", None)
    elif isinstance(head, tuple):
        weight, bias = head
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(
            "head must be a tensor [V, H], (weight, bias), a linear layer or a checkpoint's folder"
        )
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if spec.head is not None and head_fingerprint(weight, bias) != spec.head:
        raise ValueError(
            f"head {tuple(weight.shape)} {weight.dtype} is not the one that was cached ({spec.head_dtype}): "
            "its values differ. Take the teacher's own, in the dtype that it had"
        )
    if weight.shape[1] != spec.hidden_size or weight.shape[0] < spec.vocab_size:
        raise ValueError(
            f"head must be [{spec.vocab_size} or more, {spec.hidden_size}], got {tuple(weight.shape)}"
        )
    return weight, bias


def _read_head(folder: Path, spec: CacheSpec) -> tuple[Tensor, Tensor | None]:
    """The output layer out of a checkpoint, in the dtype that was cached."""
    from minitron_kernels.pruning.checkpoint.head import stored_head
    from minitron_kernels.pruning.checkpoint.safetensors_files import open_folder, read_json

    with open_folder(folder) as source:
        path = folder / "config.json"
        try:
            stored = stored_head(source, read_json(path) if path.is_file() else {})
        except ValueError as error:
            raise ValueError(f"{error}: pass the head itself, model.get_output_embeddings()") from None
        found = []
        for tensor in filter(None, stored):
            data = bytearray(tensor.nbytes)
            tensor.file.read_into(memoryview(data), tensor.begin)
            found.append(torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape))
    dtype = getattr(torch, spec.head_dtype or "", found[0].dtype)
    weight, *bias = (x.to(dtype) for x in found)
    return weight, bias[0] if bias else None
