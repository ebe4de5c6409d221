"""The whole Minitron recipe on SmolLM2-135M: score, cut, distil, compare, on a CPU.

    python examples/minitron_smollm2.py --quick        # a few minutes on 2 cores
    python examples/minitron_smollm2.py                # with all comparisons; one to two hours

It fetches the model, writes text as token ids, and runs `minitron-recipe run examples/recipes/smollm2.toml`
(with --quick smollm2_quick.toml), which can be stopped and started again. What it does:

1. Run calibration text through the model and score each channel by its activations.
2. Plan: MLP 1536 -> 1152, hidden 576 -> 480; for comparison also from random scores.
3. Cut the checkpoints.
4. Distil by forward KL on the logits.
5. Measure the perplexity of all of them on documents that neither calibration nor training saw.

Text: Python's own documentation strings, or --text FILES or FOLDERS (.txt, .md, .rst). Written to --out: all
stages, report.md, report.json, report.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from prose import documents, split, windows
from smollm2 import smollm2_folder

from minitron_kernels.distillation.recipe.main import main as recipe

RECIPES = Path(__file__).parent / "recipes"
LENGTH = 512  # tokens of a window
BATCH = 2  # windows in a step


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer windows and steps, one student")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files and folders of text")
    parser.add_argument("--also", type=Path, help="text of another kind to evaluate on too")
    parser.add_argument("--calibration", type=int, help="windows of 512 tokens; default 128, quick 32")
    parser.add_argument("--steps", type=int, help="training steps of 1024 tokens; default 48, quick 24")
    parser.add_argument("--evaluation", type=int, help="windows of 512 tokens; default 32, quick 12")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("minitron_smollm2"), help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    args = parser.parse_args(argv)
    for name, quick, full in (("calibration", 32, 128), ("steps", 24, 48), ("evaluation", 12, 32)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def write_text(args: argparse.Namespace, tokenizer: object) -> dict[str, Path]:
    """{name: file of token ids} for calibration, training and evaluation; the same bytes in every run."""
    learn, unseen = split(documents(args.text))
    texts = windows(tokenizer, learn, args.calibration + BATCH * args.steps, LENGTH)
    texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))]
    found = {
        "calibration": texts[: args.calibration],
        "training": texts[args.calibration :],
        "unseen": windows(tokenizer, unseen, args.evaluation, LENGTH),
    }
    if args.also:
        other = [p for text in documents([args.also]).values() for p in text]
        found[args.also.stem] = windows(tokenizer, other, args.evaluation, LENGTH)
    folder = args.out / "text"
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in found.items():
        np.save(folder / f"{name}.npy", ids.numpy().astype(np.int32))
    return {name: folder / f"{name}.npy" for name in found}


def settings_of(args: argparse.Namespace, teacher: Path, files: dict[str, Path]) -> dict[str, object]:
    """What the recipe's file does not know."""
    calibration, training = ([str(files[name])] for name in ("calibration", "training"))
    unseen = [str(file) for name, file in files.items() if name not in ("calibration", "training")]
    settings: dict[str, object] = {
        "recipe.teacher": str(teacher),
        "recipe.out": str(args.out),
        "recipe.seed": args.seed,
        "score.data": calibration,
        "score.samples": args.calibration,
        "distill.data": training,
        "distill.steps": args.steps,
        "distill.warmup": max(1, round(0.1 * args.steps)),
        "distill.lr": args.lr,
        "distill.lr_min": args.lr / 20,
        "evaluate.data": unseen,
    }
    if not args.quick:
        settings |= {
            "plan.data": calibration,
            "compare.corrected.correct.data": training,
            "compare.corrected.correct.steps": args.steps,
            "compare.corrected.correct.warmup": max(1, round(0.1 * args.steps)),
        }
    return settings


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    teacher, tokenizer = smollm2_folder(print)
    settings = settings_of(args, teacher, write_text(args, tokenizer))
    file = RECIPES / ("smollm2_quick.toml" if args.quick else "smollm2.toml")
    given = [f"{name}={_toml(value)}" for name, value in settings.items()]
    dry = ["--dry-run"] if args.dry_run else []
    return recipe(["run", str(file), *dry, *(part for setting in given for part in ("--set", setting))])


def _toml(value: object) -> str:
    return json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
