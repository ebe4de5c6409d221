"""PEP 517 hooks: those of setuptools, except that torch is required only if none is there to compile against.

The extension is compiled against torch's headers and linked against its libraries; the build does not import
torch. So a torch in the environment that pip installs *into* serves as well as one in pip's isolated build
environment, and a second copy (up to several GB) is not downloaded. The extension is built against the stable
ABI of the oldest torch that is supported and loads under that one and every later one.
"""

from __future__ import annotations

from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from build_backend import tools

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_SETUPTOOLS = 77  # the first with license expressions (PEP 639); it also has its own bdist_wheel
OLDEST_TORCH = "{}.{}".format(*tools.OLDEST_TORCH)
TORCH_TO_BUILD_WITH = f"torch=={OLDEST_TORCH}.0"  # what is built against it works with every later one

Config = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    mode = tools.requested_mode()
    if mode == "python" or isinstance(tools.find_compiler(), tools.Absent):
        return []  # nothing is compiled; in modes cpu and cuda the build itself says what is missing
    if mode == "cuda" and isinstance(cuda := tools.find_cuda(), tools.Absent):
        raise SystemExit(tools.cuda_required(cuda))  # before anything is downloaded
    return ["ninja"] if tools.find_torch() else ["ninja", TORCH_TO_BUILD_WITH]


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(directory: str, config_settings: Config = None) -> str:
    _check_setuptools()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Config = None) -> str:
    _check_setuptools()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    _check_setuptools()
    return build_meta.build_wheel(directory, config_settings, metadata_directory)


def build_editable(
    directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    _check_setuptools()
    return build_meta.build_editable(directory, config_settings, metadata_directory)


def _check_setuptools() -> None:
    # pip does not check build requirements under --no-build-isolation
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"error: building minitron-kernels needs setuptools >= {OLDEST_SETUPTOOLS}, here is "
            f"{setuptools.__version__}. --no-build-isolation uses what is installed, so install first:\n"
            f"    pip install 'setuptools>={OLDEST_SETUPTOOLS}' ninja 'torch>={OLDEST_TORCH}'\n"
            "or leave --no-build-isolation out."
        )
