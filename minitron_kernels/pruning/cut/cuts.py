"""Cuts: what becomes of each parameter under a plan. Models in memory and checkpoints on disk both use it.

A cut gathers rows and columns. In addition, heads may be blended (KV heads that become their mean, query
heads that stand for dropped ones too), and the gains of norms may be scaled. Experts are one stacked tensor
in a model and one tensor each in a checkpoint; either way the same elements go through the same steps, with
the same bits as result.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_kernels.ops.gather.index import ChannelIndex
from minitron_kernels.ops.gather.op import gather_channels
from minitron_kernels.pruning.families.axes import (
    ONE,
    PER_HEAD,
    PRUNED,
    QKV,
    elements,
    elements_inside,
    groups_of,
    names_in,
    of_group,
    qkv_block,
    split_part,
)
from minitron_kernels.pruning.families.family import Located
from minitron_kernels.pruning.families.registry import family_of
from minitron_kernels.pruning.plan.layer_plan import LayerPlan
from minitron_kernels.pruning.plan.pruning_plan import PruningPlan
from minitron_kernels.pruning.plan.selection import KeptHeads

Index = ChannelIndex | None


@dataclass(frozen=True)
class Blend:
    """A head whose rows in the new tensor are a weighted sum of rows of the old one.

    Args:
        start: the head's first row in the new tensor.
        length: the number of its rows.
        terms: (weight, first row in the old tensor).
    """

    start: int
    length: int
    terms: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Cut:
    """What becomes of one parameter.

    Args:
        name: in the smaller model, where layers and experts are renumbered.
        source_shape, shape: before and after.
        rows, cols: what is kept of the two dimensions (of a vector: `cols` only; of three dimensions: `rows`
            of the first only, unless they are experts); None: all.
        experts: for stacked weights of experts, (expert, rows, cols) of each that stays; else None.
        blends: heads that are not plain copies; they are written over the gathered rows.
        factor, offset: the gain of a norm, offset + weight, is multiplied by factor.
    """

    name: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    rows: Index = None
    cols: Index = None
    experts: tuple[tuple[int, Index, Index], ...] | None = None
    blends: tuple[Blend, ...] = ()
    factor: float = 1.0
    offset: float = 0.0

    @property
    def unchanged(self) -> bool:
        """Whether it is a plain copy."""
        whole = self.rows is None and self.cols is None and not self.blends and self.factor == 1
        return whole and self.experts is None

    @torch.no_grad()
    def apply(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The new parameter, in the old one's dtype. Sums and gains are computed in float32, or in float64.

        Args:
            tensor: of source_shape; any dtype that gather_channels takes.
            out: of the new shape, with tensor's dtype and device; may be a view. Default: a new tensor.

        Raises:
            ValueError: `tensor` has another shape; names the parameter.
        """
        if tuple(tensor.shape) != self.source_shape:
            raise ValueError(
                f"{self.name} is cut from a tensor of shape {self.source_shape}, got {tuple(tensor.shape)}"
            )
        tensor = tensor.detach()
        if out is None:
            out = torch.empty(self.shape, dtype=tensor.dtype, device=tensor.device)
        if tensor.dim() == 0:
            out.copy_(tensor)
        elif self.experts is None and tensor.dim() == 3 and self.rows is not None:
            flat = tensor.reshape(len(tensor), -1)
            gather_channels(flat, self.rows, None, out.view(len(out), flat.shape[1]))
        elif self.experts is None:
            gather_channels(tensor, self.rows, self.cols, out)
        else:
            for new, (old, rows, cols) in enumerate(self.experts):
                gather_channels(tensor[old], rows, cols, out[new])
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        for blend in self.blends:
            total = torch.zeros((blend.length, *self.shape[1:]), dtype=wide, device=tensor.device)
            for weight, start in blend.terms:
                head = tensor.narrow(0, start, blend.length)
                kept = head if tensor.dim() == 1 else gather_channels(head, None, self.cols)
                total.add_(kept.to(wide), alpha=weight)
            out.narrow(0, blend.start, blend.length).copy_(total)
        if self.factor != 1:
            gain = (out.to(wide) + self.offset) * self.factor
            out.copy_(gain - self.offset)
        return out


class Cuts:
    """The cuts of all parameters of a model.

    Args:
        plan: what stays.
        rescale_norms: apply the plan's norm factors.
        tied: whether the source's head is tied to its embedding; None: as its config says.

    A family that multiplies its embeddings by √hidden_size multiplies them by less when channels are removed,
    while what the layers add stays the same. So what the layers add is scaled by √(new / old size) too; every
    norm that reads the residual stream divides by it again. If layers write through norms (Gemma 2 and 3),
    the factor goes into the gains of these, and no element of the embedding or the head is rounded anew. If
    they do not, the embedding is multiplied by the inverse instead, and, if the head is tied, the final
    norm's gain by the factor.
    """

    def __init__(self, plan: PruningPlan, *, rescale_norms: bool = True, tied: bool | None = None) -> None:
        self.plan = plan
        self.family = family_of(plan.source_config)
        self.tied = self.family.tied(plan.source_config) if tied is None else tied
        self.source = self.family.sizes(plan.source_config)
        self.target = self.family.sizes(plan.target_config)
        self._layers = {entry.layer: (new, entry) for new, entry in enumerate(plan.layers)}
        self._factors = dict(plan.norm_factors) if rescale_norms else {}
        self._scales = self._residual_scales() if self.family.scales_embedding else {}
        self._folded = self._folded_factors()
        self._index = functools.lru_cache(maxsize=None)(self._make_index)
        self._known = functools.lru_cache(maxsize=None)(self._list_known)

    def names(self, stored: bool = False) -> list[str]:
        """The source's parameters, by their names in the model or in checkpoints, without a tied head."""
        return list(self._known(stored))

    def of(self, name: str, stored: bool = False) -> Cut | None:
        """What becomes of the parameter `name` of the model (`stored`: of the checkpoint).

        Returns:
            Its cut; None if it is removed with its layer, its expert or its head.

        Raises:
            ValueError: the source has no such parameter.
        """
        located = self._known(stored).get(name)
        if located is None and name == f"{self.family.head}.weight":  # checkpoints may hold a tied head
            located = self.family.locate(name, self.plan.source_config)
        if located is None:
            raise ValueError(
                f"{name!r} is not a parameter of the plan's source, a "
                f"{self.plan.source_config['model_type']} model"
            )
        new, entry = None, None
        if located.layer is not None:
            if located.layer not in self._layers:
                return None
            new, entry = self._layers[located.layer]
        expert = located.expert
        if expert is not None and entry is not None and entry.experts is not None:
            if expert not in entry.experts:
                return None
            expert = entry.experts.index(expert)
        head = located.head
        if head is not None and located.axis is not None:
            kept = self._kept(located.axis, located.layer, None)
            if head not in kept:
                return None
            head = kept.index(head)
        factor, offset = self._gain(name)
        indices, stack = [], None
        if located.stacked and entry is not None:
            stack = self._stack(located, entry)
        else:
            indices = [self._index(parts, located.layer, expert) for parts in located.dims]
        return Cut(
            name=located.moved(new, expert if head is None else head),
            source_shape=located.shape(self.source),
            shape=located.shape(self.target),
            rows=indices[0] if len(indices) >= 2 else None,
            cols=indices[-1] if indices else None,
            experts=stack,
            blends=self._blends(located, entry),
            factor=factor,
            offset=offset,
        )

    def _stack(self, located: Located, entry: LayerPlan) -> tuple[tuple[int, Index, Index], ...] | None:
        """What is kept of the stacked weights of experts; None: everything."""
        assert entry.experts is not None, "stacked weights in a dense layer"
        *rows, cols = located.dims[1:]  # a bias of each expert has no rows
        stack = tuple(
            (
                old,
                self._index(rows[0], located.layer, new) if rows else None,
                self._index(cols, located.layer, new),
            )
            for new, old in enumerate(entry.experts)
        )
        whole = entry.experts == tuple(range(self.source["experts"]))
        return None if whole and all(row is col is None for _, row, col in stack) else stack

    def untouched(self, name: str, shape: tuple[int, ...]) -> Cut | None:
        """The copy of a tensor that is outside of the text model; None where it is inside, or declared."""
        return Cut(name=name, source_shape=shape, shape=shape) if self.copies(name) else None

    def copies(self, name: str) -> bool:
        """Whether a tensor of the model is outside of the text model, and does not follow it."""
        return self.family.outside(name) and name not in self._known(False)

    def source_module(self, name: str) -> str:
        """The name in the source of a module or buffer of the smaller model."""
        inside = re.fullmatch(rf"{re.escape(self.family.layers)}\.(\d+)\.(.+)", name)
        if not inside:
            return name
        return f"{self.family.layers}.{self.plan.layers[int(inside[1])].layer}.{inside[2]}"

    def _list_known(self, stored: bool) -> dict[str, Located]:
        params = self.family.parameters(self.plan.source_config, stored=stored, tied=self.tied)
        return {param.name: param for param in params}

    def _make_index(self, parts: tuple[str, ...], layer: int | None, expert: int | None) -> Index:
        """What is kept of a dimension with these axes; None: everything. `expert` is the new number."""
        kept, start = [], 0
        for axis in parts:
            kept.append(self._elements(axis, layer, expert) + start)
            start += elements(axis, self.source)
        index = torch.cat(kept)
        if len(index) == start and torch.equal(index, torch.arange(start, device="cpu")):
            return None
        return ChannelIndex(index, start, name="+".join(parts))

    def _elements(self, part: str, layer: int | None, expert: int | None) -> Tensor:
        """What is kept of the elements of a part of a dimension; on the CPU, as all of an index is."""
        if groups_of(part) is not None:
            return self._groups(part, layer, expert)
        indices = self._kept_index(split_part(part)[0], layer, expert)
        length = 1 if part == ONE else elements_inside(part, self.source)
        inside = torch.arange(length, device="cpu")
        if split_part(part)[1] in PRUNED:  # the same elements in each
            inside = self._kept_index(split_part(part)[1], layer, expert)
        return (indices[:, None] * length + inside).flatten()

    def _groups(self, part: str, layer: int | None, expert: int | None) -> Tensor:
        """What is kept of the elements of a part that is made of groups of pieces."""
        axis, pieces = groups_of(part) or ("", ())
        old = self._kept_index(axis, layer, expert)[:, None]
        size, start = elements(part, self.source) // self.source[axis], 0
        kept: list[Tensor] = []
        for piece in pieces:
            inside, length = split_part(piece)[0], of_group(piece, axis, self.source)
            if inside in PRUNED:  # by its own number, since groups may be joined
                share, each = self.source[inside] // self.source[axis], elements_inside(piece, self.source)
                at = self._kept_index(inside, layer, expert)
                first = at // share * size + start + at % share * each
                rows = (first[:, None] + torch.arange(each, device="cpu")).view(len(old), -1)
            else:
                rows = old * size + start + torch.arange(length, device="cpu")
            kept.append(rows)
            start += length
        return torch.cat(kept, 1).flatten()

    def _kept_index(self, axis: str, layer: int | None, expert: int | None) -> Tensor:
        return torch.tensor(self._kept(axis, layer, expert), dtype=torch.int64, device="cpu")

    def _kept(self, axis: str, layer: int | None, expert: int | None) -> tuple[int, ...] | range:
        if axis == "hidden":
            return self.plan.hidden
        if layer is None or axis not in PRUNED:
            return range(1 if axis == ONE else self.source[axis])
        entry = self._layers[layer][1]
        if axis == "heads":
            return _heads_of(entry).query
        if axis == "kv_heads":
            return tuple(sources[0] for sources in _heads_of(entry).kv)
        kept = entry.expert_mlp[expert] if axis == "expert_mlp" else getattr(entry, axis)  # type: ignore[index]
        assert kept is not None, f"{axis} in a layer without"
        return kept

    def _blends(self, located: Located, entry: LayerPlan | None) -> tuple[Blend, ...]:
        """The heads of a projection that are sums of several old ones."""
        if entry is None or not located.dims:
            return ()
        blends: list[Blend] = []
        heads = entry.heads
        joined = heads is not None and (heads.merged or any(len(sources) > 1 for sources in heads.kv))
        if joined and any("kv_heads" in parts for parts in located.dims[1:]):
            raise ValueError(f"{located.name} is [in, out]: its heads cannot be joined")
        old, new = 0, 0
        axes = {name for parts in located.dims for part in parts for name in names_in(part)} - {"1"}
        # of a norm over all heads, or over each: it has no axis of what a projection reads
        is_gain = located.name.endswith(".weight") and axes <= {"heads", "kv_heads", "head_dim"}
        for part in located.dims[0]:
            axis, pieces = groups_of(part) or (split_part(part)[0], ())
            dim = elements(part, self.source) // self.source[axis] if axis in PER_HEAD else 0
            if (axis, pieces) == groups_of(QKV):
                blends += self._qkv_blends(entry, old, new)
            elif axis == "heads":
                for kept, dropped in () if is_gain else _heads_of(entry).merged:
                    start = new + _heads_of(entry).query.index(kept) * dim
                    pair = (2.0, old + kept * dim), (-1.0, old + dropped * dim)
                    # of a head with its gate behind its query, the query alone
                    blended = of_group(pieces[0], axis, self.source) if pieces else dim
                    blends.append(Blend(start, blended, pair))
            elif axis == "kv_heads":
                for head, sources in enumerate(_heads_of(entry).kv):
                    if len(sources) > 1:
                        terms = tuple((1 / len(sources), old + source * dim) for source in sources)
                        blends.append(Blend(new + head * dim, dim, terms))
            old += elements(part, self.source)
            new += elements(part, self.target)
        return tuple(blends)

    def _qkv_blends(self, entry: LayerPlan, old: int, new: int) -> list[Blend]:
        """Those of a projection whose rows are, KV group after KV group, queries, a key and a value."""
        dim, heads = self.source["head_dim"], _heads_of(entry)
        size, kept = (sizes["heads"] // sizes["kv_heads"] for sizes in (self.source, self.target))
        blends = []
        for stays, goes in heads.merged:
            start = new + qkv_block(heads.query.index(stays), kept) * dim
            terms = tuple(
                (weight, old + qkv_block(head, size) * dim) for weight, head in ((2.0, stays), (-1.0, goes))
            )
            blends.append(Blend(start, dim, terms))
        for head, sources in enumerate(heads.kv):
            for part in ("key", "value") if len(sources) > 1 else ():
                terms = tuple(
                    (1 / len(sources), old + qkv_block(source, size, part) * dim) for source in sources
                )
                blends.append(Blend(new + qkv_block(head, kept, part) * dim, dim, terms))
        return blends

    def _gain(self, name: str) -> tuple[float, float]:
        """(factor, offset) of a parameter: offset + parameter is multiplied by the factor."""
        module, _, kind = name.rpartition(".")
        scale = self._scales.get(module, 1.0)
        inside = module.removeprefix(f"{self.family.layers}.").partition(".")[2]
        if kind == "weight" and (module == self.family.final_norm or inside in self.family.taps.norms):
            return scale * self._factors.get(module, 1.0), self.family.norm_offset
        if kind == "weight":
            scale *= self._folded.get(module, 1.0)
        return scale * self._scales.get(name, 1.0), 0.0

    def _folded_factors(self) -> dict[str, float]:
        """{linear layer: factor of its weight} of those that read a norm without a gain of its own."""
        folded: dict[str, float] = {}
        for norm, readers in self.family.folds.items():
            if norm == self.family.final_norm:  # a tied head is the embedding, and stays as it is
                readers = tuple(name for name in readers if not (self.tied and name == self.family.head))
                folded |= {name: self._factors.get(norm, 1.0) for name in readers}
                continue
            for layer in self._layers:
                factor = self._factors.get(f"{self.family.layers}.{layer}.{norm}", 1.0)
                folded |= {f"{self.family.layers}.{layer}.{name}": factor for name in readers}
        return folded

    def _residual_scales(self) -> dict[str, float]:
        """{module, or parameter: factor} that keeps the embedding's share of the residual stream."""
        scale = math.sqrt(self.target["hidden"] / self.source["hidden"])
        family, taps = self.family, self.family.taps
        writers = [norm for norm in taps.norms if norm not in taps.scored_norms]
        if writers:
            scales = {f"{family.layers}.{layer}.{norm}": scale for layer in self._layers for norm in writers}
            for layer in self._layers:
                scales |= {
                    f"{family.layers}.{layer}.{name}.weight": 1 / scale for name in family.reads_residual
                }
            return scales | dict.fromkeys(family.adds_to_residual, scale)
        return {family.embedding: 1 / scale} | ({family.final_norm: scale} if self.tied else {})


def _heads_of(entry: LayerPlan) -> KeptHeads:
    assert entry.heads is not None, "heads in a layer without attention"
    return entry.heads
