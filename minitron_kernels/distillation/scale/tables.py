"""The tables of docs/scale.md, made by plan_distillation(); a test compares them with the page.

python -m minitron_kernels.distillation.scale.tables                        # prints them
python -m minitron_kernels.distillation.scale.tables --write docs/scale.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.scale.distillation_plan import DistillationPlan
from minitron_kernels.distillation.scale.parts import MOMENTS, size_text
from minitron_kernels.distillation.scale.plan_distillation import plan_distillation

# Mistral-NeMo 12B and Mistral-NeMo-Minitron 8B; what else a config.json holds plays no part
TEACHER: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
}
STUDENT = TEACHER | {"hidden_size": 4096, "intermediate_size": 11520}
STEP: dict[str, Any] = {"sequence_length": 8192, "global_batch": 768}
LAYOUTS = ((8, 64), (1, 256), (8, 8), (8, 1), (1, 8))  # tp, fsdp


def plan(tp: int, fsdp: int, **changes: Any) -> DistillationPlan:
    """Of the page's models and step."""
    return plan_distillation(STUDENT, TEACHER, **STEP, tp=tp, fsdp=fsdp, gpu="H100", **changes)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, all others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory() -> str:
    """Of a rank, part by part."""
    one = plan(8, 64)
    names = dict.fromkeys(part.name for way in (one.ours, one.stock) for part in way.parts)
    parts = {part.name: part for way in (one.ours, one.stock) for part in way.parts}
    rows = []
    for name in names:
        when = "all" if parts[name].when == tuple(MOMENTS) else ", ".join(parts[name].when)
        cells = [size_text(way.part(name)) if way.part(name) else "–" for way in (one.ours, one.stock)]
        rows.append([name, when, *cells])
    for moment, text in MOMENTS.items():
        cells = [size_text(way.bytes_at(moment)) for way in (one.ours, one.stock)]
        rows.append([f"**in all at {text}**", moment, *(f"**{cell}**" for cell in cells)])
    return markdown(["of a rank", "moments", "`linear_kl_loss`", "full logits"], rows)


def traffic() -> str:
    """What a rank sends in a step."""
    one = plan(8, 64)
    rows = []
    for c in dict.fromkeys((*one.ours.collectives, *one.stock.collectives)):
        sent = [size_text(c.sent_bytes) if c in way.collectives else "–" for way in (one.ours, one.stock)]
        rows.append([c.name, f"{c.group}, {c.kind}", f"{c.count:,}", size_text(c.nbytes), *sent])
    totals = [f"**{size_text(way.sent_bytes)}**" for way in (one.ours, one.stock)]
    rows.append(["**in all**", "", "", "", *totals])
    header = ["in a step", "ranks, kind", "number", "brought", "sent", "sent, full logits"]
    return markdown(header, rows)


def logits() -> str:
    """The loss alone, both ways, where they differ."""
    one = plan(8, 64)
    ours = sum(p.nbytes for p in one.ours.parts if p.name.startswith("the loss"))
    other = sum(p.nbytes for p in one.stock.parts if p.name.startswith("full logits"))
    both = set(one.ours.collectives) & set(one.stock.collectives)
    sent = [sum(c.sent_bytes for c in way.collectives if c not in both) for way in (one.ours, one.stock)]
    seconds = getattr(one.loss, "predicted_seconds", 0.0)
    rows = [
        ["memory of the loss and its gradients", size_text(ours), size_text(other)],
        ["sent for it over tp in a step", *map(size_text, sent)],
        ["the rank needs at its peak", *(size_text(way.peak_bytes) for way in (one.ours, one.stock))],
        [
            "GEMMs and kernels of the loss, a micro-step, H100 (*prediction*)",
            f"*{seconds * 1e3:.1f} ms*",
            "–",
        ],
    ]
    return markdown(["", "`linear_kl_loss`", "full logits"], rows)


def layouts() -> str:
    """Peaks and traffic of other numbers of ranks, with and without activation checkpointing."""
    rows = []
    for tp, fsdp in LAYOUTS:
        for checkpointing in (True, False):
            one = plan(tp, fsdp, checkpointing=checkpointing)
            rows.append(
                [
                    f"{tp * fsdp}: TP {tp} × FSDP {fsdp}",
                    "yes" if checkpointing else "no",
                    str(one.micro_steps),
                    *(size_text(way.peak_bytes) for way in (one.ours, one.stock)),
                    *(size_text(way.sent_bytes) for way in (one.ours, one.stock)),
                ]
            )
    header = [
        "ranks",
        "checkpointing",
        "micro-steps",
        "memory",
        "full logits",
        "sent in a step",
        "full logits",
    ]
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "logits": logits,
    "memory": memory,
    "traffic": traffic,
    "layouts": layouts,
}


def written(page: str) -> str:
    """A page with its tables between <!-- name --> and <!-- end --> as they are now.

    Raises:
        ValueError: a table has no place in it; names it.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, after = page.partition(begin)
        if not found or begin in after or end not in after:
            raise ValueError(f"the page must have <!-- {name} --> once and, behind it, {end}")
        page = f"{before}{begin}{table()}\n{end}{after.partition(end)[2]}"
    return page


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, or writes them into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m minitron_kernels.distillation.scale.tables",
        description="Prints the tables of docs/scale.md: memory and communication of a distillation step.",
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put them into this page instead")
    args = parser.parse_args(argv)
    if args.write:
        args.write.write_text(written(args.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()
