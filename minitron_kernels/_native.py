"""Loads the compiled extension once, on import; if it cannot be loaded, keeps the reason."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported first, since it loads libtorch: the extension is linked against it without a path.
import torch

_HERE = Path(__file__).resolve().parent
_IS_CHECKOUT = (_HERE.parent / "setup.py").is_file()

# What these Python files were written for: a digest of each op's schema, and of the headers that say what a
# number means by its place. An extension of other sources is not used: torch would say that an operator does
# not exist, or one number would be taken for another. build_backend/interface.py makes the digests;
# a test compares them with csrc/.
INTERFACE = {
    "bf16_engine": "4dd4e1d8",
    "copy_floor_": "92f4a289",
    "count_gemm_flops": "7bb9a085",
    "gather_channels_": "21e426e0",
    "importance_accumulate_": "4b9f104e",
    "importance_add_": "a43f61f0",
    "importance_moments": "ab88cb5c",
    "importance_rows": "1422de23",
    "kl_finish_mixture_": "e8d7021d",
    "kl_finish_stats_": "16617483",
    "kl_loss/cpu/linear_plan.h": "0b93bcd6",
    "kl_loss/loss_options.h": "c520ac50",
    "kl_loss_backward": "2b28e65f",
    "kl_loss_constant": "a52d8f46",
    "kl_loss_forward": "f9f5c06d",
    "kl_loss_forward_metrics": "bc731790",
    "kl_scale_grad_": "d4f57288",
    "kl_student_grad_": "107b48bf",
    "kl_student_stats_": "2204a1c4",
    "kl_tile_forward_": "7ae0c3a7",
    "kl_tile_forward_grad_": "6b8d70db",
    "kl_tile_grad_": "4ef57cb6",
    "kl_tile_mixture_": "9687b034",
    "kl_tile_stats_": "fb4d652c",
    "linear_kl_loss_cpu_": "954831f5",
    "linear_kl_loss_layout": "87b24298",
    "linear_sparse_kl_loss_cpu_": "5f7a7eaf",
    "read_floor": "67e7ac91",
    "set_simd_level": "d977e41f",
    "sparse_outcomes": "914354cf",
    "why_no_engine": "328bbde9",
}


def _folders() -> list[str]:
    """This folder; in a checkout, which hides an installed package, also the folders of that on sys.path."""
    others = [str(Path(entry, _HERE.name)) for entry in sys.path] if _IS_CHECKOUT else []
    return [str(_HERE), *others]


def _load() -> tuple[ModuleType | None, str | None]:
    name = f"{_HERE.name}._C"
    spec = importlib.machinery.PathFinder.find_spec(name, _folders())
    if spec is None or spec.loader is None:
        return None, _why_not_built()
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:  # built for another Python, or a libtorch that lacks a symbol
        return None, f"{spec.origin} does not load under torch {torch.__version__}: {error}"
    # an extension from before there were digests has none
    found: dict[str, str] = getattr(module, "interface", dict)()
    if found != INTERFACE:
        reason = f"{spec.origin} {_why_stale(found)}"
        warnings.warn(f"minitron_kernels has to do without C++: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    sys.modules[name] = module
    return module, None


def _why_stale(found: dict[str, str]) -> str:
    """How an extension with the interface `found` differs from the one that is wanted, and what to do."""
    lacks, unknown = sorted(INTERFACE.keys() - found.keys()), sorted(found.keys() - INTERFACE.keys())
    other = sorted(name for name in INTERFACE.keys() & found.keys() if INTERFACE[name] != found[name])
    age = "of another version than"
    if not unknown and not other:
        age = "older than"
    elif not lacks and not other:
        age = "newer than"
    differences = [
        f"{what} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (
            ("it lacks", lacks if found else []),
            ("Python does not know", unknown),
            ("they differ on", other),
        )
        if names
    ]
    what = f" ({'; '.join(differences)})" if differences else ""
    if _IS_CHECKOUT:
        remedy = f"pip install . (or -e .) in {_HERE.parent} builds it anew"
    else:
        remedy = "reinstall minitron-kernels (pip install --force-reinstall --no-deps)"
    return f"is {age} the Python files in {_HERE}{what}: {remedy}"


def _why_not_built() -> str:
    for folder in _folders():
        note = Path(folder, "_not_built.txt")
        if note.is_file():
            return f"minitron_kernels was installed without C++: {note.read_text().strip()}"
    if _IS_CHECKOUT:
        return f"nothing has been built from {_HERE.parent}: pip install . (or -e .) there"
    return f"there is no _C in {_HERE} for this Python: reinstall minitron-kernels"


_MODULE, _REASON = _load()


def available() -> bool:
    """Whether the extension is loaded, and with it the ops under torch.ops.minitron_kernels."""
    return _MODULE is not None


def reason() -> str | None:
    """Why the extension is not loaded; None where it is."""
    return _REASON


def build_info() -> dict[str, Any]:
    """What the extension was built from and what it chose on this machine; empty where it is not loaded."""
    return dict(_MODULE.build_info()) if _MODULE is not None else {}


def location() -> str | None:
    """The path of the extension's file; None where it is not loaded."""
    return _MODULE.__file__ if _MODULE is not None else None


def why_not_on_gpu(index: int) -> str | None:
    """Why the CUDA kernels do not run on this GPU; None where they do. Launches one, which changes nothing.

    A GPU may be older than all that was compiled, or newer than what its driver can compile; and a driver
    may be older than the toolkit.
    """
    device = torch.device("cuda", index)
    # before: that there is no memory is another error
    grad, one = torch.ones(2, 1, dtype=torch.float32, device=device).unbind()
    try:
        torch.ops.minitron_kernels.kl_scale_grad_(grad, one[0])
    except RuntimeError as error:
        built = " ".join(build_info()["cuda_archs"])
        found = str(error).splitlines()[0]
        return f"the kernels, built for {built}, do not run on {torch.cuda.get_device_name(index)}: {found}"
    return None
