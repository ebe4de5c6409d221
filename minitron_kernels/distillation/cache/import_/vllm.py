"""What vLLM gives of a teacher: extracted hidden states (exact, with norm and head), and prompt_logprobs.

Hidden states: with speculative_config {"method": "extract_hidden_states", ...} and kv_connector
"ExampleHiddenStatesConnector" vLLM writes a safetensors file a request: hidden_states [T, layers, H] and
token_ids [T]. The layers are those of eagle_aux_hidden_state_layer_ids in that order; the model's number of
layers stands for the output of the last one, which comes without the final norm.

prompt_logprobs: for each token but the first, the log-probabilities of the likeliest tokens in its place and
of the token itself. At most 20 by default (max_logprobs of the engine), and nothing of all the others: how
much probability they have together follows only from the softmax having been over the whole vocabulary
(logprobs_mode "raw_logprobs", the default, without penalties or masks). 20 tokens of a flat distribution are
little of it: set max_logprobs to 128, or take hidden states.

Source: vLLM, docs/features/speculative_decoding/extract_hidden_states.md, and vllm/logprobs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron_kernels.distillation.cache.import_.tails import (
    check_tail,
    check_vocab_size,
    refuse,
    topk_payload,
)

_NONE_LEFT = -9999.0  # vLLM's server writes this for -inf, which JSON does not know


def rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """x weight / sqrt(mean(x²) + eps), in fp32: the final norm where its module is not at hand.

    `weight` [H] is the factor itself: of families that keep it as weight - 1 (Gemma), give weight + 1.
    """

    def norm(x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(torch.float32)

    return norm


def read_vllm_hidden_states(
    files: str | Path | Iterable[str | Path],
    norm: Callable[[Tensor], Tensor],
    *,
    layer_ids: Sequence[int],
    num_layers: int,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Sequences of files that vLLM's ExampleHiddenStatesConnector wrote.

    Args:
        files: the files (hidden_states_path of each output), or their folder.
        norm: the teacher's final norm: its module, as model.model.norm of Llama, or rms_norm(weight, eps).
            Called on [T, H]; a module's parameters say on which device and in which dtype.
        layer_ids: eagle_aux_hidden_state_layer_ids of that run.
        num_layers: num_hidden_layers of the teacher; one of layer_ids, or there is no last layer's output.

    Yields:
        (token_ids [T] int64, {"hidden": [T, H] bf16}), the payload of tier "hidden".

    Raises:
        ModuleNotFoundError: safetensors is needed.
        ValueError: there is no file; one is damaged, of another format, or still being written (its .lock is
            held); the layers are not as many; hidden states are not finite. Names the file.
    """
    if not callable(norm):
        raise TypeError(
            "norm must be the teacher's final norm, a module or rms_norm(weight, eps): vLLM's hidden states "
            f"come without it; got {type(norm).__name__}"
        )
    layers = list(layer_ids)
    if num_layers not in layers:
        raise ValueError(
            f"layer_ids {layers} do not have {num_layers}, num_layers of the teacher, which is the last "
            "layer's output: only that and the head give the teacher's logits"
        )
    if isinstance(files, str | Path):
        folder = Path(files)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        if not files:
            raise ValueError(f"{folder}: has no .safetensors file of vLLM")
    return _hidden_sequences([Path(file) for file in files], norm, layers, layers.index(num_layers))


def _hidden_sequences(
    files: list[Path], norm: Callable[[Tensor], Tensor], layers: list[int], last: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for path in files:
        tensors = _load(path)
        if set(tensors) != {"hidden_states", "token_ids"}:
            refuse(str(path), f"must have hidden_states and token_ids, got {', '.join(sorted(tensors))}")
        hidden, tokens = tensors["hidden_states"], tensors["token_ids"]
        if hidden.dim() != 3 or tokens.dim() != 1 or len(hidden) != len(tokens) or tokens.is_floating_point():
            shapes = f"{list(hidden.shape)} and {list(tokens.shape)}"
            refuse(str(path), f"hidden_states must be [T, layers, H] for token_ids [T], got {shapes}")
        if hidden.shape[1] != len(layers):
            refuse(str(path), f"has {hidden.shape[1]} layers, and layer_ids {layers} are {len(layers)}")
        if len(tokens) == 0:
            refuse(str(path), "has no token (a request of embeddings keeps none)")
        yield tokens.to(torch.int64), {"hidden": _normed(str(path), hidden[:, last], norm)}


def _normed(where: str, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    if not x.isfinite().all():
        place = int((~x.isfinite()).nonzero()[0, 0])
        refuse(where, f"hidden states must be finite; position {place} is not")
    parameter = next(norm.parameters(), None) if isinstance(norm, nn.Module) else None
    with torch.no_grad():
        normed = norm(x if parameter is None else x.to(parameter.device, parameter.dtype))
    if normed.shape != x.shape:
        raise ValueError(f"norm must keep the shape {list(x.shape)}, got {list(normed.shape)}")
    normed = normed.to("cpu", torch.bfloat16)
    if not normed.isfinite().all():
        refuse(where, "hidden states are not finite after norm")
    return normed


def _load(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "reading vLLM's hidden states needs safetensors: pip install safetensors"
        ) from None
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if _locked(Path(f"{path}.lock")):
        raise ValueError(f"{path}: is still being written, vLLM holds {path}.lock: wait for it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is damaged, or not safetensors: {error}") from None


def _locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        import fcntl
    except ModuleNotFoundError:  # not a system that vLLM runs on
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_vllm_prompt_logprobs(
    requests: Iterable[Any],
    vocab_size: int,
    *,
    tail: str | None = None,
    slack: float = 0.01,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Sequences of vLLM's prompt_logprobs. Read what they are in the module's first lines.

    Args:
        requests: vLLM's RequestOutput, or pairs (prompt_token_ids, prompt_logprobs): for each token None (the
            first) or {token id: Logprob}, as Python has them, or as its server's JSON does.
        vocab_size: number of tokens.
        tail: must be given: what all other tokens have. "rest": 1 - sum, right for raw log-probabilities of
            a softmax over the whole vocabulary; or "renormalise": nothing, see tails.py.
        slack: how far above 1 a position's sum may be.

    Yields:
        (token_ids [T] int64, payload of tier "topk"): k is the most that a position has; the row of the last
        token, of which prompt_logprobs say nothing, has no ids.

    Raises:
        ValueError: `tail` is not given; the entries are not as many as the tokens, or cannot be
            log-probabilities; names the request.
    """
    check_tail(tail, "vLLM's prompt_logprobs (at most 20 tokens a position by default, max_logprobs)")
    check_vocab_size(vocab_size)
    assert tail is not None
    options = {"tail": tail, "vocab_size": vocab_size, "slack": slack}
    return _prompt_sequences(requests, options)


def _prompt_sequences(
    requests: Iterable[Any], options: dict[str, Any]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for number, request in enumerate(requests):
        where = f"request {number}"
        if hasattr(request, "prompt_logprobs"):
            tokens, entries = request.prompt_token_ids, request.prompt_logprobs
        else:
            tokens, entries = request
        if entries is None:
            refuse(where, "has no prompt_logprobs: set SamplingParams(prompt_logprobs=k)")
        tokens, entries = torch.as_tensor(tokens, dtype=torch.int64, device="cpu"), list(entries)
        if len(entries) != len(tokens):
            refuse(where, f"has prompt_logprobs of {len(entries)} tokens for {len(tokens)} token ids")
        if len(tokens) < 2 or entries[0]:
            refuse(where, "must have two tokens at least, and None or nothing for the first")
        known = [_entry(entry, f"{where}: token {t}") for t, entry in enumerate(entries[1:], 1)]
        k = max(len(row) for row in known)
        ids = torch.full((len(known), k), -1, dtype=torch.int64, device="cpu")
        logprobs = torch.full((len(known), k), -math.inf, dtype=torch.float32, device="cpu")
        for t, row in enumerate(known):
            ids[t, : len(row)] = torch.tensor([token for token, _ in row], device="cpu")
            logprobs[t, : len(row)] = torch.tensor([logprob for _, logprob in row], device="cpu")
        yield tokens, topk_payload(where, ids, logprobs, length=len(tokens), **options)


def _entry(entry: Any, where: str) -> list[tuple[int, float]]:
    """(token id, log-probability), the likeliest first."""
    if not isinstance(entry, Mapping) or not entry:
        refuse(where, f"must have {{token id: Logprob}}, got {type(entry).__name__}")
    found = []
    for token, value in entry.items():
        logprob: Any = (
            value.get("logprob") if isinstance(value, Mapping) else getattr(value, "logprob", value)
        )
        try:
            found.append((int(token), float(logprob)))
        except (TypeError, ValueError):
            refuse(where, f"must have {{token id: Logprob}}, got {token!r}: {value!r}")
    found = [(token, -math.inf if logprob == _NONE_LEFT else logprob) for token, logprob in found]
    return sorted(found, key=lambda pair: -pair[1])
