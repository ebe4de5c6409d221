"""The tables of a recipe's TOML: the keys of each stage, their types and defaults.

[correct] and [distill] have the keys of `minitron-distill train`, but for the models and folders that the
recipe itself gives.
"""

from __future__ import annotations

from minitron_kernels._command.values import DTYPES
from minitron_kernels.distillation.cli.options import (
    Option,
    amount,
    one_of,
    path,
    real,
    seed,
    size,
    switch,
    whole,
)
from minitron_kernels.distillation.cli.tables import DEVICES, TEXT
from minitron_kernels.distillation.cli.tables import options_of as options_of_command

# sizes of a plan by their names in configs; the first that a config has is meant
SIZES = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_hidden_layers": ("num_hidden_layers",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}
BUDGETS = ("params", "active_params", "memory")
TARGETS = (*SIZES, "ratio", "drop_layers", *BUDGETS)
LENGTHS = ("steps", "tokens", "epochs")
# keys of which a variant that gives one replaces all: what is cut, and how long is trained
TOGETHER = {"plan": (TARGETS,), "correct": (LENGTHS,), "distill": (LENGTHS,)}
SCORES = ("activations", "random", "magnitude")
AGGREGATIONS = ("mean", "L2", "var")
MODELS = ("teacher", "corrected", "pruned", "distilled")
_AXES = ("hidden", "mlp", "heads", "layers", "experts", "expert_mlp", "conv", "mamba")
_GIVEN = ("student", "teacher", "cache", "out", "quiet")  # of train, by the recipe
_OF_TEACHING = (
    *("kl_weight", "ce_weight", "divergence", "temperature", "temperature_squared", "vocab_size"),
    *("hidden_layers", "hidden_kind", "hidden_weight", "teacher_dtype"),
)


def _enabled(default: str) -> Option:
    return switch("enabled", f"whether the stage runs; default: {default}", default=None)


def _text(of: str, source: str = "data of [recipe]") -> Option:
    return path("data", f"{of}: {TEXT}; default: {source}", many=True, metavar="FILE")


def _text_key(default: str) -> Option:
    return Option("text_key", str, f'with the text in the data; default: {default}"text", or else "messages"')


def _windows(samples: int | None) -> tuple[Option, ...]:
    return (
        whole("samples", "windows, drawn at random by seed", default=samples),
        whole("seq_len", "tokens of a window; default: that of [recipe], else 2048", 2, default=2048),
        whole("batch_size", "windows of a forward pass", default=1, may_change=True),
        seed("of drawing; default: that of [recipe], else 0", default=0),
        _text_key("that of [recipe], else "),
    )


def _machine(what: str) -> tuple[Option, ...]:
    return (
        one_of("dtype", DTYPES, f"of the {what}; auto: the checkpoint's", default="auto"),
        one_of("device", DEVICES, "auto: cuda where there is a GPU", default="auto", may_change=True),
    )


def _training(*without: str) -> tuple[Option, ...]:
    return tuple(
        option
        for name, option in options_of_command("train").items()
        if name not in _GIVEN and name not in without
    )


TABLES: dict[str, tuple[Option, ...]] = {
    "recipe": (
        path("teacher", "folder of the checkpoint to make smaller, with its tokenizer", metavar="DIR"),
        path("out", "folder for all results", metavar="DIR"),
        Option("about", str, "a line for the report, such as where the figures come from"),
        path("data", f"for all stages that do not name their own: {TEXT}", many=True, metavar="FILE"),
        path("held_out", f"to evaluate on: {TEXT}", many=True, metavar="FILE"),
        whole("seq_len", "tokens of a window, of all stages that do not say", 2),
        seed("of all stages that do not say"),
        _text_key(""),
        one_of("device", DEVICES, "of all stages that do not say"),
        whole("processes", "that torchrun starts for [correct] and [distill]", default=1),
        switch("picture", "draw report.png, where matplotlib is installed", default=True),
    ),
    "correct": (_enabled("where the table is there"), *_training(*_OF_TEACHING)),
    "score": (
        _text("calibration text"),
        *_windows(1024),
        one_of("axes", _AXES, "what is scored; default: all that the model has", many=True),
        one_of("seq", AGGREGATIONS, "sums over tokens", many=True, default=["mean"]),
        one_of("mlp_tap", ("down_proj_input", "up_proj_output"), "of neurons", default="down_proj_input"),
        one_of("head_score", ("norm", "channels"), "of heads", default="norm"),
        one_of("expert_score", ("norm", "reap"), "of experts", default="norm"),
        *_machine("model"),
    ),
    "plan": (
        one_of("by", SCORES, "activations: [score]; random and magnitude (of weights) to compare with",
               default="activations"),
        *(whole(name, "what stays") for name in SIZES),
        real("ratio", "of hidden and MLP sizes", above=True, most=1.0),
        whole("drop_layers", "layers that go", 0, many=True),
        amount("params", "budget of parameters"),
        amount("active_params", "budget of parameters that serve a token"),
        size("memory", "budget of bytes of weights and cache"),
        Option("memory_dtype", str, "of weights and cache there", default="bfloat16"),
        whole("kv_tokens", "tokens in that cache", 0, default=0),
        Option("search", str, "sizes that a budget may choose", many=True),
        whole("num_experts_per_tok", "for the new config"),
        one_of("kv_heads", ("prune", "merge"), "how they become fewer", default="prune"),
        switch("merge_heads", "let kept query heads stand for dropped ones too"),
        one_of("order", ("original", "importance"), "of what stays", default="original"),
        whole("divisor", "of hidden and MLP sizes; default: 64, for a budget 128"),
        switch("rescale_norms", "multiply norms' gains by what the cut takes", default=True),
        Option("batch", str, "aggregation over sequences", default="L2"),
        Option("seq", str, "aggregation over tokens", default="mean"),
        whole("rounds", "score, cut and score again in so many steps", default=1),
        one_of("layers_by", ("importance", "loss"), "which layers go where num_hidden_layers says how many",
               default="importance"),
        _text("for layers_by = \"loss\""),
        *_windows(64),
        *_machine("model, for layers_by = \"loss\""),
    ),
    "prune": (
        size("max_shard_size", "of one file", default=5_000_000_000),
        whole("threads", "default: one for each core, at most 8", may_change=True),
        Option("leave_out", str, "tensors that are not part of the model, as '*.k_scale'", many=True),
    ),
    "distill": (_enabled("yes"), *_training()),
    "evaluate": (
        _enabled("where there is held-out text, or tasks"),
        _text("held-out text, each file by itself", "held_out of [recipe]"),
        *_windows(None),
        one_of("models", MODELS, "which are evaluated", many=True, default=list(MODELS)),
        Option("tasks", str, "of lm-eval", many=True),
        path("tasks_path", "folder with lm-eval's tasks", metavar="DIR"),
        path("datasets", "folder of data sets for lm-eval's tasks, instead of the hub's", metavar="DIR"),
        whole("limit", "documents of a task"),
        switch("run_code", "run code that a model writes for a task; false: without such tasks",
               default=None),
        *_machine("models"),
    ),
    "estimate": (
        whole("gpus", "that train; for --dry-run", default=1),
        whole("tp", "of them that share each layer", default=1),
        real("tflops", "of one, sustained, in 10^12 operations a second: then times are estimated",
             above=True),
        size("disk_rate", "bytes a second that checkpoints are read and written with"),
    ),
}  # fmt: skip
# keys of [recipe] for all stages that have them
SHARED = ("data", "seq_len", "seed", "text_key", "device", "picture")


def options_of(table: str) -> dict[str, Option]:
    """{name: option} of a table."""
    return {option.name: option for option in TABLES[table]}
