"""The whole Minitron recipe on SmolLM2-135M: score, cut, distil, on a CPU in minutes.

    python examples/minitron_smollm2.py --quick        # about 10 minutes on 2 cores
    python examples/minitron_smollm2.py                # the figures of the README; about an hour

1. Run calibration text through the model and score each channel by its activations (collect_importance).
2. Plan: MLP 1536 -> 1152, hidden 576 -> 480 (make_plan); for comparison also from random scores.
3. Cut the models (prune_model).
4. Distil by forward KL on the logits (linear_kl_loss). The full run also trains one student by cross-entropy
   and the randomly cut one by KL, on the same tokens.
5. Measure the perplexity of all of them on documents that neither calibration nor training saw.

Text: Python's own documentation strings, or --text FILES or FOLDERS (.txt, .md, .rst). Written to --out:
scores, plan, the distilled model, results.json and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prose import documents, split, windows
from smollm2 import as_mistral, load_smollm2
from tqdm import tqdm

from minitron_kernels import linear_kl_loss
from minitron_kernels.pruning import collect_importance, make_plan, plot_importance, prune_model

SIZES = {"hidden_size": 480, "intermediate_size": 1152}
DIVISOR = 32
LENGTH = 512  # tokens of a window
BATCH = 2  # windows in a step and in a calibration batch
WARM_UP = 0.1  # share of the steps in which the learning rate rises


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer windows and steps, one student")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files and folders of text")
    parser.add_argument("--also", type=Path, help="text of another kind to evaluate on too")
    parser.add_argument("--calibration", type=int, help="windows of 512 tokens; default 128, quick 32")
    parser.add_argument("--steps", type=int, help="training steps of 1024 tokens; default 64, quick 24")
    parser.add_argument("--evaluation", type=int, help="windows of 512 tokens; default 32, quick 12")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("minitron_smollm2"), help="folder for the results")
    args = parser.parse_args(argv)
    for name, quick, full in (("calibration", 32, 128), ("steps", 24, 64), ("evaluation", 12, 32)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


@torch.no_grad()
def perplexity(model: Any, texts: torch.Tensor) -> float:
    """exp of the mean next-token cross-entropy over windows [n, tokens]."""
    losses = [
        F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:])
        for window in tqdm(texts, desc="perplexity", unit="window", leave=False)
    ]
    return float(torch.stack(losses).mean().exp())


def random_scores(tables: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random scores of the same shapes; the energy is kept, since norms are rescaled by it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scores: Any) -> Any:
        if isinstance(scores, dict):
            return {key: draw(value) for key, value in scores.items()}
        return torch.rand(scores.shape, generator=generator, dtype=torch.float64)

    return {axis: scores if axis == "energy" else draw(scores) for axis, scores in tables.items()}


def kl_loss_of(student: Any, teacher: Any, ids: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    hidden = student.model(ids).last_hidden_state
    return linear_kl_loss(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight)


def cross_entropy_of(
    student: Any, teacher: Any, ids: torch.Tensor, teacher_hidden: torch.Tensor
) -> torch.Tensor:
    return student(ids, labels=ids).loss


Loss = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class Student:
    """A model that is trained, with its loss, optimizer and schedule."""

    def __init__(self, name: str, model: Any, loss: Loss, steps: int, lr: float) -> None:
        self.name, self.model, self.loss = name, model.train(), loss
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
        warm_up = max(1, round(WARM_UP * steps))

        def schedule(step: int) -> float:
            rest = max(0, step - warm_up) / max(1, steps - warm_up)
            return min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def step(self, teacher: Any, ids: torch.Tensor, teacher_hidden: torch.Tensor) -> None:
        loss = self.loss(self.model, teacher, ids, teacher_hidden)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.losses.append(loss.item())


def train(students: list[Student], teacher: Any, batches: Iterator[torch.Tensor], steps: int) -> None:
    """Trains all students on the same tokens; the teacher runs once for all of them."""
    with tqdm(total=steps, desc="distillation", unit="step") as bar:
        for ids in batches:
            with torch.no_grad():
                teacher_hidden = teacher.model(ids).last_hidden_state
            for student in students:
                student.step(teacher, ids, teacher_hidden)
            bar.set_postfix({student.name: f"{student.losses[-1]:.3f}" for student in students})
            bar.update()
    for student in students:
        student.model.eval()


def picture(rows: list[tuple[str, list[float]]], students: list[Student], path: Path) -> None:
    """Draws the perplexities as bars, and the training losses as curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    names = [name for name, _ in rows]
    colours = ["#4f6d7a" if "teacher" in name else "#d1495b" if "KL" in name else "#c9a227" for name in names]
    bars = left.barh(names[::-1], [values[0] for _, values in rows][::-1], color=colours[::-1])
    left.bar_label(bars, fmt="%.1f", padding=4)
    left.set(xscale="log", xlabel="perplexity on unseen documents (log scale; less is better)")
    left.set_xlim(right=max(values[0] for _, values in rows) * 2.2)
    for student in students:
        right.plot(student.losses, label=student.name)
    right.set(xlabel=f"step of {BATCH * LENGTH} tokens", ylabel="training loss, nats per token")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    begin = time.monotonic()

    def say(text: str) -> None:
        tqdm.write(f"[{time.monotonic() - begin:4.0f} s] {text}")

    torch.manual_seed(args.seed)
    llama, tokenizer = load_smollm2(say)
    teacher = as_mistral(llama)
    learn, unseen = split(documents(args.text))
    texts = windows(tokenizer, learn, args.calibration + BATCH * args.steps, LENGTH)
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))]
    calibration, training = texts[: args.calibration], texts[args.calibration :]
    evaluation = [windows(tokenizer, unseen, args.evaluation, LENGTH)]
    if args.also:
        other = [p for text in documents([args.also]).values() for p in text]
        evaluation.append(windows(tokenizer, other, args.evaluation, LENGTH))
    counts = calibration.numel(), training.numel(), evaluation[0].numel()
    say("tokens: {} to calibrate, {} to train, {} unseen".format(*counts))

    scores = collect_importance(teacher, calibration.split(BATCH), axes=("mlp", "hidden"))
    scores.save(args.out / "scores")
    plot_importance(scores, args.out / "importance.png")
    plan = make_plan(scores, teacher.config, **SIZES, divisor=DIVISOR)
    plan.save(args.out / "plan.json")
    say(f"the plan:\n{plan.summary()}")
    at_random = make_plan(random_scores(scores.tables(), args.seed), teacher.config, **SIZES, divisor=DIVISOR)

    rows: list[tuple[str, list[float]]] = []

    def evaluate(name: str, model: Any) -> None:
        rows.append((name, [perplexity(model, texts) for texts in evaluation]))
        say(f"{name}: perplexity {', '.join(f'{value:.1f}' for value in rows[-1][1])}")

    evaluate("teacher", teacher)
    pruned, pruned_at_random = prune_model(teacher, plan), prune_model(teacher, at_random)
    evaluate("pruned at random", pruned_at_random)
    evaluate("pruned by importance", pruned)

    students = [Student("importance, KL", pruned, kl_loss_of, args.steps, args.lr)]
    if not args.quick:
        pruned = prune_model(teacher, plan)
        students.append(Student("importance, cross-entropy", pruned, cross_entropy_of, args.steps, args.lr))
        students.append(Student("random, KL", pruned_at_random, kl_loss_of, args.steps, args.lr))
    train(students, teacher, iter(training.split(BATCH)), args.steps)
    for student in reversed(students):
        evaluate(f"trained: {student.name}", student.model)

    students[0].model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    picture(rows, students, args.out / "perplexity.png")
    result = {
        "parameters": {"teacher": plan.parameters_before, "student": plan.parameters_after},
        "tokens": {"calibration": calibration.numel(), "training": training.numel()},
        "perplexity": dict(rows),
        "losses": {student.name: student.losses for student in students},
        "seconds": round(time.monotonic() - begin),
    }
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    width = max(len(name) for name, _ in rows)
    say("perplexity" + (f" (unseen documents; {args.also.name})" if args.also else " on unseen documents"))
    for name, values in rows:
        print(f"  {name:<{width}}  " + "  ".join(f"{value:8.1f}" for value in values))
    say(f"written to {args.out}")
    return result


if __name__ == "__main__":
    main()
