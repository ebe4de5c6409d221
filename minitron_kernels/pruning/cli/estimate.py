"""What scoring, or a search, will take, said before it begins: memory, and operations."""

from __future__ import annotations

from pathlib import Path

from minitron_kernels._command.messages import say

_MUCH = 1e13  # operations worth a line: about a minute of two cores


def say_estimate(folder: Path, dtype: str, device: str, tokens: int, smaller: int | None = None) -> None:
    """Prints a line about a long run, and a warning where the weights exceed the memory that is free.

    Args:
        folder: of the checkpoint.
        dtype, device: of the command line.
        tokens: of all windows.
        smaller: how many models, cut from this one, read them at most; None: this one alone.
    """
    from minitron_kernels.pruning.checkpoint.safetensors_files import read_json
    from minitron_kernels.pruning.plan.counts import count_usage

    config = read_json(folder / "config.json")
    try:
        usage = count_usage(config, memory_dtype=dtype_of(config, dtype))
    except (TypeError, ValueError, ArithmeticError):
        return  # no dtype of torch's, or no sizes of a model: its loader has more to say
    operations = 2.0 * usage.active_parameters * tokens * (smaller or 1)
    through, most = (
        ("", "") if smaller is None else (f"each of {smaller:,} models of fewer than ", "at most ")
    )
    size = usage.memory_bytes / 1e9
    name = dtype_of(config, dtype)
    if operations >= _MUCH:
        say(
            "minitron-prune",
            "estimate",
            f"{tokens:,} tokens through {through}{usage.parameters:,} parameters ({size:.1f} GB in {name}): "
            f"{most}{operations:.1e} operations and the attention's",
        )
    advice = "--dtype bfloat16 halves float32"
    if smaller is None:
        advice = f"--device auto divides a model over GPUs, memory and disk, {advice}"
    else:
        advice += ", and a search needs room for a smaller model beside it"
    free = free_bytes(device)
    if free is not None and usage.memory_bytes > free:
        say(
            "minitron-prune",
            "warning",
            f"the weights are {size:.1f} GB in {name}, and {free / 1e9:.1f} GB are free on {device}: "
            f"{advice}",
        )


def dtype_of(config: dict[str, object], dtype: str) -> str:
    """The name of the dtype that the model is loaded in."""
    written = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(written if dtype == "auto" else dtype).removeprefix("torch.")


def free_bytes(device: str) -> int | None:
    """Free memory of a device; None where it cannot be told, or several are used."""
    if device == "auto":
        return None
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
