"""What a model of given sizes takes: its parameters, those that serve a token, and bytes of memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from minitron_kernels.pruning.families.axes import QKV, elements, names_in
from minitron_kernels.pruning.families.configs import Config
from minitron_kernels.pruning.families.family import Family, Located
from minitron_kernels.pruning.families.registry import family_of

if TYPE_CHECKING:
    import torch

Dims = tuple[tuple[str, ...], ...]
# (axes of the dimensions, what it is: one of these): how many
WEIGHT, ROUTED, TOKEN, STATE, WIDE_STATE = "weight", "routed expert", "of a token", "state", "wide state"
Kinds = Counter[tuple[Dims, str]]

EXPERTS_PER_TOKEN = "num_experts_per_tok"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of an element; for others torch is asked


class Usage(NamedTuple):
    """What a model takes.

    Attributes:
        parameters: all of them, embeddings included; a tied head counts once.
        active_parameters: those that serve a token, see count_usage().
        memory_bytes: of the weights and the cache, see count_usage().
    """

    parameters: int
    active_parameters: int
    memory_bytes: int


def _dtype_of(dtype: Any) -> tuple[str, int]:
    """(name, bytes of an element) of a torch dtype, or of its name; TypeError if it is neither."""
    if isinstance(dtype, str) and dtype in _BYTES:
        return dtype, _BYTES[dtype]
    import torch  # slow

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(f"memory_dtype must be a torch dtype or its name, as 'bfloat16', got {dtype!r}")
    return str(found).removeprefix("torch."), found.itemsize


class Footprint:
    """How bytes are counted: by the dtype of weights and cache, and the tokens in the cache.

    Args:
        dtype: a torch dtype, or its name, such as "bfloat16".
        kv_tokens: tokens in the cache, of all sequences together.
        kv_sequences: how many sequences these are.

    Raises:
        TypeError, ValueError: not a dtype; not a whole number from 0 on; more sequences than tokens.
    """

    def __init__(
        self, dtype: str | torch.dtype = "bfloat16", kv_tokens: int = 0, kv_sequences: int = 1
    ) -> None:
        self.dtype, self.element_bytes = _dtype_of(dtype)
        for name, value, least in (("kv_tokens", kv_tokens, 0), ("kv_sequences", kv_sequences, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if kv_sequences > max(kv_tokens, 1):
            raise ValueError(
                f"kv_sequences must be at most kv_tokens, {kv_tokens}, which are those of all sequences "
                f"together, got {kv_sequences}"
            )
        self.kv_tokens, self.kv_sequences = kv_tokens, kv_sequences

    @property
    def made_with(self) -> dict[str, Any]:
        """What a plan says of how its bytes were counted."""
        return {"memory_dtype": self.dtype, "kv_tokens": self.kv_tokens, "kv_sequences": self.kv_sequences}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a smaller model may take, and what may be chosen for that: arguments of find_sizes(), by name.

    Args:
        params, active_params, memory_bytes: the most of each; None for no limit.
        memory_dtype, kv_tokens, kv_sequences: how bytes are counted, see Footprint.
        num_experts_per_tok: of the smaller model; None: as many as in the source.
        search: the names of the sizes that may be chosen; None: hidden and MLP sizes that are not given.

    Raises:
        TypeError, ValueError: a limit is not a positive number; as Footprint.
    """

    LIMITS: ClassVar = ("params", "active_params", "memory_bytes")  # of the fields of Usage, in their order

    params: float | None = None
    active_params: float | None = None
    memory_bytes: float | None = None
    memory_dtype: Any = "bfloat16"
    kv_tokens: int = 0
    kv_sequences: int = 1
    num_experts_per_tok: int | None = None
    search: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, value in self.limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not value > 0:  # NaN as well
                raise ValueError(f"{name} must be above 0, got {value}")
        self.footprint  # noqa: B018  (checks its arguments)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by name."""
        given = {name: getattr(self, name) for name in self.LIMITS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def footprint(self) -> Footprint:
        """How bytes are counted."""
        return Footprint(self.memory_dtype, self.kv_tokens, self.kv_sequences)

    @property
    def counted(self) -> dict[str, Any]:
        """How bytes are counted, in JSON types."""
        return self.footprint.made_with


class UsageCount:
    """Counts what models take for many choices of sizes: their parameters are grouped by axes once.

    Args:
        family, config: of the source.
        footprint: how bytes are counted.
        experts_per_token: of the smaller models; None: as the config says.

    Raises:
        ValueError: the family does not say what a layer keeps in a cache that is to be counted; and from
            usage(), the model has experts, but its config does not say how many serve a token.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        footprint: Footprint | None = None,
        experts_per_token: int | None = None,
    ) -> None:
        self.footprint = footprint or Footprint()
        self.kinds: dict[int | None, Kinds] = {}
        cached: dict[int, int] = {}  # projections to keys and values: two in a layer of attention
        for param in family.parameters(config):
            if param.buffer or param.expert or param.head:  # of several the first stands for all
                continue
            dims = param.dims
            if param.axis is not None:
                dims = (("experts",) if param.head is None else (f"num_{param.axis}",), *dims)
            kinds = self.kinds.setdefault(param.layer, Counter())
            kinds[dims, ROUTED if _is_routed(family, param) else WEIGHT] += 1
            # of both dimensions, since some models have weights [in, out]
            outputs = sum(param.dims, ()) if len(param.dims) == 2 else ()
            if param.layer is not None:
                count = outputs.count("kv_heads") + 2 * outputs.count(QKV)
                cached[param.layer] = cached.get(param.layer, 0) + count
        for layer, count in cached.items():
            if count and not family.token_states:
                self.kinds[layer][(("kv_heads",),), TOKEN] += count
            for state in family.token_states:
                if state.when(config, layer):
                    self.kinds[layer][state.dims, TOKEN] += 1
            for state in family.states:
                if state.when(config, layer):
                    self.kinds[layer][state.dims, WIDE_STATE if state.wide else STATE] += 1
        self.per_token = experts_per_token
        if experts_per_token is None and "experts" in self.axes():
            self.per_token = family.value(config, EXPERTS_PER_TOKEN)
        known = (0, 2) if family.states else (2,)
        other = [layer for layer, count in cached.items() if count not in known]
        if self.footprint.kv_tokens and other and not family.token_states:
            raise ValueError(
                f"kv_tokens must be 0 for {family.model_types[0]}: its table does not say what layer "
                f"{other[0]} keeps for a token, since it has no projections to keys and values by kv_heads"
            )

    def axes(self) -> set[str]:
        """The axes of the parameters."""
        parts = {part for kinds in self.kinds.values() for dims, _ in kinds for dim in dims for part in dim}
        return {axis for part in parts for axis in names_in(part)}

    def uniform(self) -> bool:
        """Whether all layers have the same parameters."""
        return all(kinds == self.kinds[0] for layer, kinds in self.kinds.items() if layer is not None)

    def of(self, layers: Sequence[int]) -> Kinds:
        """The number of parameters of each kind, in a model of these layers."""
        total = Counter(self.kinds[None])
        for layer in layers:
            total.update(self.kinds[layer])
        return total

    def usage(self, kinds: Kinds, sizes: Mapping[str, int]) -> Usage:
        """What a model takes that has these numbers of parameters of each kind, and these sizes."""
        chosen = dict(sizes)
        if "experts" in sizes and self.per_token is not None:
            chosen["experts"] = min(int(self.per_token), sizes["experts"])
        total = active = cache = 0
        for (dims, kind), number in kinds.items():
            count = number * _numel(dims, sizes)
            if kind == TOKEN:
                cache += self.footprint.element_bytes * self.footprint.kv_tokens * count
            elif kind in (STATE, WIDE_STATE):
                each = self.footprint.element_bytes if kind == STATE else _BYTES["float32"]
                cache += each * self.footprint.kv_sequences * count if self.footprint.kv_tokens else 0
            else:
                total += count
                active += number * _numel(dims, chosen) if kind == ROUTED else count
            if kind == ROUTED and self.per_token is None:
                raise ValueError(
                    f"the config has experts but no {EXPERTS_PER_TOKEN}: active parameters are unknown"
                )
        return Usage(total, active, self.footprint.element_bytes * total + cache)


def count_usage(
    config: Config,
    *,
    memory_dtype: str | torch.dtype = "bfloat16",
    kv_tokens: int = 0,
    kv_sequences: int = 1,
) -> Usage:
    """The parameters of a model with this config, those that serve a token, and its bytes of memory.

        parameters          all, embeddings included; a tied head counts once; buffers do not count
        active_parameters   parameters - routed · (experts - num_experts_per_tok) / experts
        memory_bytes        bytes of an element · (parameters + kv_tokens · attention layers · 2 · kv_heads ·
                            head_dim) + kv_sequences · bytes of states

    `routed` are the parameters of the experts that a router chooses among. All else counts in full for a
    token: embedding and head, attention, norms, routers, shared experts, dense layers. So the published
    counts of active parameters are made: 12.9 B for Mixtral 8x7B, 3.3 B for Qwen3-30B-A3B. In a model without
    experts all parameters are active.

    Memory is that of the weights and of the keys and values of `kv_tokens` tokens, all in one dtype: for a
    batch of 8 sequences of 4096 tokens kv_tokens is 32768. Layers with a sliding window are counted as if
    they kept all tokens: an upper bound. Activations, buffers and the runtime's own memory do not count.
    Layers with latent attention (MLA) keep kv_lora_rank + qk_rope_head_dim of a token in place of keys and
    values; those of Gemma 4 that take their keys from others keep nothing, and those of full attention have
    heads of their own sizes.

    Layers without attention keep as much for a long sequence as for a short one: of a state space (Mamba-2)
    or gated delta net

        convolution         its channels · its kernel's size, in that dtype
        state space         heads · channels of a head · mamba_d_state, in float32
        delta net           value heads · linear_key_head_dim · linear_value_head_dim, in float32

    as transformers 5 keeps them; other runtimes may take one column less, or another dtype. Short
    convolutions (LFM2) keep the first of these alone.

    Args:
        config: a transformers config, or the dict in config.json.
        memory_dtype: of weights and cache, a torch dtype or its name.
        kv_tokens: tokens in the cache, of all sequences together; 0: the weights alone.
        kv_sequences: how many sequences these are: each has states of its own.

    Raises:
        TypeError, ValueError: an argument is not as above; the family is not known, or does not say what a
            layer keeps in its cache (then kv_tokens must be 0).

    Example:
        >>> nemo = dict(model_type="mistral", hidden_size=5120, intermediate_size=14336, vocab_size=131072)
        >>> nemo |= dict(num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
        >>> count_usage(nemo, kv_tokens=8192)
        Usage(parameters=12247782400, active_parameters=12247782400, memory_bytes=25837742080)
    """
    family = family_of(config)
    count = UsageCount(family, config, Footprint(memory_dtype, kv_tokens, kv_sequences))
    sizes = family.sizes(config)
    return count.usage(count.of(range(sizes["layers"])), sizes)


def _is_routed(family: Family, param: Located) -> bool:
    """Whether a parameter is of experts among which a router chooses, so that a token meets a part of it.

    The router itself has the axis of the experts too, but lies beside the module that holds them.
    """
    if param.expert is not None:
        return True
    if not param.dims or param.dims[0] != ("experts",):
        return False
    inside = f"{family.layers}.{param.layer}.{family.taps.experts}."
    return len(param.dims) == 3 or (family.taps.experts is not None and param.name.startswith(inside))


def _numel(dims: Dims, sizes: Mapping[str, int]) -> int:
    return math.prod(sum(elements(axis, sizes) for axis in parts) for parts in dims)
