"""The benchmark's own arithmetic: a harness that measures wrongly is worse than none."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common import harness as _harness
from common import machine as _machine
from common.scripts import script
from kl_loss_rows import cases as _cases
from kl_loss_rows import roofline as _roofline
from kl_loss_rows.floor import Floor, gemm_flops
from kl_loss_rows.implementation import step
from kl_loss_rows.peers import IMPLEMENTATIONS, OURS
from minitron_kernels import _backend

gather, importance, kl_loss = map(script, ("gather", "importance", "kl_loss"))

TINY = _cases.Case("tiny", 24, 16, 20, 301)
QUICK_TO_BUILD = [key for key, row in IMPLEMENTATIONS.items() if not row.compiles and row.serves("cpu")]
ON_CPU = [key for key in OURS if IMPLEMENTATIONS[key].serves("cpu")]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_quantile_is_numpys(n, q):
    values = np.random.default_rng(n).normal(size=n)
    assert _harness.quantile(list(values), q) == pytest.approx(np.quantile(values, q))


def test_quantile_of_nothing():
    with pytest.raises(ValueError, match="no values"):
        _harness.quantile([], 0.5)


def test_interleave_takes_turns_and_keeps_its_limits():
    order = []
    floor, call = (lambda name=name: order.append(name) for name in ("floor", "call"))
    pairs = _harness.interleave(floor, call, "cpu", budget_s=0.0, reps=(3, 9))
    assert order == ["floor", "call"] * 3 and len(pairs.floor) == len(pairs.call) == 3
    assert len(_harness.interleave(floor, call, "cpu", budget_s=60.0, reps=(1, 4)).call) == 4


def test_pairs_give_the_ratio_of_busy_seconds():
    pairs = _harness.Pairs([_harness.Sample(9.0, 2.0)], [_harness.Sample(1.0, 3.0)])
    assert pairs.ratios == [1.5]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    """What cannot be written leaves the file as it was, and says at each step whether it is complete."""
    path = tmp_path / "out.json"
    _harness.write_json(path, {"rows": [1]}, complete=False)
    assert json.loads(path.read_text()) == {"rows": [1], "complete": False}
    with pytest.raises(TypeError):
        _harness.write_json(path, {"rows": [1, object()]}, complete=True)
    assert json.loads(path.read_text())["complete"] is False
    _harness.write_json(path, {"rows": [1, 2]}, complete=True)
    assert json.loads(path.read_text()) == {"rows": [1, 2], "complete": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    _harness.write_json(None, {}, complete=True)


def test_busy_seconds_leave_out_sleep():
    got = _harness.sample(lambda: __import__("time").sleep(0.2), "cpu")
    assert got.wall_s >= 0.2 and got.busy_s < 0.1


def test_floor_counts_its_flops():
    """2 N V (3 H + Ht), counted by torch as the floor runs, over blocks that do not divide the shape."""
    from torch.utils.flop_counter import FlopCounterMode

    case = _cases.Case("blocks", 700, 24, 40, 9001)
    floor = Floor(_cases.make_inputs(case, "fp32"))
    with FlopCounterMode(display=False) as counter:
        floor()
    assert counter.get_total_flops() == gemm_flops(case) == 2 * 700 * 9001 * (3 * 24 + 40)


def test_floor_of_another_dtype():
    floor = Floor(_cases.make_inputs(TINY, "bf16"), torch.float32)
    floor()
    assert floor.dW.dtype == torch.float32 and floor.dW.shape == (TINY.V, TINY.H)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_probe_sees_a_planted_allocation(tmp_path, kept):
    """64 MiB, kept or given back before the end, in a fresh process as in the benchmark."""
    script = tmp_path / "planted.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import torch\n"
        "from common.harness import answer, extra_peak_bytes\n"
        "def work(spec):\n"
        "    held = []\n"
        "    def call():\n"
        "        planted = torch.ones(spec['bytes'] // 4)\n"
        "        if spec['kept']: held.append(planted)\n"
        "    torch.ones(4 * 2**20)  # an earlier peak, which must not count\n"
        "    return {'extra': extra_peak_bytes(call, 'cpu')}\n"
        "answer(work)\n"
    )
    planted = 64 * 2**20
    extra = _harness.run_worker(script, {"bytes": planted, "kept": kept}, threads=1)["extra"]
    if extra is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert planted - 2**20 < extra < planted + 4 * 2**20  # the kernel counts pages in batches


def test_worker_failure_is_told(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("print('noise'); raise ValueError('no such thing')")
    with pytest.raises(_harness.WorkerError, match="ValueError: no such thing"):
        _harness.run_worker(script, {}, threads=1)


def test_truth_is_the_gradient_of_its_loss():
    """Against autograd in float64, far and close."""
    for kind in ("far", "close"):
        inputs = _cases.make_inputs(TINY, "fp32", kind)
        exact = _cases.truth(inputs)
        X, W, Y, U = (operand.detach().double() for operand in inputs.operands)
        X.requires_grad_(), W.requires_grad_()
        double = _cases.Inputs(X, W, Y, U, inputs.labels)
        loss = step(IMPLEMENTATIONS["naive"].build(), double)
        assert float(loss) == pytest.approx(exact.loss, rel=1e-12)
        assert _cases.relative_error(X.grad, exact.dX) < 1e-12
        assert _cases.relative_error(W.grad, exact.dW) < 1e-12


@pytest.mark.parametrize("H, Ht", [(64, 80), (80, 64), (64, 64)])
def test_inputs_are_as_far_as_they_say(H, Ht):
    case = _cases.Case("kl", 64, H, Ht, 2000)
    far, close = (_cases.truth(_cases.make_inputs(case, "bf16", kind)).loss for kind in ("far", "close"))
    assert 2 < far < 6 and 2e-3 < close < 6e-3


@pytest.mark.parametrize("key", QUICK_TO_BUILD)
def test_adapters_compute_the_same_loss(key):
    """In fp32 every row of the table is the loss that it says, mean over the rows, with its gradients."""
    row = IMPLEMENTATIONS[key]
    if reason := row.absent("cpu"):
        pytest.skip(f"{row.package}: {reason}")
    try:
        loss = row.build()
    except ImportError as error:  # what the package itself needs
        pytest.skip(f"{row.package} does not import: {error}")
    inputs = _cases.make_inputs(TINY, "fp32")
    exact = _cases.truth(inputs, row.target)
    value = float(step(loss, inputs))
    if row.gives_loss:
        assert value == pytest.approx(exact.loss, rel=1e-5)
    assert _cases.relative_error(inputs.student_hidden.grad, exact.dX) < 1e-5
    assert _cases.relative_error(inputs.student_head.grad, exact.dW) < 1e-5
    assert inputs.teacher_head.grad is None


def test_shapes():
    assert _cases.parse_shape("M") == _cases.Case("M", 1024, 2048, 2560, 131072)
    assert replace(_cases.parse_shape("5,6,7,8"), name="") == _cases.Case("", 5, 6, 7, 8)
    for wrong in ("Q", "1,2,3", "1,2,3,0"):
        with pytest.raises(ValueError):
            _cases.parse_shape(wrong)


def test_rows_of_a_gpu(monkeypatch):
    """The default rows of each device: the library's by backend, and the others' that need a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu, cpu = kl_loss.parse_args(["--device", "cuda"]), kl_loss.parse_args([])
    ours = {"store", "recompute", "record", "sparse", "ce"}
    only = {f"{backend}-{row}" for backend in ("native", "triton") for row in ours}
    only |= {"liger-jsd", "liger-kl", "liger-jsd-cute", "liger-ce", "quack-ce"}
    assert set(gpu.impl) - set(cpu.impl) == only and set(cpu.impl) - set(gpu.impl) == ours
    assert gpu.shape == ["S", "M", "XL"] and not gpu.restrict_m and cpu.restrict_m
    assert IMPLEMENTATIONS["native-store"].label == "minitron, CUDA C++, store"
    monkeypatch.setattr(type(IMPLEMENTATIONS["naive"]), "version", lambda _: "1")
    monkeypatch.setattr(_backend, "why_not", lambda *_: "built without CUDA")
    assert IMPLEMENTATIONS["native-store"].absent("cuda") == "built without CUDA"
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            kl_loss.parse_args(["--device", "cuda"])


@pytest.mark.parametrize(
    ("flags", "dtype"), [(["avx2"], "fp32"), (["avx2", "avx512f", "amx_bf16"], "bf16"), ([], "bf16")]
)
def test_default_dtype(monkeypatch, flags, dtype):
    """bf16 but for processors on which torch's bf16 GEMMs have no vectors."""
    monkeypatch.setattr(_machine, "_cpu", lambda: ("a processor", flags))
    assert kl_loss.parse_args([]).dtype == [dtype]
    assert kl_loss.parse_args(["--dtype", "fp16", "bf16"]).dtype == ["fp16", "bf16"]
    assert _machine.fast_dtype("cuda") == "bf16"


@pytest.mark.parametrize("key", ["liger-jsd", "liger-jsd-cute", "liger-kl"])
def test_liger_losses_for_gpus_exist(key):
    """They run on a GPU alone; that the pinned version has them under these names can be seen anywhere."""
    row = IMPLEMENTATIONS[key]
    if row.version() is None:
        pytest.skip(f"{row.package} is not installed")
    assert callable(row.build())


def test_rates_are_the_best_of_several(monkeypatch):
    seconds = iter([4.0, 1.0, 2.0, 0.5, 0.25, 1.0])

    class Timer:
        def __init__(self, call, device):
            self.call = call

        def sample(self):
            self.call()
            return _harness.Sample(9.0, next(seconds))

    monkeypatch.setattr(_roofline, "timer", Timer)
    found = _roofline.rates("fp32", "cpu", side=8, copy_bytes=1000, reps=3)
    assert found == {"matmul_flops_per_s": 2 * 8**3 / 1.0, "copy_bytes_per_s": 2 * 1000 / 0.25}
    slow_copy = {"matmul_flops_per_s": 1e15, "copy_bytes_per_s": 1e3}
    assert _roofline.roofline(TINY, "bf16", slow_copy)["seconds"] == _roofline.least_bytes(TINY, "bf16") / 1e3


def test_gate_refuses_wrong_results(monkeypatch):
    right = {"loss": 1e-7, "dX": 1e-3, "dW": 1e-3}
    for wrong in (right | {"dW": 1e-2}, right | {"loss": math.nan}, {"failed": "no kernel"}):
        monkeypatch.setattr(kl_loss, "run_worker", lambda *_, wrong=wrong, **__: {"rows": {ON_CPU[0]: wrong}})
        with pytest.raises(SystemExit, match="correctness gate"):
            kl_loss.gate([ON_CPU[0]], "bf16", "cpu", 1)
    monkeypatch.setattr(kl_loss, "run_worker", lambda *_, **__: {"rows": {ON_CPU[0]: right}})
    kl_loss.gate([ON_CPU[0]], "bf16", "cpu", 1)


@pytest.mark.native
@pytest.mark.parametrize("case", ["small", "runs"])
def test_gather_rows_agree(case):
    """Every row's result is numpy's take; one wrong bit is an error above the bound."""
    bench = gather.BENCH
    inputs = bench.make_inputs(bench.cases["small"] | {"run": bench.cases[case]["run"]}, "cpu")
    for row in bench.rows:
        if row.key != "compile":
            result = row.build(inputs)()
            assert bench.error(inputs, result) <= bench.bound, row.label
    result.view(torch.int16)[3, 5] ^= 1
    assert bench.error(inputs, result) > bench.bound


@pytest.mark.native
def test_importance_rows_agree():
    """Every row's result is the float64 one; a channel that is off is an error above the bound."""
    bench = importance.BENCH
    x = bench.make_inputs(bench.cases["small"], "cpu")
    for row in bench.rows:
        if row.key != "compile":
            result = row.build(x)()
            assert bench.error(x, result) <= bench.bound, row.label
    result[97] *= 1.001
    assert bench.error(x, result) > bench.bound


@pytest.mark.native
def test_collector_takes_turns_on_one_model_and_tells_of_both(capsys):
    """As many forward passes as steps; the line's numbers are those of the pairs."""
    pytest.importorskip("transformers")
    result = importance.main(importance.BENCH, ["--quick", "--impl", "mean", "--threads", "1"])
    (row,) = result["collector"]["rows"]
    (samples,) = row["processes"]
    forward, step = samples["forward"], samples["step"]
    assert len(forward) == len(step) == row["wall_overhead"]["n"]
    shares = sorted(b[0] / a[0] - 1 for a, b in zip(forward, step, strict=True))
    assert row["wall_overhead"]["median"] == pytest.approx(shares[len(shares) // 2])
    fastest = min(wall for wall, _ in step) / min(wall for wall, _ in forward) - 1
    assert row["fastest_overhead"]["median"] == pytest.approx(fastest)
    assert f"{shares[len(shares) // 2]:.1%}" in capsys.readouterr().out
