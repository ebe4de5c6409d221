"""Which CUDA toolkit the build finds, and the architectures that it builds for."""

import os
import sys
from pathlib import Path

import pytest

from tools.toolchains import script, toolkit

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "build_backend").is_dir():
    pytest.skip("no build_backend here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_backend import tools  # noqa: E402
from build_backend.tools import Cuda  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("MINITRON_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_cuda_toolkits(monkeypatch, tmp_path):
    """CUDA_HOME, then CUDA_PATH, then the PATH; of the architectures those that nvcc knows."""
    monkeypatch.setattr(tools, "CUDA_ARCHS", (80, 90, 100))
    homes = [tmp_path / name for name in ("home", "path", "on_path")]
    nvccs = [str(toolkit(home)) for home in homes]
    monkeypatch.setenv("CUDA_HOME", str(homes[0]))
    monkeypatch.setenv("CUDA_PATH", str(homes[1]))
    monkeypatch.setenv("PATH", f"{homes[2] / 'bin'}:{os.environ['PATH']}")
    for home, nvcc, name in zip(homes, nvccs, ("CUDA_HOME", "CUDA_PATH", None), strict=True):
        assert tools.find_cuda() == Cuda(nvcc, "12.8", [80, 90, 100], [str(home / "lib64")])
        if name:
            monkeypatch.delenv(name)
    toolkit(homes[2], archs=(75, 90, 120), lib="lib")
    (homes[2] / "lib64/libcudart_static.a").unlink()
    assert tools.find_cuda() == Cuda(nvccs[2], "12.8", [90], [str(homes[2] / "lib")])
    toolkit(homes[2], release="11.8")
    assert "is of CUDA release 11.8: 12.0 is the first with C++20" in tools.find_cuda().why
    toolkit(homes[2], archs=(70,))
    assert "knows none of sm_80, sm_90, sm_100" in tools.find_cuda().why
    toolkit(homes[2])
    script(homes[2] / "bin/nvcc", "exit 5")
    assert "does not run" in tools.find_cuda().why


def test_a_wrapper_tells_where_its_toolkit_is(monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "CUDA_ARCHS", (80, 90, 100))
    real = tmp_path / "real"
    toolkit(real)
    wrapper = toolkit(tmp_path / "wrapper", dry_run=f'echo "#$ TOP={real}/bin/.." >&2')
    for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / "wrapper" / file).unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "wrapper"))
    assert tools.find_cuda() == Cuda(str(wrapper), "12.8", [80, 90, 100], [str(real / "lib64")])
    (real / "lib64/libcudart_static.a").unlink()
    assert "has no libcudart_static.a" in tools.find_cuda().why
    (real / "include/cuda_runtime.h").unlink()
    assert "has no include/cuda_runtime.h" in tools.find_cuda().why


def test_architectures_that_are_asked_for(monkeypatch, tmp_path):
    nvcc = str(toolkit(tmp_path, archs=(75, 80, 90, 120)))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for text, archs in (("90", [90]), ("120,90 80", [80, 90, 120]), ("90,90", [90])):
        monkeypatch.setenv("MINITRON_CUDA_ARCHS", text)
        assert tools.find_cuda() == Cuda(nvcc, "12.8", archs, [str(tmp_path / "lib64")])
    for text in ("sm_90", "90a", "75", "9.0", "90;80"):
        monkeypatch.setenv("MINITRON_CUDA_ARCHS", text)
        with pytest.raises(SystemExit, match="MINITRON_CUDA_ARCHS must be architectures from 80 on"):
            tools.find_cuda()
    for text in ("", " ", ","):  # names none: those of the list that nvcc knows
        monkeypatch.setenv("MINITRON_CUDA_ARCHS", text)
        assert tools.find_cuda() == Cuda(nvcc, "12.8", [80, 90], [str(tmp_path / "lib64")])
    monkeypatch.setenv("MINITRON_CUDA_ARCHS", "90,100")  # not a smaller build without a word
    with pytest.raises(SystemExit, match="knows not all of sm_90, sm_100, which MINITRON_CUDA_ARCHS names"):
        tools.find_cuda()
