"""Distilling a pruned SmolLM2-135M: DistillationTrainer, beside Trainer with full logits and F.kl_div.

    python benchmarks/distillation.py                   # 32 steps of 1024 tokens; about 20 minutes on 2 cores
    python benchmarks/distillation.py --quick           # a tiny model of random weights; half a minute
    python benchmarks/distillation.py --teacher live hidden topk sampled --json out.json

The teacher is scored and cut as in examples/minitron_smollm2.py (MLP 1536 -> 1152, hidden 576 -> 480). Each
row trains a copy of the same student on the same batches with the same optimizer, in a fresh process, and
gives tokens per second, peak memory (of the process, or of the GPU; and of that what training needs beyond
the models), the loss at the beginning and at the end, and the perplexity on documents that nobody trained on.
--teacher: the teacher is run at every step (live), or read from a cache of one of the three tiers, which is
made first; its size is given. A gate: by the live teacher's rows the loss is the same at every step, to 1 %.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import tables
from common.harness import WorkerError, run_worker, write_json
from common.machine import cores, describe, facts
from common.models import TINY, smollm2_or_tiny, tiny_model
from distillation_rows.worker import LABELS, TIERS

WORKER = Path(__file__).parent / "distillation_rows/worker.py"
SIZES = {"hidden_size": 480, "intermediate_size": 1152}
TINY_SIZES = {"hidden_size": 160, "intermediate_size": 384}
FULL = {"steps": 32, "length": 512, "calibration": 32, "evaluation": 12, "threads": cores()}
QUICK = {"steps": 6, "length": 64, "calibration": 4, "evaluation": 4, "threads": 1}  # nothing to share out
SAME = 0.01  # relative difference of the losses of rows that do the same


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def default(what: str, name: str) -> str:
    return f"{what} (default {FULL[name]}, {QUICK[name]} with --quick)"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", nargs="+", default=["live"], choices=["live", *TIERS])
    parser.add_argument("--steps", type=int, help=default("training steps", "steps"))
    parser.add_argument("--batch", type=int, default=2, help="windows in a step (default 2)")
    parser.add_argument("--length", type=int, help=default("tokens of a window", "length"))
    parser.add_argument("--calibration", type=int, help=default("windows to score with", "calibration"))
    parser.add_argument("--evaluation", type=int, help=default("windows to evaluate on", "evaluation"))
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    parser.add_argument("--k", type=int, default=128, help="ids a position of the tier topk (default 128)")
    parser.add_argument("--samples", type=int, default=12, help="of the tier sampled (default 12)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="default: all cores; 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and few steps")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("steps", "batch", "length", "calibration", "evaluation", "threads", "k", "samples"):
        least = 2 if name == "length" else 1  # the last token predicts nothing
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def windows_of(args: argparse.Namespace, tokenizer: Any, vocab: int) -> dict[str, torch.Tensor]:
    """{"calibration", "training", "evaluation": [n, length]}."""
    counts = {
        "calibration": args.calibration,
        "training": args.batch * args.steps,
        "evaluation": args.evaluation,
    }
    generator = torch.Generator().manual_seed(0)
    if tokenizer is None:
        return {
            n: torch.randint(vocab, (count, args.length), generator=generator) for n, count in counts.items()
        }
    from prose import documents, split, windows

    learn, unseen = split(documents([]))
    texts = windows(tokenizer, learn, args.calibration + counts["training"], args.length)
    texts = texts[torch.randperm(len(texts), generator=generator)]
    evaluation = windows(tokenizer, unseen, args.evaluation, args.length)
    calibration, training = texts[: args.calibration], texts[args.calibration :]
    return {"calibration": calibration, "training": training, "evaluation": evaluation}


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes teacher, pruned student, windows and caches; returns what they are."""
    from smollm2 import as_mistral

    from distillation_rows.worker import perplexity
    from minitron_kernels.pruning import collect_importance, make_plan, prune_model

    model, tokenizer, name = (*tiny_model()[:1], None, TINY) if args.quick else smollm2_or_tiny(say)
    tiny = name == TINY
    teacher = as_mistral(model)
    texts = windows_of(args, None if tiny else tokenizer, teacher.config.vocab_size)
    scores = collect_importance(teacher, texts["calibration"].split(args.batch), axes=("mlp", "hidden"))
    plan = make_plan(scores, teacher.config, **(TINY_SIZES if tiny else SIZES), divisor=32)
    student = prune_model(teacher, plan)
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    torch.save(texts, folder / "windows.pt")
    result: dict[str, Any] = {
        "model": name,
        "parameters": {"teacher": plan.parameters_before, "student": plan.parameters_after},
        "perplexity": {
            "teacher": perplexity(teacher, texts["evaluation"]),
            "pruned": perplexity(student, texts["evaluation"]),
        },
        "caches": {},
    }
    for tier in dict.fromkeys(args.teacher):
        if tier != "live":
            result["caches"][tier] = fill(args, teacher, texts["training"], folder / tier, tier)
    return result


def fill(
    args: argparse.Namespace, teacher: Any, training: torch.Tensor, folder: Path, tier: str
) -> dict[str, Any]:
    """Makes a cache of the training windows; its bytes on the disk and the seconds it took."""
    from minitron_kernels.distillation.cache.fill import cache_teacher

    begin = time.perf_counter()
    own: dict[str, Any] = {"topk": {"k": args.k}, "sampled": {"samples": args.samples}}.get(tier, {})
    cache_teacher(teacher, training.split(args.batch), folder, tier=tier, progress=False, **own)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    seconds = time.perf_counter() - begin
    say(f"cache {tier}: {size / training.numel():.0f} bytes a token, {seconds:.1f} s")
    return {"bytes_per_token": size / training.numel(), "seconds": seconds}


def gate(rows: dict[str, dict[str, Any]]) -> float:
    """The largest relative difference of a loss between rows of the live teacher; too large ends the run."""
    live = [rows[name]["losses"] for name in ("stock", "loop", "live") if name in rows]
    pairs = [(a, b) for losses in live[1:] for a, b in zip(losses, live[0], strict=True)]
    # of torch, whose maximum is NaN if one is
    worst = float(torch.tensor([0.0] + [abs(a - b) / abs(b) for a, b in pairs]).max())
    if not worst <= SAME:  # NaN too
        raise SystemExit(f"wrong: losses of rows that do the same differ by {worst:.2g}, allowed {SAME}")
    return worst


def table(result: dict[str, Any], draw: Any) -> str:
    header = ["", "tokens/s", "teacher", "peak MiB", "beyond models", "loss", "at the end", "perplexity"]
    lines = []
    for name, row in result["rows"].items():
        share = row.get("teacher_share")
        last = row["losses"][-4:]
        lines.append(
            [
                LABELS[name],
                f"{row['tokens_per_second']:.0f}",
                "" if share is None else f"{100 * share:.0f} %",
                tables.mebibytes(row["peak_bytes"]),
                tables.mebibytes(row["training_bytes"]),
                f"{row['losses'][0]:.3f}",
                f"{sum(last) / len(last):.3f}",
                f"{row['perplexity']:.1f}",
            ]
        )
    return draw(header, lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="distillation_"))
    options = {name: getattr(args, name) for name in ("steps", "batch", "length", "lr", "k", "samples")}
    try:
        machine = facts(args.device, ["transformers", "accelerate"])
        result: dict[str, Any] = {"machine": machine, "threads": args.threads, **options}
        result |= prepare(args, folder)
        result["rows"] = {}
        for row in dict.fromkeys(("stock", "loop", *args.teacher)):
            spec = {"row": row, "folder": str(folder), "device": args.device, **options}
            try:
                result["rows"][row] = run_worker(WORKER, spec, threads=args.threads)
            except WorkerError as error:
                raise SystemExit(f"{LABELS[row]}: {error}") from None
            say(f"{LABELS[row]}: {result['rows'][row]['seconds']:.1f} s")
            write_json(args.json, result, complete=False)
        result["largest_difference"] = gate(result["rows"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(result, tables.aligned)
    before = result["perplexity"]
    print(f"\n{result['model']}, {describe(result['machine'])}\n{text}")
    print(f"perplexity before training: teacher {before['teacher']:.1f}, pruned {before['pruned']:.1f}")
    for tier, cache in result["caches"].items():
        print(f"cache {tier}: {cache['bytes_per_token']:.0f} bytes a token, {cache['seconds']:.1f} s to make")
    if args.markdown:
        args.markdown.write_text(table(result, tables.markdown) + "\n")
    write_json(args.json, result, complete=True)
    return result


if __name__ == "__main__":
    main()
