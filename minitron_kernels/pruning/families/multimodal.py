"""Multimodal, the description of a model that holds a text model of a known family beside its encoders.

Such a model ("gemma3", "mistral3", "qwen3_vl") has the text model as a module, its config under a key of its
own config, and encoders of images or sound whose output a projector brings to the text model's hidden size.
Only the text model is pruned. `around()` makes the Family of the whole out of the text model's: the same
tables under other names, and the parameters of the projector, by their axes. Everything else is copied as it
is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_kernels.pruning.families.configs import Config, nested
from minitron_kernels.pruning.families.family import Family, Param
from minitron_kernels.pruning.families.states import State

Layout = tuple[tuple[str, str], ...]  # (prefix in the model, prefix in a checkpoint) of names


@dataclass(frozen=True)
class Multimodal:
    """A model around a text model; register_multimodal() makes it known.

    Args:
        model_types: the values of its `config.model_type`.
        params: parameters outside of the text model that follow an axis of it, "hidden" for instance; by
            their names in the model. `when` gets the whole config.
        adds_to_residual: names of those of `params` by which the encoders' output enters the residual stream
            as embeddings do. They are scaled with it in families that multiply embeddings by √hidden_size.
        inner: {model_type: Family} of text models that there are inside such models only; the family of any
            other is looked up.
        text: the text model's name in the model.
        head: the head's name in the model.
        text_key: the config key of the text model's config.
        config_follows: {"path.of.a.config.entry": axis} of entries outside the text model's config that hold
            a size of it.
        layouts: prefixes that checkpoints have instead of the model's; the model's own are accepted too.
        computed: {axis: (whole config) -> its size} of other axes of `params`, such as the encoder's width.
        fixed: (whole config) -> {axis of the text model: why it cannot be pruned}.
        keeps_first: (whole config) -> (how many of the text model's first layers must stay, why).
        approximates: {axis: what is not exact where it is cut}, beside what the text model's family says.

    Example:
        >>> Multimodal(
        ...     ("my_vl",),
        ...     params=(Param("model.projector.weight", "hidden, vision"),),
        ... ).model_types
        ('my_vl',)
    """

    model_types: tuple[str, ...]
    params: tuple[Param, ...] = ()
    adds_to_residual: tuple[str, ...] = ()
    inner: Mapping[str, Family] = field(default_factory=dict)
    text: str = "model.language_model"
    head: str = "lm_head"
    text_key: str = "text_config"
    config_follows: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[Config], int]] = field(default_factory=dict)
    layouts: tuple[Layout, ...] = ()
    fixed: Callable[[Config], Mapping[str, str]] = field(default=lambda config: {})
    keeps_first: Callable[[Config], tuple[int, str]] | None = None
    approximates: Mapping[str, str] = field(default_factory=dict)

    def around(self, inner: Family) -> Family:
        """The family of the whole, with a text model of the family `inner`."""
        root = f"{inner.layers.rpartition('.')[0]}."
        key = self.text_key

        def moved(name: str) -> str:
            if name.startswith(root):
                return f"{self.text}.{name.removeprefix(root)}"
            return self.head + name.removeprefix(inner.head)

        def of_text(ask: Any) -> Any:
            """`ask`, which is given the text model's config, to be given the whole's."""
            return lambda config, *rest: ask(nested(config, key), *rest)

        def params(table: tuple[Param, ...], outer: bool = False) -> tuple[Param, ...]:
            return tuple(
                dataclasses.replace(
                    param,
                    name=moved(param.name) if outer else param.name,
                    when=None if param.when is None else of_text(param.when),
                )
                for param in table
            )

        def states(table: tuple[State, ...]) -> tuple[State, ...]:
            return tuple(dataclasses.replace(state, when=of_text(state.when)) for state in table)

        folds = dict(inner.folds)
        if inner.final_norm in folds:  # the others are inside a layer
            folds[moved(inner.final_norm)] = tuple(map(moved, folds.pop(inner.final_norm)))
        return dataclasses.replace(
            inner,
            model_types=self.model_types,
            layer=params(inner.layer),
            stored_layer=None if inner.stored_layer is None else params(inner.stored_layer),
            outer=(*params(inner.outer, outer=True), *self.params),
            layers=moved(inner.layers),
            final_norm=moved(inner.final_norm),
            embedding=moved(inner.embedding),
            head=self.head,
            folds=folds,
            is_sparse=of_text(inner.is_sparse),
            states=states(inner.states),
            token_states=states(inner.token_states),
            refuses=of_text(inner.refuses),
            computed={axis: of_text(size) for axis, size in inner.computed.items()} | dict(self.computed),
            fixed=lambda config: {**inner.fixed(nested(config, key)), **self.fixed(config)},
            keeps_first=self.keeps_first or of_text(inner.keeps_first),
            approximates={**inner.approximates, **self.approximates},
            text_key=key,
            config_follows=self.config_follows,
            adds_to_residual=self.adds_to_residual,
            layouts=self.layouts,
        )
