"""The options of `minitron-distill train` and `cache`, by group."""

from __future__ import annotations

import argparse

from minitron_kernels._command.values import DTYPES
from minitron_kernels.distillation.cli.options import (
    Option,
    amount,
    one_of,
    path,
    real,
    real_or,
    seed,
    size,
    switch,
    whole,
)

TEXT = (
    'text in UTF-8; .jsonl, .parquet or .arrow with a "text" or chat "messages"; .npy with token ids; '
    "folders of these; text may be compressed"
)
DEVICES = ("auto", "cpu", "cuda")
Group = tuple[str, str, tuple[Option, ...]]  # name, what is to be said of it, options


def pair(text: str) -> str:
    """STUDENT:TEACHER, two layers."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise argparse.ArgumentTypeError(f"must be a student's and a teacher's layer, as 11:15, got {text!r}")
    return text


# a cache serves a run whose windows are the same
_TEXT = (
    path("data", TEXT, many=True, metavar="FILE"),
    Option("text_key", str, 'with the text in the data; default: "text", or else "messages"', metavar="KEY"),
)
_WINDOWS = (
    whole("seq_len", "tokens of a window", 2, default=2048),
    whole("samples", "windows, drawn at random by --seed; default: all"),
)

TRAIN: tuple[Group, ...] = (
    (
        "models and data",
        "a teacher that runs, or a cache of what it said",
        (
            path("student", "folder of the student's checkpoint, with its tokenizer", metavar="DIR"),
            path("teacher", "folder of the teacher's; with a cache of hidden states for its head alone",
                 metavar="DIR"),
            path("cache", "folder that `minitron-distill cache` filled", metavar="DIR"),
            *_TEXT,
            path("out", "folder to create: model, record, curves and checkpoints", metavar="DIR", short="-o"),
            *_WINDOWS,
            seed("of drawing, order and training", default=0),
        ),
    ),
    (
        "how long",
        "one of them; default: each window once",
        (
            amount("steps", "optimizer steps"),
            amount("tokens", "tokens of all steps, as 2B; rounded up to whole steps"),
            real("epochs", "passes over the windows, rounded up to whole steps", above=True),
            whole("batch_size", "windows of a forward pass, of each process", default=1),
            whole("accumulation", "forward passes of a step, of each process", default=1),
        ),
    ),
    (
        "optimizer",
        "AdamW",
        (
            real("lr", "highest learning rate", above=True, default=1e-4),
            real("lr_min", "last learning rate of cosine and linear", default=0.0),
            one_of("lr_schedule", ("cosine", "linear", "constant"), "after the warm-up", default="cosine"),
            whole("warmup", "steps in which the learning rate rises from 0", 0, default=0),
            real("weight_decay", "of AdamW", default=0.0),
            real("beta1", "of AdamW", most=0.99999, default=0.9),
            real("beta2", "of AdamW", most=0.99999, default=0.95),
            real("max_grad_norm", "gradients are scaled down to this norm; 0: never", default=1.0),
        ),
    ),
    (
        "loss",
        "kl_weight KL + ce_weight CE + hidden_weight HIDDEN, see DistillationLoss",
        (
            real("kl_weight", "of the divergence from the teacher", default=1.0),
            real("ce_weight", "of the cross-entropy with the text", default=0.0),
            real_or("divergence", ("forward_kl", "reverse_kl", "jsd"),
                    "which; a number is β of the generalised JSD", most=1.0, default="forward_kl"),
            real("temperature", "of the divergence", above=True, default=1.0),
            switch("temperature_squared", "multiply the divergence by its temperature squared"),
            real("label_smoothing", "of the cross-entropy", most=1.0, default=0.0),
            whole("vocab_size", "tokens that both models have, where their heads differ"),
            Option("hidden_layers", pair, "pairs of layers for the hidden-state term; default: no term",
                   many=True, metavar="STUDENT:TEACHER"),
            one_of("hidden_kind", ("cosine", "mse"), "of the hidden-state term", default="cosine"),
            real_or("hidden_weight", ("dynamic",), "of the hidden-state term", default="dynamic"),
            one_of("loss_schedule", ("auto", "store", "recompute"), "of the loss's memory", default="auto"),
            size("loss_workspace", "scratch memory of the loss, as 256MiB; default: by device"),
        ),
    ),
    (
        "machine",
        "",
        (
            one_of("device", DEVICES, "auto: cuda where there is a GPU", default="auto", may_change=True),
            one_of("dtype", DTYPES, "of the student's weights in training; auto: the checkpoint's",
                   default="float32"),
            one_of("teacher_dtype", DTYPES, "of the teacher; auto: the checkpoint's", default="auto"),
            one_of("autocast", ("auto", "none", "bfloat16"),
                   "mixed precision; auto: bfloat16 on a GPU, none on a CPU", default="auto"),
            one_of("save_dtype", DTYPES, "of the model that is written; auto: the checkpoint's",
                   default="auto"),
            switch("gradient_checkpointing", "compute activations twice instead of keeping them"),
            switch("fsdp", "shard student and teacher over the processes of torchrun (FSDP2)"),
        ),
    ),
    (
        "saving and looking",
        "",
        (
            whole("save_every", "steps between checkpoints", default=500, may_change=True),
            whole("keep", "checkpoints that are kept", default=2, may_change=True),
            whole("log_every", "steps between logged losses", default=10, may_change=True),
            path("eval_data", f"held-out {TEXT}", many=True, metavar="FILE", may_change=True),
            whole("eval_samples", "windows of it, drawn by --seed; default: all", may_change=True),
            whole("eval_every", "steps between evaluations; default: at the end", may_change=True),
            switch("picture", "draw the curves, where matplotlib is installed", default=True,
                   may_change=True),
            switch("quiet", "no progress on standard error", may_change=True),
        ),
    ),
)  # fmt: skip

CACHE: tuple[Group, ...] = (
    (
        "model and data",
        "the windows are those of `train` with the same data, seq_len, samples and seed",
        (
            path("teacher", "folder of the teacher's checkpoint, with its tokenizer", metavar="DIR"),
            *_TEXT,
            path("out", "folder of the cache; one that is there is gone on with", metavar="DIR", short="-o"),
            *_WINDOWS,
            seed("of drawing", default=0),
            whole("batch_size", "windows of a forward pass", default=1),
        ),
    ),
    (
        "what is kept",
        "topk: likeliest tokens; sampled: drawn tokens; hidden: hidden states, exact with the head",
        (
            one_of("tier", ("topk", "sampled", "hidden"), "see above", default="topk"),
            whole("k", "topk: tokens of a position; default: 128"),
            real("mass", "topk: no more tokens than reach this probability", above=True, most=1.0),
            real("temperatures", "topk: at which the tail is kept; default: 1", above=True, many=True),
            Option("quantiser", str, "topk: how log-probabilities are stored; default: the library's",
                   metavar="NAME"),
            whole("draws", "sampled: tokens drawn at a position; default: 12"),
            whole("vocab_size", "tokens, where the head has more rows; default: all rows"),
            size("shard_size", "of one file, and of what a kill can lose; default: the library's"),
        ),
    ),
    (
        "machine",
        "",
        (
            one_of("device", DEVICES, "auto: cuda where there is a GPU", default="auto"),
            one_of("dtype", DTYPES, "of the teacher; auto: the checkpoint's", default="auto"),
            switch("quiet", "no progress on standard error"),
        ),
    ),
)  # fmt: skip

TABLES = {"train": TRAIN, "cache": CACHE}
REQUIRED = {"train": ("student", "data", "out"), "cache": ("teacher", "data", "out")}


def options_of(command: str) -> dict[str, Option]:
    """{name: option} of a command."""
    return {option.name: option for _, _, options in TABLES[command] for option in options}
