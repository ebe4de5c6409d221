"""What a cache holds: the tier, whose outputs they are, and how they are stored. Kept in its cache.json.

Reading it needs no torch, which takes seconds to load.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.cache.files import disk_error, publish
from minitron_kernels.pruning.checkpoint.safetensors_files import read_json

FORMAT, VERSION = "minitron-teacher-cache", 1
SPEC_FILE = "cache.json"
DEFAULT_QUANTISER = "log8"
# name -> bits of a code; what they do is in quantise.py
QUANTISERS = {"fp32": 32, "fp16": 16, **{f"log{bits}": bits for bits in range(8, 17)}}
TIERS = ("sampled", "topk", "hidden")
_OF_TIER = {
    "k": ("sampled", "topk"),
    "mass": ("topk",),
    "samples": ("sampled",),
    "temperatures": ("topk",),
    "quantiser": ("topk",),
    "hidden_size": ("hidden",),
    "num_layers": ("hidden",),
    "head": ("hidden",),
    "head_dtype": ("hidden",),
    "logit_scale": ("hidden",),
    "softcap": ("hidden",),
}


def bits_of(name: Any) -> int:
    """The bits of a quantiser's codes.

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(name, str) or name not in QUANTISERS:
        raise ValueError(f"quantiser must be one of {', '.join(QUANTISERS)}; got {name!r}")
    return QUANTISERS[name]


@dataclass(frozen=True)
class CacheSpec:
    """What all shards of a cache have in common.

    Args:
        tier: "sampled" (token ids drawn from the teacher, with counts), "topk" (the k likeliest ids, their
            log-probabilities and the tail's), or "hidden" (hidden states after the final norm, bf16).
        vocab_size: number of tokens; ids are below.
        teacher: who it was: model_fingerprint() of it, or a name.
        tokenizer: tokenizer_hash() of what made the token ids; None: not known.
        k: topk, sampled: the most ids that a position may have.
        mass: topk: the probability at which a position has ids enough; None: always k. Only a record.
        samples: sampled: draws a position; the most that counts sum to.
        temperatures: topk: those at which the tail is kept. 1 may be missing.
        quantiser: topk: how log-probabilities are stored, see quantise.py; "fp32" keeps them as they are.
        hidden_size: hidden: H.
        num_layers: hidden: the teacher's number of layers, where it is known.
        head: hidden: head_fingerprint() of the teacher's output layer; None: not known.
        head_dtype: hidden: in which dtype that was, as "bfloat16".
        logit_scale: hidden: factor of the teacher's logits.
        softcap: hidden: softcap of the teacher's logits.

    Raises:
        TypeError, ValueError: a value that cannot be, or one of another tier.
    """

    tier: str
    vocab_size: int
    teacher: str
    tokenizer: str | None = None
    k: int | None = None
    mass: float | None = None
    samples: int | None = None
    temperatures: tuple[float, ...] = ()
    quantiser: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    head: str | None = None
    head_dtype: str | None = None
    logit_scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"tier must be one of {', '.join(TIERS)}, got {self.tier!r}")
        set_ = object.__setattr__
        if self.tier == "topk":
            set_(self, "temperatures", tuple(float(t) for t in self.temperatures) or (1.0,))
            set_(self, "quantiser", self.quantiser or DEFAULT_QUANTISER)
            bits_of(self.quantiser)
        if self.tier == "hidden" and self.logit_scale is None:
            set_(self, "logit_scale", 1.0)
        for name, tiers in _OF_TIER.items():
            if getattr(self, name) not in (None, ()) and self.tier not in tiers:
                raise ValueError(f"{name} is not for tier {self.tier!r} but for {', '.join(tiers)}")
        needed = {"topk": ("k",), "sampled": ("k", "samples"), "hidden": ("hidden_size",)}[self.tier]
        for name in ("vocab_size", *needed):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be an integer of at least 1 in tier {self.tier}, got {value!r}"
                )
        if self.k is not None and self.k > self.vocab_size:
            raise ValueError(f"k must be at most vocab_size {self.vocab_size}, got {self.k}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass must be a probability in (0, 1], got {self.mass}")
        if not isinstance(self.teacher, str) or not self.teacher:
            raise ValueError(f"teacher must say who it is, by fingerprint or name; got {self.teacher!r}")
        if any(not (t > 0 and math.isfinite(t)) for t in self.temperatures):
            raise ValueError(f"temperatures must be finite and above 0, got {self.temperatures}")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures must differ, got {self.temperatures}")

    def to_json(self) -> dict[str, Any]:
        """The contents of cache.json."""
        return {"format": FORMAT, "version": VERSION, "spec": dataclasses.asdict(self)}

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of all of it, which every shard carries."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: CacheSpec) -> str:
        """The fields in which `other` differs, as an error names them; empty: none."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return ", ".join(
            f"{name} {mine[name]!r} and not {theirs[name]!r}" for name in mine if mine[name] != theirs[name]
        )


def read_spec(folder: Path) -> CacheSpec:
    """The spec of a cache.

    Raises:
        ValueError: the folder is no cache, or one of another version of the format.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {SPEC_FILE}"
        raise ValueError(f"{folder}: {what}; it is not a teacher's cache")
    found = read_json(path)
    if found.get("format") != FORMAT or not isinstance(found.get("spec"), dict):
        raise ValueError(f"{path}: is not that of a teacher's cache (format {found.get('format')!r})")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path}: is of version {found.get('version')!r} of the format, and this reads {VERSION}: take "
            "another release of minitron_kernels, or make the cache anew"
        )
    fields = {field.name for field in dataclasses.fields(CacheSpec)}
    given = dict(found["spec"])
    if unknown := sorted(set(given) - fields):
        raise ValueError(f"{path}: has {unknown[0]!r}, which this release of minitron_kernels does not know")
    if isinstance(given.get("temperatures"), list):
        given["temperatures"] = tuple(given["temperatures"])
    try:
        return CacheSpec(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from None


def create_spec(folder: Path, spec: CacheSpec) -> None:
    """Makes the folder a cache of this spec, or checks that it is one already.

    Raises:
        ValueError: it is a cache of another spec; it holds other files.
        OSError: it cannot be written.
    """
    path = folder / SPEC_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
            if others and not path.exists():  # another writer may have made it meanwhile
                raise ValueError(
                    f"{folder}: has no {SPEC_FILE} but {others[0]!r}: take an empty folder, or a new one"
                )
            publish(path, [(json.dumps(spec.to_json(), indent=1) + "\n").encode()], replace=False)
    except OSError as error:
        raise disk_error(error, path) from None
    if differences := read_spec(folder).differences(spec):
        raise ValueError(f"{folder}: is a cache with {differences}: take another folder for another cache")
