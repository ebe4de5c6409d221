"""HiddenStatesLoss: what layers of a student and of its teacher make of the same tokens, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minitron_kernels._tensors import check_tensor
from minitron_kernels.distillation.hidden_rows import Options, chunk_tokens, hidden_states_loss
from minitron_kernels.distillation.pairing import layer_pairs_of
from minitron_kernels.ops.kl_loss.checks import FLOAT_DTYPES, byte_count, check_constant, integer, refuse
from minitron_kernels.ops.kl_loss.sharded import check_whole, local_head, local_tokens
from minitron_kernels.ops.kl_loss.tokens import Tokens

if TYPE_CHECKING:
    from minitron_kernels.pruning import PruningPlan

KINDS = ("cosine", "mse")
NORMS = ("rms", "layer", "none")
CPU_WORKSPACE_BYTES = 64 << 20  # by default
GPU_WORKSPACE_BYTES = 256 << 20  # by default
_ANY_LABEL = (2**62, 2**62)  # which label it is, is the business of the logits' loss


class StateMap(nn.Module):
    """The learned linear map from the student's width to the teacher's, `weight` [Ht, H], without bias.

    Its forward hands the weight to a function, so that what FSDP and DeepSpeed hang on a module's forward
    sees to it that the weight is there.
    """

    def __init__(
        self, student_width: int, teacher_width: int, kept_channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.kept_channels = kept_channels
        self.weight = nn.Parameter(torch.empty(teacher_width, student_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each channel onto the one it was cut from; where that is not known, lengths and angles are kept."""
        height, width = self.weight.shape
        with torch.no_grad():
            if self.kept_channels is not None:
                self.weight.zero_()
                self.weight[list(self.kept_channels), list(range(width))] = 1
            elif height == width:
                nn.init.eye_(self.weight)
            else:  # a state whose mean square is 1 comes out with 1
                nn.init.orthogonal_(self.weight, gain=max(1.0, height / width) ** 0.5)

    def forward(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        """use(weight), where a weight that is sharded is gathered; its gradient is averaged over its mesh."""
        check_whole("the map's weight", self.weight, ndim=2)
        return use(local_head("the map's weight", self.weight))

    def extra_repr(self) -> str:
        """Both widths."""
        return f"student_width={self.weight.shape[-1]}, teacher_width={self.weight.shape[0]}"


class HiddenStatesLoss(nn.Module):
    """Cosine or mean squared difference of hidden states: the term L_is of Minitron.

    For each pair of layers and each valid token, of the student's state x [H] and the teacher's z [Ht]:

        u = M norm(x),  t = norm(z)
        cosine   1 - u·t / (‖u‖ ‖t‖)               no unit, in [0, 2]
        mse      Σ_c (u_c - t_c)² / Ht              in units of the normalised states' mean square

    and the loss is the mean over pairs of the sum over tokens, divided as linear_kl_loss() divides: by the
    number of valid tokens, or by num_items. (The paper adds up the pairs; with a dynamic weight it is the
    same.) M is one map for all pairs, and there is none where the widths are equal.

    `norm` makes post-norm states of the residual stream, whose size differs between models and layers: "rms"
    divides by √mean(x²), "layer" subtracts the mean before that, both without a gain and without an ε.
    (A cosine does not change with "rms", which is then left out.) Few channels often hold most of a stream's
    energy; the models' norms weigh these down by their gain: give it as `channel_weights`, which multiply
    u and t. The last layer's state is what the heads are given, after the final norm.

    Both sums and gradients are made in chunks of tokens, in fp32 (float64 for float64), and made again in the
    backward. Beside the gradients at most `workspace_bytes` are used, and the map in its operands' dtype (up
    to 64 MiB more of it where a device cannot multiply 16-bit operands to fp32). Under autocast the product
    with the map takes its dtype. Tokens that do not count are not looked at: NaN may stand there. A state of
    zeros has no direction: its cosine loss is 1, without a gradient.

    The map is a parameter of this module (`map.weight`, fp32), and learns with the student: an optimizer must
    have it. DistillationLoss.attach_map(student) makes it a part of the student, where optimizers, DDP, FSDP
    and checkpoints find it. It starts as the identity onto `kept_channels`, or for equal widths, else as a
    random matrix of orthonormal columns times √(Ht/H) (rows, where Ht < H).

    Args:
        layers: {student layer: teacher layer}, from 0; layer_pairs() makes them.
        kind: "cosine" or "mse".
        norm: "rms", "layer" or "none".
        student_width: H; with `teacher_width` it says that there may be a map.
        teacher_width: Ht.
        learn_map: whether there is a map; by default if the two widths differ.
        kept_channels: the teacher's channel that each of the student's was, [H], such as PruningPlan.hidden.
        channel_weights: [Ht] constants, such as the gain of the teacher's final norm.
        workspace_bytes: budget for scratch memory, by default 64 MiB on a CPU and 256 MiB elsewhere.

    Raises:
        TypeError, ValueError: an argument of wrong type or range; the message names it.

    Source: Minitron (arXiv 2407.14679) section 3.
    """

    def __init__(
        self,
        layers: Mapping[int, int],
        *,
        kind: str = "cosine",
        norm: str = "rms",
        student_width: int | None = None,
        teacher_width: int | None = None,
        learn_map: bool | None = None,
        kept_channels: Sequence[int] | None = None,
        channel_weights: Tensor | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = _checked_layers(layers)
        for name, value, known in (("kind", kind, KINDS), ("norm", norm, NORMS)):
            if value not in known:
                refuse(name, f"one of {', '.join(known)}", repr(value))
        self.kind, self.norm = kind, norm
        if workspace_bytes is not None and byte_count("workspace_bytes", workspace_bytes) < 1:
            refuse("workspace_bytes", "1 or more", workspace_bytes)
        self.workspace_bytes = workspace_bytes
        widths = _checked_widths(student_width, teacher_width, learn_map, kept_channels)
        self.widths = widths
        differ = widths is not None and widths[0] != widths[1]
        self.map: StateMap | None = None
        if widths is not None and (differ if learn_map is None else learn_map):
            kept = None if kept_channels is None else tuple(int(channel) for channel in kept_channels)
            self.map = StateMap(*widths, kept)
        self.channel_weights: Tensor | None
        if channel_weights is not None:
            check_tensor("channel_weights", channel_weights)
            if channel_weights.dim() != 1 or (widths and channel_weights.shape[0] != widths[1]):
                refuse("channel_weights", "[teacher_width]", tuple(channel_weights.shape))
            channel_weights = channel_weights.detach().clone()
        self.register_buffer("channel_weights", channel_weights)

    @classmethod
    def from_plan(cls, plan: PruningPlan, *, every: int = 1, **options: Any) -> HiddenStatesLoss:
        """The term for a student that `plan` cut: its layers, both widths, and a map onto kept channels.

        Args:
            plan: a PruningPlan of make_plan() or PruningPlan.load().
            every: keep each `every`-th pair of layers, counted back from the last.
            **options: of HiddenStatesLoss, which win over what the plan says.
        """
        widths = len(plan.hidden), plan.source_config["hidden_size"]
        given: dict[str, Any] = {"student_width": widths[0], "teacher_width": widths[1]}
        if widths[0] != widths[1] or options.get("learn_map"):
            given["kept_channels"] = plan.hidden
        return cls(**{"layers": layer_pairs_of(plan, every=every), **given, **options})

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Layers of the student whose states forward() needs, rising."""
        return tuple(sorted(self.layers))

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose states forward() needs, rising."""
        return tuple(sorted(set(self.layers.values())))

    def forward(
        self,
        student: Mapping[int, Tensor],
        teacher: Mapping[int, Tensor],
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: {layer: its states [..., H]} of all student_layers; gradients flow to them.
            teacher: {layer: its states [..., Ht]} of all teacher_layers, constants on the student's device.
            labels: see linear_kl_loss(), as all that follow; they only say which tokens are valid.
            mask: as above.
            token_weights: as above.
            num_items: as above.
            ignore_index: as above.

        Returns:
            0-dim float32 (float64 for float64); 0 where no token is valid.

        Raises:
            TypeError, ValueError: states that are missing, of another shape, dtype or device, sharded, or
                (teacher) that require grad; the message names them.
        """
        missing = [
            f"the {side}'s signal has {_layer_list(given)}, but the hidden-state term needs "
            f"{_layer_list(wanted)}"
            for side, given, wanted in (
                ("student", student, self.student_layers),
                ("teacher", teacher, self.teacher_layers),
            )
            if not set(wanted) <= set(given)
        ]
        if missing:
            raise ValueError(
                "; ".join(missing) + ": pass the loss's student_layers and teacher_layers to what makes the "
                "signals; a cached teacher has only the layers that were stored"
            )
        xs = [local_tokens(f"student layer {i}", student[i]) for i in self.layers]
        zs = [local_tokens(f"teacher layer {j}", teacher[j]) for j in self.layers.values()]
        self._check_states(xs, zs)
        tokens = Tokens.of(
            xs[0],
            labels,
            ignore_index,
            mask,
            token_weights,
            kl_weight=1.0,
            ce_weight=0.0,
            temperature=None,
            reduction="mean",
            num_items=num_items,
            return_parts=False,
            vocab_sizes=_ANY_LABEL,
        )
        weights, _ = tokens.row_weights()
        assert weights is not None
        rows = (weights / len(xs)).expand(tokens.shape.numel())
        if tokens.computed is not None:
            rows = torch.where(tokens.computed, rows, 0.0)

        def loss(weight: Tensor | None) -> Tensor:
            if weight is not None and weight.device != xs[0].device:
                raise ValueError(
                    f"the map is on {weight.device}, but the student's layers are on {xs[0].device}: "
                    f'loss.to("{xs[0].device}")'
                )
            options = self._options(xs[0], weight, zs[0].shape[-1])
            return hidden_states_loss(xs, zs, weight, self.channel_weights, rows, tokens.computed, options)

        return loss(None) if self.map is None else self.map(loss)

    def _options(self, x: Tensor, weight: Tensor | None, teacher_width: int) -> Options:
        sums = torch.promote_types(x.dtype, torch.float32)
        operands = sums
        if weight is not None and sums == torch.float32:
            if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
                operands = torch.get_autocast_dtype(x.device.type)
            elif weight.dtype == x.dtype:
                operands = x.dtype
        budget = self.workspace_bytes
        if budget is None:
            budget = CPU_WORKSPACE_BYTES if x.device.type == "cpu" else GPU_WORKSPACE_BYTES
        tokens = chunk_tokens(int(budget), x.shape[-1], teacher_width, sums.itemsize)
        norm = "none" if (self.kind, self.norm) == ("cosine", "rms") else self.norm
        return Options(self.kind, norm, operands, tokens)

    def _check_states(self, xs: list[Tensor], zs: list[Tensor]) -> None:
        first, first_layer = xs[0], next(iter(self.layers))
        width, teacher_width = first.shape[-1:], zs[0].shape[-1:]
        named = [("student", i, x, width) for i, x in zip(self.layers, xs, strict=True)]
        named += [("teacher", j, z, teacher_width) for j, z in zip(self.layers.values(), zs, strict=True)]
        for side, layer, x, like in named:
            name = f"{side} layer {layer}"
            check_tensor(name, x)
            if x.dtype not in FLOAT_DTYPES or (x.dtype == torch.float64) != (first.dtype == torch.float64):
                raise TypeError(
                    f"{name} is {x.dtype}: wanted are float32, bfloat16 or float16, or float64 for all; "
                    f"student layer {first_layer} is {first.dtype}"
                )
            if x.device != first.device:
                raise ValueError(
                    f"{name} is on {x.device}, but student layer {first_layer} is on {first.device}: move "
                    f"the {side}'s layers there, as its hidden states"
                )
            if x.dim() < 1 or x.shape[:-1] != first.shape[:-1] or x.shape[-1:] != like:
                raise ValueError(
                    f"{name} must be {(*first.shape[:-1], *like)}, tokens as those of student layer "
                    f"{first_layer} and one width for all layers of a side; got {tuple(x.shape)}"
                )
            if side == "teacher":
                check_constant(name, x)
        widths = (*width, *teacher_width)
        if self.widths is None and widths[0] != widths[1]:
            raise ValueError(
                f"the student's layers have width {widths[0]} and the teacher's {widths[1]}: a map is "
                f"needed, HiddenStatesLoss(..., student_width={widths[0]}, teacher_width={widths[1]})"
            )
        if self.widths is not None and widths != self.widths:
            raise ValueError(
                f"the layers have widths {widths[0]} (student) and {widths[1]} (teacher), but the loss was "
                f"made for student_width={self.widths[0]}, teacher_width={self.widths[1]}"
            )
        channels = self.channel_weights
        if channels is not None and (channels.shape != teacher_width or channels.device != first.device):
            raise ValueError(
                f"channel_weights must be [{widths[1]}] on {first.device}, got {tuple(channels.shape)} on "
                f"{channels.device}"
            )

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        shown = [f"layers={self.layers}", f"kind={self.kind!r}", f"norm={self.norm!r}"]
        if self.channel_weights is not None:
            shown.append(f"channel_weights={list(self.channel_weights.shape)}")
        if self.workspace_bytes is not None:
            shown.append(f"workspace_bytes={self.workspace_bytes}")
        return ", ".join(shown)


def _layer_list(layers: Any) -> str:
    """Their numbers in words."""
    layers = sorted(layers)
    return f"layers {', '.join(map(str, layers))}" if layers else "no layers"


def _checked_layers(layers: Any) -> dict[int, int]:
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"layers must be a mapping {{student layer: teacher layer}}, got {type(layers).__name__}: "
            "layer_pairs(num_student, num_teacher) makes one"
        )
    pairs = {integer("layers", i): integer("layers", j) for i, j in layers.items()}
    if not pairs:
        raise ValueError("layers is empty: leave the hidden-state term out, or name pairs of layers")
    if min(*pairs, *pairs.values()) < 0:
        refuse("layers", "counted from 0, without negative numbers", pairs)
    return pairs


def _checked_widths(
    student: int | None, teacher: int | None, learn_map: bool | None, kept_channels: Sequence[int] | None
) -> tuple[int, int] | None:
    if (student is None) != (teacher is None):
        raise ValueError(
            f"student_width and teacher_width go together, got {student} and {teacher}: give both or none"
        )
    if student is None or teacher is None:
        if learn_map or kept_channels is not None:
            raise ValueError("a map needs both student_width and teacher_width")
        return None
    for name, width in (("student_width", student), ("teacher_width", teacher)):
        if integer(name, width) < 1:
            refuse(name, "1 or more", width)
    if learn_map is False and student != teacher:
        raise ValueError(f"learn_map=False, but widths {student} and {teacher} differ: a map is needed")
    if kept_channels is not None:
        if student == teacher and not learn_map:
            raise ValueError("kept_channels are where a map starts, but there is none: learn_map=True")
        kept = [integer("kept_channels", channel) for channel in kept_channels]
        if len(kept) != student or len(set(kept)) != student or not 0 <= min(kept) <= max(kept) < teacher:
            raise ValueError(
                f"kept_channels must be student_width={student} different channels below "
                f"teacher_width={teacher}, got {len(kept)} of which {len(set(kept))} are different, from "
                f"{min(kept, default=None)} to {max(kept, default=None)}"
            )
    return student, teacher
