"""A Hugging Face language model's decoder, output layer, and what it does to its logits.

attach() teaches a model to hand its DenseSignal to a function inside its own forward pass, so that wrappers
around it (DDP, FSDP2, DeepSpeed, torch.compile, autocast) see the loss as a part of the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minitron_kernels.distillation.around import warn_if_around_ddp
from minitron_kernels.distillation.layers import (
    collect_layers,
    compare_states,
    forget_recorders,
    num_layers,
    prepare_recorders,
)
from minitron_kernels.distillation.logits import (
    KNOWN_TYPES,
    LogitOptions,
    NotCalledError,
    logit_options,
    probe,
    proposals,
    why_not_now,
)
from minitron_kernels.distillation.signals import DenseSignal
from minitron_kernels.ops.kl_loss.heads import EffectiveHead, head_of

_ATTACHED = "_minitron_attached"
_VERIFIED = "_minitron_verified"  # of a model: what verify() has found
# what is said here, or only the whole model understands, and not its decoder
_NOT_FOR_THE_DECODER = (
    "labels", "shift_labels", "logits_to_keep", "num_items_in_batch", "return_loss", "return_dict",
    "use_cache", "output_hidden_states", "output_attentions", "output_router_logits",
)  # fmt: skip
_CACHES = ("cache", "past_key_values", "cache_params")


class Verified(NamedTuple):
    """What verify() has seen of a model; kept on it."""

    logits: LogitOptions
    decoder: int  # which of the modules that decoders() names the model's forward calls
    states_are_layers: bool  # whether its hidden_states[layer + 1] is the output of a layer
    proposals: tuple[LogitOptions, ...]  # of the config then: one that was changed is looked at again


class CausalLM:
    """What distillation needs to know of a causal language model of transformers.

    `model` is the language model or a PEFT model around it, not wrapped by DDP, FSDP1 or torch.compile: the
    gradients of what is called around such a wrapper are not synchronised.

    Raises:
        TypeError: a wrapper; an encoder-decoder; a model without base_model or output layer; an output layer
            that head_of() does not know.
    """

    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        name = type(self.model).__name__
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise TypeError(
                f"{name} is an encoder-decoder, whose decoder sees other tokens than the batch's input_ids: "
                "distillation here is of causal language models. Use linear_kl_loss() on its decoder's states"
            )
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        if head is None or not self._decoders():
            raise TypeError(
                f"{name} has no output layer beside a base model (get_output_embeddings(), base_model): "
                "distillation needs a causal language model of transformers, such as AutoModelForCausalLM "
                "loads. For another model call DistillationLoss with DenseSignals of your own"
            )
        self.head = head_of(head)

    @property
    def decoder(self) -> Any:
        """The model without its output layer."""
        verified = self._verified
        return self._decoders()[0 if verified is None else verified.decoder]

    def _decoders(self) -> list[Any]:
        """Which modules may be the decoder, the likeliest first."""
        model = self.model
        found = [getattr(model, "base_model", None), getattr(model, "get_decoder", lambda: None)()]
        found.append(getattr(model, "model", None))
        return [x for x in dict.fromkeys(found) if isinstance(x, nn.Module) and x is not model]

    @property
    def _verified(self) -> Verified | None:
        found: Verified | None = getattr(self.model, _VERIFIED, None)
        if found is None or torch.compiler.is_compiling():
            return found
        return found if found.proposals == tuple(proposals(self.model.config)) else None

    @property
    def num_layers(self) -> int:
        """The decoder's layers, as its config counts them."""
        return num_layers(self.model.config)

    @property
    def logit_scale(self) -> float:
        """What multiplies head(hidden)."""
        return self.logit_options.logit_scale

    @property
    def softcap(self) -> float | None:
        """The c of c·tanh(z/c), or None."""
        return self.logit_options.softcap

    @property
    def logit_options(self) -> LogitOptions:
        """As probe() found them; before it could run, as the config says."""
        verified = self._verified
        return logit_options(self.model.config) if verified is None else verified.logits

    @property
    def is_verified(self) -> bool:
        """Whether the model's own logits were seen to be what logit_options says."""
        return self._verified is not None

    def verify(self) -> LogitOptions:
        """Runs the model once on a few tokens and compares its logits with what is said of them here.

        Done by attach() and ModelTeacher, or at the first distillation step where the weights are not whole
        before (meta device, FSDP, ZeRO-3).

        Raises:
            TypeError: they are something else; see probe().
        """
        decoders, seen = self._decoders(), tuple(proposals(self.model.config))
        for index, decoder in enumerate(decoders):
            alike: list[bool] = []

            def alone(inputs: dict[str, Any], decoder: Any = decoder, alike: list[bool] = alike) -> Tensor:
                with forget_recorders(decoder):
                    states, are_layers = compare_states(decoder, self.model.config, inputs)
                alike.append(are_layers)
                return states

            try:
                found = probe(self.model, decoder, self.head, alone)
            except NotCalledError:
                if index + 1 < len(decoders):
                    continue
                raise
            setattr(self.model, _VERIFIED, Verified(found, index, alike[0], seen))
            break
        return self.logit_options

    def verify_where_possible(self) -> None:
        """verify() once, if the weights are whole and on a device."""
        if not self.is_verified and why_not_now(self.model) is None:
            self.verify()

    def states(
        self, batch: Mapping[str, Any], layers: Iterable[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The decoder's last hidden states [B, T, H], after its final norm, and outputs of layers.

        Raises:
            ValueError: a cache in the batch, logits_to_keep, or a layer that does not exist.
        """
        verified, inputs = self._verified, self.decoder_inputs(batch)
        states_are_layers = verified is None or verified.states_are_layers
        out, kept = collect_layers(
            self.decoder, self.model.config, inputs, tuple(layers), states_are_layers=states_are_layers
        )
        return out.last_hidden_state, kept

    def signal(self, batch: Mapping[str, Any], layers: Iterable[int] = ()) -> DenseSignal:
        """Runs the decoder on a batch of the model's own arguments; no logits are made.

        All that the batch has goes to the decoder as it is (attention_mask, position_ids, cu_seq_lens_q,
        inputs_embeds, ...), but for labels and what says which outputs are wanted. Key-value caches are off.

        Args:
            batch: the model's arguments by name; tensors [B, T] mostly.
            layers: whose outputs are kept, from 0; the last one's output is `hidden`, after the final norm.

        Warns where DistributedDataParallel wraps the model and this is not within a call of the wrapper: the
        gradients are then not synchronised.

        Raises:
            ValueError: see states(); or compiled before its logits could be verified.
            TypeError: logits that are something else than head(hidden) with a factor and a softcap.
        """
        self.ensure_verified()
        warn_if_around_ddp(self.model)
        states, kept = self.states(batch, layers)
        hidden, weight, bias = self.operands(states)
        scale, softcap = self.logit_options
        return DenseSignal(hidden, weight, bias, scale, softcap, kept)

    def operands(self, states: Tensor) -> EffectiveHead:
        """Hidden states, weight and bias whose product the output layer computes.

        Raises:
            ValueError: an output layer that a device_map offloads, or without memory outside of a wrapper.
        """
        found = self.head(states)
        if found.weight.device.type == "meta" and states.device.type != "meta":
            raise ValueError(
                f"the output layer of {type(self.model).__name__} is offloaded (its weight is on meta): keep "
                "it on a device, by a device_map that says so of lm_head"
            )
        return found

    def decoder_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the decoder is called with."""
        for name in _CACHES:
            if batch.get(name) is not None:
                raise ValueError(f"{name} cannot be in a batch to distil on: sequences are seen whole")
        if batch.get("output_router_logits"):
            raise ValueError("output_router_logits cannot be in a batch: the router's loss would be lost")
        keep = batch.get("logits_to_keep")
        if keep is not None and not (isinstance(keep, int) and keep == 0):
            raise ValueError(
                "logits_to_keep cannot choose positions here: set the labels of all others to -100"
            )
        return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_DECODER}

    def ensure_verified(self) -> None:
        """verify() once, within a forward; a graph being compiled cannot, and trusts known families."""
        if self.is_verified:
            return
        if not torch.compiler.is_compiling():
            self.verify()
        elif getattr(self.model.config, "model_type", None) not in KNOWN_TYPES:
            raise ValueError(
                f"the logits of {type(self.model).__name__} could not be verified before it was compiled: "
                "run one step without torch.compile first, or CausalLM(model).verify() with its weights whole"
            )


def unwrapped(model: Any) -> Any:
    """The model within a PEFT model; wrappers that must be called themselves are refused."""
    if hasattr(model, "get_base_model"):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise TypeError(
                f"{type(model).__name__} puts virtual tokens before the batch's (prompt or prefix tuning), "
                "which have no teacher: use adapters within the layers (LoRA), or merge them"
            )
        return model.get_base_model()
    for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        if isinstance(getattr(model, name, None), nn.Module):
            raise TypeError(
                f"got a {type(model).__name__} around the model: attach() the language model itself before "
                "it is wrapped by DDP, FSDP, DeepSpeed or torch.compile, and call the wrapper"
            )
    return model


def attach(model: Any) -> nn.Module:
    """Lets model(**batch, distillation=call) return call(signal), made inside the model's own forward.

    Without `distillation` the model does what it did, and its signature stays. Its class becomes a subclass
    of what it was, of the same name, so that copies, pickles, save_pretrained() and fully_shard() (before or
    after) go on; a pickle of the whole model needs this package to be loaded. detach() undoes it.

    The model's logits are verified: it is run once on six tokens, in evaluation mode, and must do to
    head(hidden) what its config says. Where its weights are not whole yet (meta device, sharded by FSDP2,
    ZeRO-3), the first distillation step does this instead.

    Args:
        model: a causal language model of transformers or a PEFT model around it, before DDP, FSDP1,
            DeepSpeed, accelerate's prepare() or compile wrap it.

    Returns:
        The same model.

    Raises:
        TypeError: a model that is not known, a wrapper, or logits that are something else; see CausalLM.
        ValueError: its forward was replaced on the instance.
    """
    inner: Any = unwrapped(model)
    if not getattr(type(inner), _ATTACHED, False):
        instance = vars(inner)
        if "forward" in instance and "_old_forward" not in instance:
            raise ValueError(
                f"the forward of this {type(inner).__name__} was replaced on the instance (by accelerate's "
                "prepare()?), which would hide attach(): attach the model before that"
            )
        CausalLM(inner).verify_where_possible()
        cls = _attached(type(inner))  # type: ignore[arg-type]
        if "_old_forward" in instance:  # accelerate's hooks call that one
            inner._old_forward = functools.partial(cls.forward, inner)  # type: ignore[attr-defined]
        inner.__class__ = cls
    module: nn.Module = model
    return module


def detach(model: Any) -> nn.Module:
    """Undoes attach(): the model's class is what it was.

    Raises:
        ValueError: fully_shard() has made a class of its own of the attached one.
    """
    inner: Any = unwrapped(model)
    cls: Any = type(inner)
    if getattr(cls, _ATTACHED, False):
        if _ATTACHED not in vars(cls):
            raise ValueError(
                f"{cls.__name__} was made of an attached class by fully_shard(): it stays attached"
            )
        original = cls.__mro__[1]
        if "_old_forward" in vars(inner):
            inner._old_forward = functools.partial(original.forward, inner)
        inner.__class__ = original
    vars(inner).pop(_VERIFIED, None)
    module: nn.Module = model
    return module


def is_attached(model: Any) -> bool:
    """Whether a call of this model, or of one within its wrappers, understands `distillation`."""
    if not isinstance(model, nn.Module):
        return False
    return any(getattr(type(module), _ATTACHED, False) for module in model.modules())


def prepare_layers(model: nn.Module) -> None:
    """Before a compiled model is asked for outputs of layers; without torch.compile it does nothing.

    In one graph (fullgraph=True) transformers cannot set up what records them.
    """
    modules = list(model.modules()) if is_compiled(model) else []
    for module in modules:
        if getattr(type(module), _ATTACHED, False):
            prepare_recorders(CausalLM(module).decoder)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile wraps a model, or one of the wrappers around it."""
    names = ("_orig_mod", "module")
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        inner = next((x for name in names if isinstance(x := getattr(model, name, None), nn.Module)), None)
        if inner is None:
            return False
        model = inner


@functools.cache
def _attached(cls: Any) -> type:
    original: Callable[..., Any] = cls.forward
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, distillation: Any = None, **batch: Any) -> Any:
        if distillation is None:
            return cls.forward(self, *args, **batch)
        batch.update(zip(names, args, strict=False))
        lm = CausalLM(self)
        if getattr(distillation, "wants_states", False):  # a teacher, whose head is taken outside
            return distillation.states(lm, batch)
        _check_no_router_loss(self)
        return distillation(lm.signal(batch, distillation.layers))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _restored, (cls,), state

    members = {"forward": forward, "__reduce_ex__": __reduce_ex__, _ATTACHED: True}
    members |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), members)


def _restored(cls: Any) -> Any:
    """An empty model of the attached class, for pickle and deepcopy."""
    attached: Any = _attached(cls)
    return attached.__new__(attached)


def _check_no_router_loss(model: Any) -> None:
    if model.training and getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits asks for the load-balancing loss of the experts' router, which is "
            "a part of the model's own loss and not of distillation: set it to False"
        )
