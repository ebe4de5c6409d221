"""Checkpoints, tokenizers and devices that a command line names; errors say what to give instead."""

from __future__ import annotations

import atexit
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from minitron_kernels._command.messages import few
from minitron_kernels._files import sha256_of

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# of a checkpoint's folder, what a model and its tokenizer are made of; other files are results beside them
_OF_MODEL = (
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "*.model", "*.tiktoken"),
)
# what wrappers add to names (pruning removes it too) -> what it is replaced by
PREFIXES = {
    r"_orig_mod\.": "",
    r"^(module\.|language_model\.)+": "",
    r"^model\.language_model\.": "model.",
}


def check_free(path: Path, overwrite: bool, *, folder: bool, option: str = "--output") -> None:
    """Checks that `path` can be written, before hours of work."""
    if path.exists() and not overwrite:
        raise FileExistsError(17, f"is there already; take another {option}, or --overwrite", str(path))
    if path.exists() and path.is_dir() != folder:
        kind = "a folder" if folder else "a file"
        raise FileExistsError(17, f"is not {kind}, and is not replaced: take another {option}", str(path))
    parent = next(
        above for above in (path if folder else path.parent, *path.absolute().parents) if above.exists()
    )
    if not folder and not path.parent.exists():
        raise FileNotFoundError(2, f"there is no such folder to write {option} to", str(path.parent))
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise PermissionError(13, f"cannot be written to: take another {option}", str(parent))


def check_model(path: Path) -> None:
    """Raises FileNotFoundError unless there is a folder with a config.json."""
    if (path / "config.json").is_file():
        return
    reason = "is not the folder of a checkpoint (it has no config.json)"
    if not path.exists():
        reason = "there is no such folder"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            reason += f"; a model of the hub is downloaded first: hf download {path} --local-dir {path.name}"
    raise FileNotFoundError(2, reason, str(path))


def model_files(folder: Path) -> list[Path]:
    """The files of a model and its tokenizer in a checkpoint's folder, by name."""
    return sorted({path for name in _OF_MODEL for path in folder.glob(name) if path.is_file()})


def checkpoint_hash(folder: Path) -> str:
    """A SHA-256 of the weights, config and tokenizer in a checkpoint's folder, which are read whole.

    Sizes and times do not tell models apart: those of one shape have the same sizes, and archives and images
    set all times alike.
    """
    lines = [f"{path.name} {sha256_of(path)}\n" for path in model_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_no_adapter(folder: Path) -> None:
    """Raises ValueError if there is an adapter beside the weights."""
    for name in _ADAPTERS:
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{folder / name}: the checkpoint has an adapter, whose weights are not in the model's: "
                "merge it first (peft: model.merge_and_unload().save_pretrained()), or move the adapter's "
                "files away to go on without it"
            )


def device_of(name: str) -> Any:
    """The device; checks that a tensor can be put on it."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise NotImplementedError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here: {reason}") from None
    return device


def load_config(path: Path) -> Any:
    """transformers' config of a checkpoint's folder.

    Raises:
        ValueError: its config.json is damaged, or of no model that transformers knows; names it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # of many kinds, by what is wrong
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path / 'config.json'}: is not the config of a model: {_said(error)}") from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint's folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise different errors for missing files
        raise ValueError(
            f"{path}: has no tokenizer that transformers loads ({_said(error)}): put its files there, or "
            "give token ids, as .npy"
        ) from error


def tokenizer_if_any(path: Path) -> Any:
    """The tokenizer of a checkpoint's folder; None where there is none, with a warning if its files are there
    and cannot be loaded."""
    try:
        return load_tokenizer(path)
    except ValueError as error:
        if any(path.glob("tokenizer*")) or any(path.glob("vocab.*")):
            warnings.warn(f"{error}; it goes on without", stacklevel=2)
        return None


def _said(error: Exception) -> str:
    """What a library said, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:230]} ..."


def load_model(
    path: Path,
    dtype: str,
    *,
    otherwise: str = "scored",
    with_head: bool = False,
    device_map: str | None = None,
) -> Any:
    """The model; checks that no weights are missing, since transformers makes up missing ones.

    Args:
        path: the folder.
        dtype: of DTYPES.
        otherwise: what would happen to random weights, for the error.
        with_head: whether the head's weights must be there too, or be tied to the embedding.
        device_map: "auto" divides the model over GPUs, memory and disk (accelerate); None: it is on the CPU.

    Raises:
        ValueError: weights are missing or damaged, or there is an adapter; accelerate is needed and not
            installed.
    """
    check_no_adapter(path)
    kind, key_mapping = auto_class(load_config(path))
    options: dict[str, Any] = {} if device_map is None else _divided(device_map)
    try:
        loaded: Any = kind.from_pretrained(
            path, dtype=dtype, output_loading_info=True, key_mapping=key_mapping, **options
        )
    except Exception as error:  # of safetensors, torch and transformers, few of which name the file
        file = _damaged(path) or path
        if not os.access(file, os.R_OK):  # safetensors says that there is no such file
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file)) from error
        raise ValueError(f"{file}: cannot be loaded: {_said(error)}") from error
    model, report = loaded
    lacking = sorted(name for name in report["missing_keys"] if with_head or not name.startswith("lm_head."))
    if lacking or report["mismatched_keys"]:
        wrong = lacking or sorted(str(entry[0]) for entry in report["mismatched_keys"])
        raise lacking_error(path, wrong, otherwise)
    if unused := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{path}: config.json describes no {few(unused, 3)}, which its files hold: they are not used",
            stacklevel=2,
        )
    return model


def auto_class(config: Any) -> tuple[Any, dict[str, str] | None]:
    """The class of transformers that makes a config's model, and the `key_mapping` that it loads with."""
    import transformers

    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:  # whose names have such prefixes
        return transformers.AutoModelForImageTextToText, None
    return transformers.AutoModelForCausalLM, PREFIXES


def lacking_error(path: Path, names: list[str], otherwise: str) -> ValueError:
    """The error about weights that a checkpoint does not hold; see load_model()."""
    return ValueError(
        f"{path}: does not hold {few(names, 3)} as config.json says: random weights would be {otherwise}"
    )


def _damaged(path: Path) -> Path | None:
    """The first file of weights in a folder, of those that transformers reads, with a damaged header."""
    from safetensors import safe_open

    for file in sorted(path.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception:
            return file
    return None


def _divided(device_map: str) -> dict[str, Any]:
    """Options by which transformers divides a model; what fits nowhere goes to a folder, until the end."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("--device auto needs accelerate: pip install accelerate")
    folder = tempfile.mkdtemp(prefix="minitron-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": device_map, "offload_folder": folder}
