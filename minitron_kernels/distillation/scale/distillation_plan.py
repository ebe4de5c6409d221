"""DistillationPlan, what plan_distillation() gives: memory and traffic of a rank, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_kernels.distillation.scale.activations import COUNTED
from minitron_kernels.distillation.scale.parts import MOMENTS, Way, size_text
from minitron_kernels.distillation.scale.shape import ModelShape
from minitron_kernels.ops.kl_loss.plan import LinearKLPlan


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """One training step of a student and its teacher on tp × fsdp ranks.

    Args:
        student, teacher: their sizes, and the parameters of a rank of tp.
        tp: ranks that share each layer and the vocabulary.
        fsdp: ranks that share parameters and have other sequences.
        tokens: of a rank in a micro-step.
        micro_steps: of a step: forward and backward passes between two updates.
        global_tokens: of all ranks in a step.
        checkpointing: whether layers are made again in the backward.
        loss: what plan_linear_kl_loss() says of a rank's call.
        ours: memory and traffic with linear_kl_loss(tp_group=).
        stock: the same with full logits of both models and F.kl_div.
    """

    student: ModelShape
    teacher: ModelShape
    tp: int
    fsdp: int
    tokens: int
    micro_steps: int
    global_tokens: int
    checkpointing: bool
    loss: LinearKLPlan
    ours: Way
    stock: Way

    @property
    def activations_counted(self) -> bool:
        """Whether the bytes of the student's activations are exact, and not near: by its family."""
        return self.student.model_type in COUNTED

    def explain(self) -> str:
        """The plan as text for people: memory by moment, traffic by collective, ours and the stock way."""
        lines = [
            f"distillation of {self.student.parameters / 1e9:.3g} B parameters from "
            f"{self.teacher.parameters / 1e9:.3g} B, vocabulary {self.student.vocab}",
            f"ranks      {self.tp * self.fsdp}: tensor parallel {self.tp}, FSDP2 {self.fsdp}; the numbers "
            "below are those of one",
            f"step       {self.global_tokens} tokens in {self.micro_steps} micro-steps of {self.tokens} a "
            f"rank{', layers made again in the backward' if self.checkpointing else ''}",
            f"loss       {self.loss.schedule}, chunks of {self.loss.chunk_rows} rows",
        ]
        if not self.activations_counted:
            lines.append(f"activations are estimated: they are exact for {', '.join(COUNTED)}")
        for way in (self.ours, self.stock):
            lines += ["", way.name]
            lines += [f"{size_text(part.nbytes):>12}  {part.name}" for part in way.parts if part.nbytes]
            lines += [
                f"{size_text(way.bytes_at(moment)):>12}  in all at {name}"
                f"{' (the most)' if moment == way.peak_moment else ''}"
                for moment, name in MOMENTS.items()
            ]
            lines += [
                f"{size_text(one.sent_bytes):>12}  sent in {one.count} {one.kind}s over {one.group}: "
                f"{one.name}"
                for one in way.collectives
            ]
            lines.append(f"{size_text(way.sent_bytes):>12}  sent in a step, in all, by rings")
        return "\n".join([*lines, *self._explain_time()])

    def _explain_time(self) -> list[str]:
        seconds, gpu = getattr(self.loss, "predicted_seconds", None), getattr(self.loss, "gpu", None)
        if seconds is None:
            return []
        return [
            "",
            f"{seconds * 1e3:9.2f} ms   of a micro-step are the loss, without what ranks exchange: predicted "
            f"for an {gpu}, not measured",
        ]
