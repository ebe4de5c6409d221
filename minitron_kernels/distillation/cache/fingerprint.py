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


def model_fingerprint(model: nn.Module) -> str:
    """ "model:" and a SHA-256 of the model's config and weights, their dtype included.

    All weights are read: some seconds for 10 GB.

    Raises:
        TypeError: weights that are sharded over ranks or on no device: give the teacher a name instead.
    """
    whole = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        whole.update(json.dumps(_active(config.to_dict()), sort_keys=True, default=str).encode())
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
