"""The models of a command line: student, teacher or cache, and the loss between them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minitron_kernels._command.documents import has_text
from minitron_kernels._command.models import check_model, load_config, load_model, tokenizer_if_any
from minitron_kernels.distillation.cache.spec import read_spec

if TYPE_CHECKING:
    from minitron_kernels.distillation.cli.data import Chosen


class Models(NamedTuple):
    """What trains and teaches; weights fill a model that is empty until it is sharded, None: it is whole."""

    student: Any
    teacher: Any
    loss: Any
    student_weights: Any
    teacher_weights: Any


def check_sources(config: Mapping[str, Any]) -> None:
    """Checks, before anything is loaded, that student and teacher are there.

    Raises:
        ValueError, FileNotFoundError: they are not; neither a teacher nor a cache, or both.
    """
    check_model(Path(config["student"]))
    if config["cache"] is None:
        if config["teacher"] is None:
            _check_text_alone(config)
            return
        check_model(Path(config["teacher"]))
        return
    spec = read_spec(Path(config["cache"]))
    tier = spec.tier
    if tier == "hidden":
        if config["teacher"] is None:
            raise ValueError("--cache holds hidden states: give the --teacher too, of which the head is read")
        check_model(Path(config["teacher"]))
        return
    if config["teacher"] is not None:
        raise ValueError(f"--teacher and --cache: a cache of tier {tier} needs no teacher, leave one out")
    if config["hidden_layers"]:
        raise ValueError(f"--hidden-layers needs a --teacher that runs: a cache of tier {tier} has no layers")
    if tier == "sampled" and (config["temperature"] != 1 or config["divergence"] not in ("forward_kl", 0)):
        raise ValueError("a --cache of sampled tokens needs --temperature 1 and --divergence forward_kl")
    if tier == "topk" and config["temperature"] not in spec.temperatures:
        there = ", ".join(f"{temperature:g}" for temperature in spec.temperatures)
        raise ValueError(
            f"--temperature must be one at which the cache has the tail, {there}, got "
            f"{config['temperature']:g}: minitron-distill cache --temperatures makes others"
        )


def _check_text_alone(config: Mapping[str, Any]) -> None:
    """Checks that a run without a teacher asks for none."""
    if config["kl_weight"] or not config["ce_weight"] or config["hidden_layers"]:
        raise ValueError(
            "train needs --teacher (a checkpoint's folder) or --cache (what it said); on the text alone it "
            "trains with --kl-weight 0 --ce-weight 1"
        )
    if config["temperature"] != 1 or config["divergence"] not in ("forward_kl", 0):
        raise ValueError("--temperature and --divergence are those of a teacher: leave them out without one")


def check_tokenizers(config: Mapping[str, Any]) -> Any:
    """The student's tokenizer, None where it has none; refuses a teacher with other tokens.

    Raises:
        ValueError: the same ids are other tokens for the teacher.
    """
    from minitron_kernels.distillation.cache import tokenizer_hash

    own = tokenizer_if_any(Path(config["student"]))
    if own is None or config["teacher"] is None:
        return own
    other = tokenizer_if_any(Path(config["teacher"]))
    if other is None or tokenizer_hash(own) == tokenizer_hash(other):
        return own
    ours, theirs = own.get_vocab(), other.get_vocab()
    by_id = {number: token for token, number in theirs.items()}
    limit = config["vocab_size"] or max(len(ours), len(theirs))
    differ = [n for token, n in ours.items() if n < limit and by_id.get(n) != token]
    if differ or (len(ours) != len(theirs) and config["vocab_size"] is None):
        raise ValueError(
            f"--teacher {config['teacher']}: its tokenizer has other tokens than the student's "
            f"({len(differ)} ids differ), and the loss would compare different words; if the first ones are "
            "the same, give --vocab-size"
        )
    return own


def load_student(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the model, None), or (a model without weights, what fills it): see load_teacher()."""
    return _load(config, Path(config["student"]), config["dtype"], "trained")


def load_teacher(config: Mapping[str, Any], tokenizer: Any, student_tokens: int) -> tuple[Any, Any]:
    """(A model, a CachedTeacher, or a TextTeacher where there is neither; None).

    With --fsdp a model has no weights, and comes with ShardedWeights, which fill it once it is sharded.
    """
    if config["cache"] is None and config["teacher"] is None:
        from minitron_kernels.distillation.text_teacher import TextTeacher

        return TextTeacher(), None
    if config["cache"] is None:
        return _load(config, Path(config["teacher"]), config["teacher_dtype"], "a teacher")
    from minitron_kernels.distillation.cache import CachedTeacher

    teacher = CachedTeacher(
        config["cache"],
        head=config["teacher"],
        vocab_size=config["vocab_size"] or student_tokens,
        tokenizer=tokenizer,
    )
    return teacher, None


def _load(config: Mapping[str, Any], folder: Path, dtype: str, otherwise: str) -> tuple[Any, Any]:
    """The model in a folder; with --fsdp an empty one and what fills it, where it can be read by shards."""
    if config["fsdp"]:
        from minitron_kernels.distillation.trainers.hf_loading import NotByShardsError, empty_model

        try:
            return empty_model(folder, dtype, otherwise=otherwise)
        except NotByShardsError as why:
            warnings.warn(f"{folder}: each process loads it whole, since {why}", stacklevel=2)
    return load_model(folder, dtype, otherwise=otherwise, with_head=True), None


def only_cached(config: Mapping[str, Any], data: Chosen, option: str = "--data") -> int:
    """Leaves out the windows that are not in the cache; how many these are.

    Raises:
        ValueError: none is there.
    """
    if config["cache"] is None:
        return 0
    from minitron_kernels.distillation.cache import TeacherCache

    cache = TeacherCache(config["cache"])
    found = [index for index in data.chosen if data.windows[index] in cache]
    absent = len(data.chosen) - len(found)
    if not found:
        text = has_text([Path(file) for file in config["data"]])
        advice = "the tokenizer's files and --seq-len" if text else "--seq-len"
        raise ValueError(
            f"{config['cache']}: has none of the {absent} windows of {option}: it was made of other text, or "
            f"with other {advice}"
        )
    data.chosen = found
    return absent


def check_loss(config: Mapping[str, Any]) -> None:
    """Checks that the options of the loss fit each other and the models, before these are loaded.

    Raises:
        ValueError: they do not; there are no such layers.
    """
    if config["label_smoothing"] and not config["ce_weight"]:
        raise ValueError("--label-smoothing is that of the cross-entropy: give --ce-weight too")
    if config["hidden_layers"]:
        _layers_of(config, *(load_config(Path(config[name])) for name in ("student", "teacher")))
    elif config["hidden_weight"] != "dynamic" or config["hidden_kind"] != "cosine":
        raise ValueError(
            "--hidden-weight and --hidden-kind are of the hidden-state term: give --hidden-layers"
        )


def make_loss(config: Mapping[str, Any], student: Any, teacher: Any) -> Any:
    """DistillationLoss as configured; check_loss() has passed.

    Raises:
        ValueError, TypeError: options that contradict each other.
    """
    from minitron_kernels.distillation import DistillationLoss

    options: dict[str, Any] = {
        name: config[name]
        for name in (
            *("kl_weight", "ce_weight", "divergence", "temperature", "temperature_squared"),
            *("label_smoothing", "vocab_size"),
        )
    }
    if config["hidden_layers"]:
        options |= _hidden_states(config, student.config, getattr(teacher, "config", None))
    return DistillationLoss(
        **options, schedule=config["loss_schedule"], workspace_bytes=config["loss_workspace"]
    )


def _hidden_states(config: Mapping[str, Any], student: Any, teacher: Any) -> dict[str, Any]:
    """Arguments of DistillationLoss for the hidden-state term."""
    import torch

    from minitron_kernels.distillation.hidden_states import HiddenStatesLoss

    if teacher is None:  # a cache of hidden states: a map is learnt without the teacher's channels
        teacher = load_config(Path(config["teacher"]))
    layers = _layers_of(config, student, teacher)
    kept = None
    if student.hidden_size != teacher.hidden_size:
        kept = _kept_channels(Path(config["student"]), student.hidden_size, teacher.hidden_size)
    with torch.random.fork_rng(devices=[]):  # the map begins by --seed, whatever was drawn before
        torch.manual_seed(config["seed"])
        term = HiddenStatesLoss(
            layers,
            kind=config["hidden_kind"],
            student_width=student.hidden_size,
            teacher_width=teacher.hidden_size,
            kept_channels=kept,
        )
    return {"hidden_states": term, "hidden_weight": config["hidden_weight"]}


def _layers_of(config: Mapping[str, Any], student: Any, teacher: Any) -> dict[int, int]:
    """{layer of the student: layer of the teacher} of the hidden-state term, by the configs of both."""
    layers: dict[int, int] = {}
    for text in config["hidden_layers"]:
        own, other = map(int, text.split(":"))
        for layer, model, which in ((own, student, "student"), (other, teacher, "teacher")):
            if layer >= model.num_hidden_layers:
                last = model.num_hidden_layers - 1
                raise ValueError(f"--hidden-layers {text}: the {which}'s layers are 0 to {last}")
        if own in layers:
            raise ValueError(f"--hidden-layers {text}: the student's layer {own} is given twice")
        layers[own] = other
    return layers


def _kept_channels(folder: Path, width: int, of: int) -> Any:
    """The channels of a teacher that a student has, by the plan in the student's folder; None: not known.

    After several rounds of pruning the plan there is that of the last one: it names channels of the model
    between, not of the teacher.
    """
    from minitron_kernels.pruning import PruningPlan
    from minitron_kernels.pruning.checkpoint.model_card import PLAN_FILE
    from minitron_kernels.pruning.families.registry import family_of

    if not (folder / PLAN_FILE).is_file():
        return None
    plan = PruningPlan.load(folder / PLAN_FILE)
    source = family_of(plan.source_config).sizes(plan.source_config)["hidden"]
    kept = plan.hidden
    return kept if source == of and kept is not None and len(kept) == width else None
