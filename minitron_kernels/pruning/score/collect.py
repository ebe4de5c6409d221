"""collect_importance(): scores of a Hugging Face decoder from forward passes over calibration text."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minitron_kernels._command.progress import tqdm_for
from minitron_kernels.ops.importance.moments import MOMENT_OF
from minitron_kernels.pruning.families.wrappers import is_fsdp
from minitron_kernels.pruning.score.batches import Tokens, read_batch
from minitron_kernels.pruning.score.hooks import HookedModel
from minitron_kernels.pruning.score.packing import check_apart, check_apart_by_config, reads_one_row
from minitron_kernels.pruning.score.recorder import Recorder
from minitron_kernels.pruning.score.scores import AXES, ImportanceScores, Options


def collect_importance(
    model: nn.Module,
    batches: Iterable[Any],
    axes: Sequence[str] | None = None,
    *,
    seq: Sequence[str] = ("mean",),
    mlp_tap: str = "down_proj_input",
    head_score: str = "norm",
    expert_score: str = "norm",
    resume_from: ImportanceScores | None = None,
    data_parallel_group: ProcessGroup | None = None,
    context_parallel_group: ProcessGroup | None = None,
    progress: bool | None = None,
    backend: str = "auto",
) -> ImportanceScores:
    """Scores a model's channels, neurons, heads, experts and layers by forward passes over `batches`.

    One forward pass serves all axes. No activation is kept: each is reduced to sums at once. Gradients are
    off, the model is in eval mode and makes no key/value cache. The LM head does not run, since the model's
    decoder is called (under FSDP2 the whole model, for the logits of the last token only). Afterwards the
    model is as it was, also after an error.

    | axis | tapped at | score of one token |
    |---|---|---|
    | hidden | output of each norm that feeds linear layers, and of the final one | each channel |
    | mlp | input of down_proj, or output of up_proj | each neuron |
    | heads | input of o_proj | L2 norm of each head, or each channel |
    | layers | input and output of the layer | 1 − cos of the two |
    | experts | output of each expert, for the tokens routed to it | L2 norm, or that times the gate (REAP) |
    | expert_mlp | input of each expert's down projection | each neuron |
    | conv | input of the projection behind a short convolution | each channel |
    | mamba | x, of what in_proj gives a state space (Mamba-2) | each channel of each head |
    | delta | input of the projection behind a gated delta net | L2 norm of each value head |

    "layers" and "experts" are means over tokens; the others are aggregated over tokens by `seq`, then over
    sequences when scores are read. With "hidden", the energy Σx² of each norm's input is collected too, by
    which the gains of norms are rescaled. Experts whose weights are stacked in one module are run a second
    time: scoring them costs as much as the experts themselves, their neurons alone two thirds of that.

    Args:
        model: a causal language model of a known family (see known_families(); register_family() adds one),
            or its decoder alone; plain, compiled, in DistributedDataParallel, under FSDP2, or offloaded by
            device_map. Adapters of PEFT must be merged first.
        batches: token ids, int64 or int32 [B, S] or [S]; or mappings with "input_ids" or "inputs_embeds"
            [B, S, hidden]. A row is a sequence; tokens where attention_mask [B, S] is 0 have no effect on any
            score. Packed sequences are given by position_ids that restart, by the numbers 1, 2, ... of the
            sequences in attention_mask, by seq_idx or by cu_seq_lens_q: scores are those of the sequences one
            by one, or the batch is refused. Batches are not changed.
        axes: of "hidden", "mlp", "heads", "layers", "experts", "expert_mlp", "conv", "mamba", "delta"; None
            for all that the model has.
        seq: sequence aggregations to collect, of "mean", "L2", "var".
        mlp_tap: "down_proj_input", after activation and gate (as ModelOpt), or "up_proj_output" (the paper's,
            for MLPs without a gate).
        head_score: "norm", the paper's L2 norm of each token's head; or "channels", ModelOpt's L2 over the
            scores of a head's channels.
        expert_score: "norm", or "reap" (arXiv 2510.13999): the norm times the router's weight.
        resume_from: scores to continue from, of this rank where there are several; not changed. The result is
            bitwise that of a run that was not interrupted (between batches).
        data_parallel_group: ranks that see different batches; their scores are added at the end, and all get
            the sum. torch.distributed.group.WORLD for all ranks. To be able to resume, leave this argument
            out and save each rank's scores; give it in the last call.
        context_parallel_group: ranks that hold pieces of the same sequences, in the same batches. The sums of
            the pieces are added before they are squared. Batches then need position_ids, and packed sequences
            cu_seq_lens_q: the borders in this rank's piece, equally many on each rank.
        progress: whether tqdm shows a bar; None: where standard error is a terminal.
        backend: of the kernels, see accumulate_importance_().

    Returns:
        Scores; float64 sums, on the CPU.

    Raises:
        TypeError, ValueError: the model, a batch or an option is not as above; a token id is not in the
            vocabulary; the model does not keep packed sequences apart; activations are NaN or infinite. Says
            which batch, and what was wanted.

    Source: Minitron (arXiv 2407.14679) section 2.2; REAP (arXiv 2510.13999); Minitron-SSM (arXiv 2504.11409)
    for state spaces, of which x alone is scored here.

    Example:
        >>> scores = collect_importance(model, batches)
        >>> scores.tables()["mlp"][0]  # the neurons of the first layer
    """
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; one batch goes in a list"
        )
    seq = (seq,) if isinstance(seq, str) else tuple(seq)
    if not seq or len(set(seq)) != len(seq) or not set(seq) <= set(MOMENT_OF):
        raise ValueError(f"seq must be different names out of {', '.join(MOMENT_OF)}, got {seq!r}")
    options = Options(seq, mlp_tap, head_score, expert_score)
    hooked = HookedModel(model)
    scores = hooked.empty_scores(_chosen(axes, hooked), options)
    if resume_from is not None:
        scores.check_alike(resume_from, "resume_from")
        if resume_from.reduced and data_parallel_group is not None:
            raise ValueError(
                "resume_from must be of this rank alone where data_parallel_group is given, got scores of "
                "all ranks; collect without resume_from and merge_() them"
            )
        scores = resume_from.clone()
    recorder = Recorder(scores, context_parallel_group, backend)
    _check_finite("resume_from", recorder.totals())
    read = BatchReader(hooked, whole=context_parallel_group is None)
    count, before = 0, None
    with torch.no_grad(), hooked.hooked(recorder), contextlib.closing(_bar(batches, progress)) as bar:
        for count, batch in enumerate(bar, 1):
            name = f"batches[{count - 1}]"
            inputs, tokens = read(batch, name)
            recorder.start(tokens)
            read.call(**inputs, use_cache=False)
            recorder.flush()
            # checked one batch later, when a GPU has finished it, so that the host does not wait
            if before is not None:
                _check_finite(*before)
            before = name, recorder.totals()
    if before is not None:
        _check_finite(*before)
    if count == 0 and data_parallel_group is None:
        raise ValueError("batches must hold at least one batch, got none: a generator that has been used up?")
    if data_parallel_group is not None:
        if read.device is not None:
            scores.to(read.device)
        scores.all_reduce_(data_parallel_group)
    return scores.to("cpu")


def _chosen(axes: Sequence[str] | None, hooked: HookedModel) -> tuple[str, ...]:
    """The axes to collect, in the order of AXES."""
    have = hooked.axes
    if axes is None:
        return have
    wanted = (axes,) if isinstance(axes, str) else tuple(axes)
    if not wanted or not set(wanted) <= set(AXES):
        raise ValueError(f"axes must be of {', '.join(AXES)}; got {wanted!r}")
    if lacking := [axis for axis in wanted if axis not in have]:
        raise ValueError(
            f"axes must be ones that the model has ({', '.join(have)}), got {', '.join(lacking)} for a "
            f"{hooked.family.model_types[0]}{_why(hooked, lacking)}"
        )
    return tuple(axis for axis in AXES if axis in wanted)


def _why(hooked: HookedModel, axes: Sequence[str]) -> str:
    """Why these axes are not pruned, where the family says so."""
    fixed = hooked.family.fixed(hooked.config)
    return "".join(f"; {axis}: {fixed[axis]}" for axis in axes if axis in fixed)


class BatchReader:
    """Turns batches into the arguments of the model's forward pass, and their tokens.

    Attributes:
        call: what to call for a forward pass through all layers without the LM head.
        device: where the model wants its tokens; None where that is not known.
    """

    def __init__(self, hooked: HookedModel, *, whole: bool) -> None:
        self.device = _input_device(hooked)
        self.call, self._collective = _forward(hooked), is_fsdp(hooked.root)
        self._config, self._vocab, self._whole = hooked.text_config, hooked.sizes["vocab"], whole
        self._one_row, self._routed = reads_one_row(self._config), bool(hooked.sparse)
        # whether it is known that the model keeps packed sequences apart; not checked for ranks' pieces
        self._apart = not whole

    def __call__(self, batch: Any, name: str) -> tuple[dict[str, Any], Tokens]:
        """The arguments and the tokens of a batch. Refuses a packed one if the model mixes its sequences."""
        inputs, tokens = read_batch(
            batch, name, self.device, whole=self._whole, vocab=self._vocab, one_row=self._one_row
        )
        if tokens.packed and not self._apart:
            if self._collective:
                check_apart_by_config(self._config, name)
            else:
                check_apart(
                    self.call,
                    self._config,
                    name,
                    vocab=self._vocab,
                    device=self.device,
                    routed=self._routed,
                )
            self._apart = True
        return inputs, tokens


def _forward(hooked: HookedModel) -> Any:
    """What to call for a forward pass through all layers without the LM head."""
    root = hooked.root
    if not is_fsdp(root):
        return hooked.decoder
    # FSDP2 gathers the embedding only when the outermost sharded module is called
    if "logits_to_keep" not in inspect.signature(root.forward).parameters:
        return root
    return lambda **inputs: root(**inputs, logits_to_keep=1)


def _check_finite(name: str, totals: Mapping[str, tuple[tuple[Any, ...], Tensor]]) -> None:
    """Raises a ValueError that names the batch if its activations were NaN or infinite."""
    if not totals:
        return
    device = next(iter(totals.values()))[1].device
    if bool(torch.cat([total.to(device) for _, total in totals.values()]).isfinite().all()):
        return
    found = [
        f"{axis} at {modules[int((~total.isfinite()).nonzero()[0])]}"
        for axis, (modules, total) in totals.items()
        if not bool(total.isfinite().all())
    ]
    raise ValueError(
        f"{name}: activations are NaN or infinite, first in {', '.join(found)}: is a weight damaged, or the "
        "dtype too narrow (float16)? No scores were made"
    )


def _input_device(hooked: HookedModel) -> torch.device | None:
    """Where the model wants its tokens; None where that is not known."""
    weight = hooked.module(hooked.family.embedding, "hidden").weight
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None:  # sharded: the device it is gathered on; offloaded shards are on another
        name = mesh.device_type
        return (
            torch.device(name)
            if name == "cpu"
            else torch.device(name, torch.accelerator.current_device_index())
        )
    return weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else None


class _Plain:
    """Batches without a progress bar."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def close(self) -> None:
        """Nothing to close."""


def _bar(batches: Iterable[Any], progress: bool | None) -> Any:
    tqdm = tqdm_for(progress)
    return _Plain(batches) if tqdm is None else tqdm(batches, desc="scoring", unit="batch")
