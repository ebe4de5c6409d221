"""Who a teacher is: hashes of its weights, its head, and the vocabulary of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels._tensors import bytes_of, is_dtensor

# entries of a config that change nothing of what the model computes
_IDLE = (
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "dtype",
    "torch_dtype",
    "architectures",
    "problem_type",
    "id2label",
    "label2id",
)
# of an adapter's config, what changes no output: where it came from, and how it is trained
_IDLE_OF_ADAPTERS = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "lora_dropout")


def model_fingerprint(model: nn.Module, *, disable_adapters: bool = False) -> str:
    """ "model:" and a SHA-256 of the model's config and weights, their dtype included.

    All weights are read: some seconds for 10 GB. Of a PEFT model the adapters' settings count too (their
    scale is in no weight), which of them are active, and `disable_adapters`, as ModelTeacher has it.

    Raises:
        TypeError: weights that are sharded over ranks or on no device: give the teacher a name instead.
    """
    whole = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        whole.update(json.dumps(_active(config.to_dict()), sort_keys=True, default=str).encode())
    if (adapters := _adapters(model, disable_adapters)) is not None:
        whole.update(json.dumps(adapters, sort_keys=True, default=_written).encode())
    for name, x in sorted(model.state_dict(keep_vars=True).items()):
        if is_dtensor(x) or x.device.type == "meta":
            raise TypeError(
                f"the teacher's {name} is {'sharded' if is_dtensor(x) else 'on no device'}, and cannot be "
                "hashed here: give teacher_name="
            )
        whole.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        for piece in bytes_of(x):
            whole.update(piece)
    return f"model:{whole.hexdigest()}"


def _adapters(model: Any, disabled: bool) -> Any:
    """What beside weights says how a PEFT model's adapters count; None where there are none."""
    found = getattr(model, "peft_config", None)
    if not found:
        return None
    if disabled:
        return "disabled"
    settings = {
        name: {key: value for key, value in config.to_dict().items() if key not in _IDLE_OF_ADAPTERS}
        for name, config in found.items()
    }
    return [settings, getattr(model, "active_adapters", None)]


def _written(value: Any) -> Any:
    """What JSON does not know; sets, whose order is another in each process, by their sorted members."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _active(config: Any) -> Any:
    """A config without what changes nothing."""
    if isinstance(config, dict):
        return {
            str(key): _active(value)
            for key, value in config.items()
            if key not in _IDLE and not str(key).startswith("_")
        }
    return config


def head_fingerprint(weight: Tensor, bias: Tensor | None = None) -> str:
    """ "head:" and a SHA-256 of the values of a head [V, H] and its bias, as fp32: the same in any dtype that
    holds them."""
    whole = hashlib.sha256()
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if is_dtensor(x) or x.device.type == "meta":
            raise TypeError(f"the head's {name} must be whole and on a device, to be hashed")
        whole.update(f"{name} {tuple(x.shape)}".encode())
        for piece in bytes_of(x, torch.float32):
            whole.update(piece)
    return f"head:{whole.hexdigest()}"


def tokenizer_hash(tokenizer: Any) -> str:
    """ "vocabulary:" and a SHA-256 of a tokenizer's tokens and ids; padding and truncation do not count.

    Raises:
        TypeError: it has no get_vocab().
    """
    if not hasattr(tokenizer, "get_vocab"):
        got = type(tokenizer).__name__
        raise TypeError(f"tokenizer must have get_vocab(), as those of transformers; got {got}")
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return f"vocabulary:{hashlib.sha256(json.dumps(tokens).encode()).hexdigest()}"
