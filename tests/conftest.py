"""What is tested is what pip installed; and the rules for tests that need a GPU or the compiled extension."""

from __future__ import annotations

import filecmp
import importlib.machinery
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import hypothesis
except ImportError:  # tests of the GPU run without it, on machines that have little more than torch
    pass
else:
    # The same examples in every run: a run that fails can be repeated, and one that passed will pass again.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]
NAME = "minitron_kernels"
# what tells a user that an installation works; the rest is for those who change it
QUICK = (
    "test_backend.py",
    "kl_loss/test_kl_loss.py",
    "kl_loss/test_training.py",
    "importance/test_importance.py",
    "gather/test_gather.py",
    "pruning/test_collect.py",
    "pruning/test_plan.py",
    "pruning/test_prune_model_results.py",
    "pruning/test_cli.py",
    "distillation/test_step.py",
    "distillation/test_cli.py",
    "evaluation/test_harness.py",
)


def _prefer_installed() -> Path | None:
    """Take the checkout off sys.path where a copy is installed; return that copy's folder.

    `python -m pytest` puts the checkout first, and its package folder, which need not have a _C, would hide
    the installed one. Where nothing is found elsewhere, the checkout is what is installed (editable).
    """
    others = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    spec = importlib.machinery.PathFinder.find_spec(NAME, others)
    if spec is None or spec.origin is None:
        return None
    sys.path[:] = others
    return Path(spec.origin).parent


INSTALLED = _prefer_installed()

import torch  # noqa: E402

from minitron_kernels import _native  # noqa: E402
from tools.poison import poisoned  # noqa: E402

SIMD_CHOSEN = _native.build_info().get("simd_chosen")  # before a test forces another


def _stale() -> list[str]:
    """Python files of the checkout that differ from the installed copy."""
    if INSTALLED is None:
        return []
    files = [path.relative_to(ROOT / NAME) for path in sorted((ROOT / NAME).rglob("*.py"))]
    _, differ, missing = filecmp.cmpfiles(ROOT / NAME, INSTALLED, files, shallow=False)
    return [str(path) for path in (*differ, *missing)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-native",
        action="store_true",
        help="fail, rather than skip tests, without the compiled extension",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="whether this build works here, in a few minutes: each op, and each command from end to end",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """--quick: files that are not among QUICK are not even imported."""
    if not config.getoption("--quick") or not collection_path.name.startswith("test_"):
        return None
    return str(collection_path.relative_to(ROOT / "tests")) not in QUICK or None


def pytest_configure(config: pytest.Config) -> None:
    if stale := _stale():
        raise pytest.UsageError(
            f"the installed {INSTALLED} is not what this checkout holds ({', '.join(stale)} differ): "
            "run pip install . again, or once pip install --no-build-isolation -e ."
        )
    if config.getoption("--require-native") and not _native.available():
        raise pytest.UsageError(f"--require-native, but {_native.reason()}")
    # a run that is stopped, as by `timeout`, says what has failed until then; workers of xdist just end
    if not hasattr(config, "workerinput") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Every test: the kept workspace before each use, and all fresh tensors, are full of NaN."""
    with poisoned():
        yield


@pytest.fixture(params=_native.build_info().get("simd_compiled", []))
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of the build, forced in turn; skipped where this CPU cannot run it."""
    levels = _native.build_info()["simd_compiled"]
    if levels.index(request.param) < levels.index(SIMD_CHOSEN):
        pytest.skip(f"this CPU has no {request.param}")
    torch.ops.minitron_kernels.set_simd_level(request.param)
    yield request.param
    torch.ops.minitron_kernels.set_simd_level("")


def pytest_report_header() -> list[str]:
    info = _native.build_info()
    native = (
        f"{info['simd_chosen']}, CUDA objects: {' '.join(info['cuda_archs']) or 'none'}" if info else "no"
    )
    return [f"{NAME}: {Path(_native.__file__).parent}, native: {native}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = None if torch.cuda.is_available() else pytest.mark.skip(reason="needs a GPU")
    no_native = None if _native.available() else pytest.mark.skip(reason=f"needs _C: {_native.reason()}")
    for item in items:
        for name, skip in (("gpu", no_gpu), ("native", no_native)):
            if skip is not None and item.get_closest_marker(name):
                item.add_marker(skip)
