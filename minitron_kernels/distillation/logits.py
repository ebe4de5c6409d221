"""What a causal language model does to head(hidden) before it calls the result its logits.

Some families multiply it, some cap it, and the same name in a config means a factor in one and a divisor in
another. So the config only proposes, and the model itself is asked: probe() feeds random hidden states of
three sizes to the model's own last steps and looks which proposal they follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_kernels._modules import eval_mode
from minitron_kernels._tensors import is_dtensor
from minitron_kernels.ops.kl_loss.sharded import local_head

_TOKENS = 6  # of the probe
_SIZES = (0.5, 4.0, 40.0)  # standard deviations of the probe's logits; the last one shows a softcap

# names in configs: of a factor (Granite's divides), and of a softcap
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")
_DIVIDES = ("granite",)  # model types, by their beginning, whose logits_scaling is a divisor

# whose logits are what logit_options() says: for models that cannot be asked before they are compiled
KNOWN_TYPES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3",
    "nemotron", "granite", "granitemoe", "cohere", "cohere2", "falcon_h1", "olmo2", "smollm3", "gpt_neox",
)  # fmt: skip


class LogitOptions(NamedTuple):
    """logits = softcap·tanh(logit_scale·head(hidden)/softcap), or logit_scale·head(hidden) without one."""

    logit_scale: float
    softcap: float | None


class NotCalledError(TypeError):
    """The model's forward does not call the module that was taken for its decoder."""


def logit_options(config: Any) -> LogitOptions:
    """What a config says of the logits; outside of KNOWN_TYPES a guess, until probe() agrees."""
    return next(proposals(config))


def proposals(config: Any) -> Iterator[LogitOptions]:
    """The options that a config may mean, the likeliest first."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    divides = str(getattr(text, "model_type", "")).startswith(_DIVIDES)
    scales: list[float] = []
    for name in _FACTORS:
        value = _number(getattr(text, name, None))
        if value:
            pair = [value, 1 / value]
            scales += reversed(pair) if name == "logits_scaling" and divides else pair
    caps = [x for x in (_number(getattr(text, name, None)) for name in _SOFTCAPS) if x]
    seen = set()
    for scale in (*scales, 1.0):
        for cap in (*caps, None):
            if (scale, cap) not in seen:
                seen.add((scale, cap))
                yield LogitOptions(scale, cap)


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def why_not_now(model: nn.Module) -> str | None:
    """Why a model cannot be run where it stands, outside of a wrapper's forward; None: it can."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "FSDP1 holds its weights"
    for name, x in model.named_parameters():
        if x.device.type == "meta":
            return f"{name} is on the meta device"
        if is_dtensor(x):
            return f"{name} is a DTensor"
        if hasattr(x, "ds_id"):
            return f"{name} is ZeRO-3's"
    return None


@torch.no_grad()
def probe(
    model: Any, decoder: Any, head: Callable[[Tensor], Any], states: Callable[[dict[str, Any]], Tensor]
) -> LogitOptions:
    """Runs the whole model once on a few tokens, and says what it does to head(hidden).

    The decoder's output is replaced by random hidden states on their way to the head, from small to large, so
    that the answer does not depend on what the model has learnt. Also run is `states`, the decoder alone, and
    compared with what the whole model had from it. Training modes are put back; no random number is drawn
    from torch's generators.

    Raises:
        TypeError: the logits follow none of the config's proposals, or the model or its decoder cannot be run
            on token ids alone, or the two differ.
    """
    name = type(model).__name__
    ids = _ids(model)
    seen: dict[str, Tensor] = {}

    def feed(_module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = out[0]
        seen["own"] = hidden
        seen["fed"] = fed = _wide(hidden, head, logit_options(model.config).logit_scale)
        if isinstance(out, tuple):
            return (fed, *out[1:])
        for key, value in out.items():
            if value is hidden:
                out[key] = fed
        return out

    with eval_mode(model):
        hook = decoder.register_forward_hook(feed)
        try:
            out = model(input_ids=ids, use_cache=False, return_dict=True)
        except Exception as error:
            raise TypeError(
                f"{name} could not be run on token ids alone to see what it does to its logits: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            hook.remove()
        if "fed" not in seen:
            raise NotCalledError(
                f"{name}.forward does not call its {type(decoder).__name__}, whose hidden states would be "
                "taken: give linear_kl_loss() the hidden states and head yourself"
            )
        logits = getattr(out, "logits", None)
        product = _product(head, seen["fed"])
        if not isinstance(logits, Tensor) or logits.shape != product.shape:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"the logits of {name} are {shape}, but its output layer makes {tuple(product.shape)}: "
                "they are something else than logit_scale·head(hidden) with a softcap. Give linear_kl_loss() "
                "the hidden states and head that they amount to, or kl_loss() the logits"
            )
        alone = states({"input_ids": ids})
    low = max((_eps(x) for x in (seen["own"], product, logits)), default=0.0)
    if torch.is_autocast_enabled(ids.device.type):
        low = max(low, torch.finfo(torch.get_autocast_dtype(ids.device.type)).eps)
    found = _matching(model.config, product, logits, tolerance=max(4 * low, 1e-4), name=name)
    if _distance(alone, seen["own"]) > max(16 * low, 1e-3):
        raise TypeError(
            f"the decoder of {name} ({type(decoder).__name__}) called alone gives other hidden states than "
            "within the model, which does more to its inputs: give linear_kl_loss() the hidden states"
        )
    return found


def _matching(config: Any, product: Tensor, logits: Tensor, *, tolerance: float, name: str) -> LogitOptions:
    """The first proposal that the logits follow, every token within the tolerance."""
    tried = {}
    for options in proposals(config):
        z = product.float() * options.logit_scale
        if options.softcap is not None:
            z = options.softcap * torch.tanh(z / options.softcap)
        tried[options] = max(
            _distance(a, b) for a, b in zip(z.flatten(0, -2), logits.flatten(0, -2), strict=True)
        )
        if tried[options] <= tolerance:
            return options
    closest = min(tried, key=lambda x: tried[x])
    raise TypeError(
        f"the logits of {name} are not what its config says of them: they differ by {tried[closest]:.2g} "
        f"of their size from the closest, logit_scale {closest.logit_scale:g} and softcap "
        f"{closest.softcap}. Give linear_kl_loss() its hidden states and head with the right ones, or "
        "kl_loss() the logits"
    )


def _ids(model: Any) -> Tensor:
    """[1, 6] token ids that mean nothing special to the model."""
    embeddings = model.get_input_embeddings()
    special: set[int] = set()
    parts = [model.config, *(x for x in vars(model.config).values() if hasattr(x, "model_type"))]
    for part in parts:
        for key, value in vars(part).items():
            if key.endswith(("token_id", "token_index", "token_ids")):
                values = value if isinstance(value, (list, tuple)) else [value]
                special |= {x for x in values if isinstance(x, int)}
    size = getattr(embeddings, "num_embeddings", None) or model.config.get_text_config().vocab_size
    ids = [x for x in range(min(size, 4096)) if x not in special][-_TOKENS:]
    return torch.tensor([ids], device=embeddings.weight.device)


def _wide(hidden: Tensor, head: Callable[[Tensor], Any], logit_scale: float) -> Tensor:
    """Random hidden states like `hidden`, whose scaled logits have the standard deviations _SIZES in turn."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator, device="cpu").to(hidden)
    unit = (_product(head, noise).float().std() * abs(logit_scale)).clamp_min(1e-20)
    sizes = unit.new_tensor([_SIZES[i % len(_SIZES)] for i in range(hidden.shape[-2])])
    return noise * (sizes / unit).to(hidden.dtype)[:, None]


def _product(head: Callable[[Tensor], Any], hidden: Tensor) -> Tensor:
    """What the output layer makes of hidden states."""
    x, weight, bias = head(hidden)
    weight = local_head("the head", weight)
    bias = None if bias is None else local_head("the head's bias", bias)
    if not torch.is_autocast_enabled(x.device.type):
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    return F.linear(x, weight, bias)


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖; NaN, which no tolerance lets pass, becomes infinite."""
    a, b = a.float(), b.float()
    distance = float((a - b).norm() / b.norm().clamp_min(1e-20))
    return distance if distance == distance else float("inf")


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps
