"""benchmarks/parts.py without a GPU: what has a CPU form is measured there; the calls of the CUDA kernels are
those that the kernels take, and their checks find wrong results, by the shim that runs them on the host.
"""

import json

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common.scripts import script
from kl_loss.shim_tiles import kernels_of, shim_fixture, without_cublas_fixture  # noqa: F401
from parts_rows import gemms, kl_loss, memory
from parts_rows.part import Absent, Part, Sizes, Work
from tools.host_shim import missing_tool

parts = script("parts")
TINY = Sizes(24, 16, 24, 300, (8, 12), 64, 1 << 16, 32)


@pytest.mark.native
def test_what_the_cpu_has_is_measured(tmp_path, monkeypatch, capsys):
    """GEMMs, kl_loss, importance, gather: with rates, next to the yardstick; the rest says why not."""
    monkeypatch.setattr(parts, "QUICK", TINY)
    file = tmp_path / "parts.json"
    assert parts.main(["--device", "cpu", "--quick", "--budget", "0.01", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["complete"] and result["sizes"]["V"] == 300
    rows = {(row["group"], row["part"]): row for row in result["rows"]}
    assert {row["status"] for row in result["rows"]} == {"ok", "absent"}
    logits = rows["gemm", "student's logits, 8 rows"]
    assert logits["flops"] == 2 * 8 * 16 * 300
    assert logits["per_s"] == pytest.approx(logits["flops"] / logits["busy_s"]["median"])
    assert rows["gemm", "dW in fp32, 12 rows, beta 1"]["flops"] == 2 * 12 * 16 * 300
    forward = rows["kl", "native: kl_loss forward, bf16"]
    assert forward["status"] == "ok" and forward["bytes"] == 4 * 8 * 300
    assert rows["memory", "native: gather, rows and columns"]["bytes"] == 2 * 2 * 320 * 192
    assert rows["kl", "native: grad"]["reason"] == "kernels on tiles of logits are for GPUs"
    assert "need a GPU" in rows["kl", "triton: forward"]["reason"]
    text = capsys.readouterr().out
    assert "TFLOP/s" in text and "GB/s" in text and "triton: forward: absent" in text


@pytest.fixture
def on_the_host(monkeypatch, request):
    """The CUDA kernels by the shim, as if CPU tensors were the GPU's."""
    if reason := missing_tool():
        pytest.skip(reason)
    kernels = kernels_of(request.getfixturevalue("shim"))
    monkeypatch.setattr(kl_loss, "_epilogues", lambda backend, device: kernels.epilogues)
    monkeypatch.setattr(kl_loss, "_backend", lambda *_: None)
    return kernels


# part -> the argument that its kernel writes and its check looks at
ON_TILES = {
    "forward": 2,
    "grad": 4,
    "forward_grad": 5,
    "forward, JSD": 2,
    "tile_stats": 2,
    "tile_mixture": 3,
}


@pytest.mark.parametrize("name", ON_TILES)
def test_calls_of_the_cuda_kernels(on_the_host, name):
    part = next(part for part in kl_loss.parts("cpu", TINY) if part.key == f"native: {name}")
    work = part.build()
    work.check()
    work.call()
    rows, columns = (TINY.chunks[0], TINY.V) if "tile" not in name else (TINY.N, TINY.tile)
    pair = 10 if "grad" in name else 8
    assert pair * rows * columns <= work.bytes <= 1.1 * pair * rows * columns + 80 * rows


@pytest.mark.parametrize("name", ON_TILES)
def test_a_wrong_kernel_is_not_timed(on_the_host, monkeypatch, name):
    """Its result is a tenth too large, for a row after the first."""
    right = on_the_host.epilogues

    class Spoilt:
        def __getattr__(self, kernel):
            def spoiling(*arguments):
                getattr(right, kernel)(*arguments)
                if kernel == name.split(",")[0]:
                    result = arguments[ON_TILES[name]]
                    (result[1] if len(result) > 5 else result[..., 1]).mul_(1.1)

            return spoiling if hasattr(right, kernel) else None

    monkeypatch.setattr(kl_loss, "_epilogues", lambda backend, device: Spoilt())
    part = next(part for part in kl_loss.parts("cpu", TINY) if part.key == f"native: {name}")
    args = parts.parse_args(["--device", "cpu", "--quick", "--once"])
    row = parts.run_part(part, parts.Yardsticks("cpu", TINY), args)
    assert row["status"] == "failed" and "relative error" in row["reason"]


@pytest.mark.native
@pytest.mark.parametrize("group", [gemms, memory], ids=["gemms", "memory"])
def test_a_wrong_result_is_not_timed(monkeypatch, group):
    """Of a GEMM, of importance, of gather."""
    monkeypatch.setattr(gemms, "product", lambda a, b, out, accumulate: out.fill_(1.0))
    near = memory.near
    monkeypatch.setattr(memory, "near", lambda found, wanted, rel: near(found * 1.01, wanted, rel))
    monkeypatch.setattr("minitron_kernels.gather_channels", lambda weight, rows, cols, out, backend: out)
    args = parts.parse_args(["--device", "cpu", "--quick", "--once"])
    yardsticks = parts.Yardsticks("cpu", TINY)
    rows = [parts.run_part(part, yardsticks, args) for part in group.parts("cpu", TINY)]
    failed = [row for row in rows if row["status"] == "failed"]
    assert all("relative error" in row["reason"] or "other bits" in row["reason"] for row in failed)
    assert len(failed) == (len(rows) if group is gemms else len(rows) // 2)  # Triton's are absent


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, capsys, tmp_path):
    """It is counted; what is absent is not."""

    def some(device, sizes):
        yield Part("breaks", lambda: 1 / 0)
        yield Part("absent", lambda: (_ for _ in ()).throw(Absent("none here")))
        yield Part("works", lambda: Work(lambda: torch.ones(9).sum(), 36))

    monkeypatch.setattr(parts, "GROUPS", {"gemm": some, "kl": some, "memory": some})
    monkeypatch.setattr(parts, "QUICK", TINY)
    arguments = [
        "--device",
        "cpu",
        "--quick",
        "--only",
        "kl",
        "--budget",
        "0",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert parts.main(arguments) == 1
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "absent", "ok"]
    assert rows[0]["reason"].startswith("ZeroDivisionError") and rows[1]["reason"] == "none here"
    assert "kl, breaks: failed, ZeroDivisionError" in capsys.readouterr().out


def test_a_part_is_timed_beside_its_own_yardstick(monkeypatch):
    """A row that takes a third of the yardstick's time for a third of its bytes has its rate."""
    seconds = {"copy": 3.0, "product": 5.0, "part": 1.0}

    class Yardsticks(parts.Yardsticks):
        def __init__(self):
            self.copy, self.product, self.bytes, self.flops = "copy", "product", 300, 500

    def interleave(side, call, device, *, budget_s, reps):
        from common.harness import Pairs, Sample

        return Pairs([Sample(9.0, seconds[side])] * 3, [Sample(9.0, seconds["part"])] * 3)

    monkeypatch.setattr(parts, "interleave", interleave)
    args = parts.parse_args(["--device", "cpu", "--quick"])
    for work, share, rate in ((Work(lambda: 0, 100), 1.0, 100.0), (Work(lambda: 0, 0, 50), 0.5, 50.0)):
        got = parts.measure(work, Yardsticks(), args)
        assert got["share"]["median"] == pytest.approx(share) and got["per_s"] == rate
