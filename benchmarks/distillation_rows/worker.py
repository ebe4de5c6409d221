"""Distils once in a fresh process: by DistillationTrainer, a loop of step(), or Trainer with full logits."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.harness import answer, status_bytes

TIERS = ("hidden", "topk", "sampled")
LABELS = {
    "stock": "Trainer, full logits, F.kl_div",
    "loop": "a loop of step()",
    "live": "DistillationTrainer",
    **{tier: f"DistillationTrainer, cached teacher: {tier}" for tier in TIERS},
}
WARM_UP = 0.1  # share of the steps in which the learning rate rises, as in examples/minitron_smollm2.py


def load(folder: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def optimizers(model: Any, steps: int, lr: float) -> tuple[Any, Any]:
    """Optimizer and schedule of examples/minitron_smollm2.py."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    warm_up = max(1, round(WARM_UP * steps))

    def schedule(step: int) -> float:
        rest = max(0, step - warm_up) / max(1, steps - warm_up)
        return min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids.clone()}


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean next-token cross-entropy over windows [n, T]."""
    device = next(model.parameters()).device
    losses = [F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]) for ids in windows.to(device)]
    return float(torch.stack(losses).mean().exp())


def teacher_of(spec: dict[str, Any], folder: Path) -> Any:
    row = spec["row"]
    if row not in TIERS:
        return load(folder / "teacher", spec["device"])
    from minitron_kernels.distillation.cache.teacher import CachedTeacher

    return CachedTeacher(folder / row, **({"head": folder / "teacher"} if row == "hidden" else {}))


def by_loop(student: Any, teacher: Any, data: Tensor, spec: dict[str, Any]) -> tuple[list[float], float]:
    """(losses, seconds) of a loop of one's own."""
    from minitron_kernels.distillation import DistillationLoss, ModelTeacher, attach, step

    student = attach(student).train()
    teacher, loss = ModelTeacher(teacher), DistillationLoss()
    optimizer, scheduler = optimizers(student, spec["steps"], spec["lr"])
    losses, begin = [], time.perf_counter()
    for ids in data.split(spec["batch"]):
        record = step(student, teacher, collate(list(ids.to(spec["device"]))), loss)
        record.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(record.loss.item())
    return losses, time.perf_counter() - begin


def by_trainer(
    student: Any, teacher: Any, data: Tensor, spec: dict[str, Any], folder: Path
) -> tuple[list[float], float, dict[str, float]]:
    """(losses, seconds, means of what was logged) of a Trainer."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / f"out-{spec['row']}"),
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=spec["device"] == "cpu",
        train_sampling_strategy="sequential",
    )
    options: dict[str, Any] = {
        "model": student,
        "args": args,
        "train_dataset": list(data),
        "data_collator": collate,
        "optimizers": optimizers(student, spec["steps"], spec["lr"]),
    }
    args.remove_unused_columns = False  # rows are tensors
    if spec["row"] == "stock":

        class FullLogits(Trainer):
            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
            ) -> Any:
                counts = inputs["labels"][:, 1:] != -100
                s = model(input_ids=inputs["input_ids"]).logits[:, :-1].float().log_softmax(-1)
                with torch.no_grad():
                    t = teacher(input_ids=inputs["input_ids"]).logits[:, :-1].float().log_softmax(-1)
                kl = F.kl_div(s, t, log_target=True, reduction="none").sum(-1)
                return (kl * counts).sum() / counts.sum()

        FullLogits.loss_is_scaled_for_ga = False
        teacher.eval().requires_grad_(False)
        trainer: Any = FullLogits(**options)
    else:
        from minitron_kernels.distillation.trainers.hf import DistillationTrainer

        trainer = DistillationTrainer(teacher=teacher, **options)
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    logs = [log for log in trainer.state.log_history if "loss" in log]
    shares = [log["teacher_share"] for log in logs if "teacher_share" in log]
    means = {"teacher_share": sum(shares) / len(shares)} if shares else {}
    return [log["loss"] for log in logs], seconds, means


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Losses, tokens a second, peak memory, and perplexity on what was not trained on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    folder, on_gpu = Path(spec["folder"]), spec["device"] != "cpu"
    texts = torch.load(folder / "windows.pt")
    student, teacher = load(folder / "student", spec["device"]), teacher_of(spec, folder)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else status_bytes("VmRSS")
    means: dict[str, float] = {}
    if spec["row"] == "loop":
        losses, seconds = by_loop(student, teacher, texts["training"], spec)
    else:
        losses, seconds, means = by_trainer(student, teacher, texts["training"], spec, folder)
    peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": texts["training"].numel() / seconds,
        "peak_bytes": peak,
        "training_bytes": peak - before,  # beyond the models
        "perplexity": perplexity(student.eval(), texts["evaluation"]),
        **means,
    }


if __name__ == "__main__":
    answer(measure)
