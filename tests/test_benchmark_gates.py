"""Benchmarks end with an error where a result is wrong: gates are called, see what a row left, and what is
timed is the row. Rows are spoilt here, and workers run in this process.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tools.benchmark_scripts import FOLDER

if not FOLDER.is_dir():  # an sdist may be tested without it
    pytest.skip("no benchmarks folder here", allow_module_level=True)

from common import bandwidth as _bandwidth
from common import bandwidth_worker as _bandwidth_worker
from common import harness as _harness
from common.scripts import script
from kl_loss_rows import cases as _cases
from kl_loss_rows import worker as _worker
from kl_loss_rows.peers import IMPLEMENTATIONS

gather, importance, kl_loss = map(script, ("gather", "importance", "kl_loss"))


def in_this_process(work):
    """Stands in for run_worker(): `work` fails as a process would."""

    def run(script, spec, *, threads, timeout_s=None):
        try:
            return json.loads(json.dumps(work(json.loads(json.dumps(spec)))))
        except (Exception, SystemExit) as error:
            raise _harness.WorkerError(str(error)) from None

    return run


# ---- gather and importance: common/bandwidth.py


@pytest.fixture
def bandwidth(monkeypatch):
    """main() of a benchmark whose row `key` was replaced; tells what ended it, and which rows were timed."""

    def run(bench, key, build, ours=None):
        rows = tuple(
            replace(row, build=build, ours=row.ours if ours is None else ours) if row.key == key else row
            for row in bench.rows
        )
        spoilt = replace(bench, rows=rows, beside={})
        monkeypatch.setattr(_bandwidth_worker, "bench_of", lambda name: spoilt)
        monkeypatch.setattr(_bandwidth, "run_worker", in_this_process(_bandwidth_worker.measure))
        monkeypatch.setattr(_bandwidth_worker, "extra_peak_bytes", lambda call, device: (call(), None)[1])
        return _bandwidth.main(spoilt, ["--quick", "--impl", key])["runs"][0]["rows"][0]

    return run


def one_wrong_bit(x):
    right = gather._ours(x)

    def call():
        right().view(torch.int16)[-1, -1] ^= 1
        return x.out

    return call


def nothing(x):
    return lambda: x.out


def only_once(x):
    """Right the first two times, and does nothing from then on."""
    right, calls = gather._ours(x), []

    def call():
        calls.append(1)
        return right() if len(calls) < 3 else x.out

    return call


def one_wrong_channel(x):
    right = importance._ours("mean")(x)

    def call():
        scores = right()
        scores[1] *= 1.001
        return scores

    return call


def nan(x):
    return lambda: torch.full((x.shape[-1],), torch.nan)


def kept_scores(x):
    right, kept = importance._ours("mean")(x), []

    def call():
        kept.append(right() if not kept else kept[0])
        return kept[0]

    return call


WRONG = [
    (gather.BENCH, "ours", one_wrong_bit),
    (gather.BENCH, "ours", nothing),
    (gather.BENCH, "ours", only_once),
    (importance.BENCH, "mean", one_wrong_channel),
    (importance.BENCH, "mean", nan),
    (importance.BENCH, "mean", kept_scores),
]


@pytest.mark.native
@pytest.mark.parametrize(("bench", "key", "build"), WRONG)
def test_a_wrong_row_of_ours_ends_the_run(bandwidth, bench, key, build):
    with pytest.raises(SystemExit, match=f"{bench.row(key).label}: wrong: relative error") as ended:
        bandwidth(bench, key, build)
    assert isinstance(ended.value.code, str)  # which Python prints, and exits with 1


@pytest.mark.native
@pytest.mark.parametrize(("bench", "key", "build"), [WRONG[0], WRONG[3]])
def test_a_wrong_row_of_others_is_not_timed(bandwidth, bench, key, build):
    row = bandwidth(bench, key, build, ours=False)
    assert row["status"] == "failed" and "not timed" in row["reason"] and "ratio" not in row


@pytest.mark.native
def test_a_script_exits_with_an_error(tmp_path):
    """In a process of its own, as a user or the CI runs it."""
    shutil.copytree(FOLDER, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copytree(FOLDER.parent / "examples", tmp_path / "examples")
    script = tmp_path / "benchmarks/gather.py"
    right = "lambda: gather_channels(x.weight, rows, cols, out=x.out)"
    assert script.read_text().count(right) == 1
    script.write_text(script.read_text().replace(right, f"{right}.neg_()"))
    command = [sys.executable, str(script), "--quick", "--impl", "ours"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "minitron, out=: wrong: relative error" in done.stderr


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_floor_and_row_are_timed_as_what_they_are(monkeypatch):
    """A row that takes 8 ms beside a floor of 2 ms: samples, ratio and bytes say so; both are called."""
    calls = []

    def timed(name, seconds):
        return lambda _: lambda: (calls.append(name), burn(seconds))[0]

    bench = _bandwidth.Bench(
        name="toy",
        rows=(_bandwidth.Row("row", "a row", timed("row", 8e-3), ours=True),),
        cases={"one": {"n": 1}},
        default=("one",),
        make_inputs=lambda case, device: dict(case),
        floor=lambda x: {"burn": timed("floor", 2e-3)(x)},
        floor_label="burning",
        floor_bytes=lambda x: 5000,
        error=lambda x, result: 0.0,
        bound=0.0,
        poison=lambda x: calls.append("poison"),
    )
    monkeypatch.setattr(_bandwidth_worker, "bench_of", lambda name: bench)
    monkeypatch.setattr(_bandwidth, "run_worker", in_this_process(_bandwidth_worker.measure))
    run = _bandwidth.main(bench, ["--quick"])["runs"][0]
    (row,) = run["rows"]
    n = row["ratio"]["n"]
    assert 3 <= n <= 5 and row["error"] == 0.0 and run["bytes"] == 5000
    assert calls == ["poison", "row", "floor", "row", *["floor", "row"] * n, "poison", "row"]
    assert all(busy >= 8e-3 for _, busy in row["samples"]["call"])
    assert 2e-3 <= min(busy for _, busy in row["samples"]["floor"]) < 6e-3
    assert row["ratio"]["median"] > 1.5 and row["busy_s"]["median"] >= 8e-3
    assert f"{1e-9 * 5000 / row['busy_s']['median']:.3g}" in _bandwidth.table(run, _bandwidth.tables.aligned)


# ---- kl_loss


RIGHT = {"loss": 1e-7, "dX": 1e-4, "dW": 1e-4}
MEASURED = {"extra_peak_bytes": 0, "gradient_bytes": 0, "floor": [[1.0, 1.0]] * 2, "call": [[2.0, 2.0]] * 2}


@pytest.mark.native
@pytest.mark.parametrize("kind", ["far", "close"])
@pytest.mark.parametrize(
    "wrong", [RIGHT | {"dW": 1e-2}, RIGHT | {"loss": torch.nan}, {"failed": "no kernel"}]
)
def test_a_wrong_loss_ends_the_run(monkeypatch, kind, wrong):
    """Whichever row of the library's it is, at whichever of the two distances; nothing is timed."""
    asked = []

    def worker(script, spec, *, threads, timeout_s=None):
        asked.append(spec)
        if spec["work"] == "measure":
            return MEASURED
        spoilt = spec["case"]["name"] == "gate" and spec["kind"] == kind
        return {"kl": 1.0, "rows": {k: wrong if spoilt and k == "recompute" else RIGHT for k in spec["keys"]}}

    monkeypatch.setattr(kl_loss, "run_worker", worker)
    arguments = ["--shape", "8,8,8,32", "--dtype", "bf16", "--impl", "naive", "store", "recompute"]
    with pytest.raises(SystemExit, match="correctness gate: minitron, recompute"):
        kl_loss.main(arguments)
    assert all(spec["work"] == "errors" and spec["case"]["name"] == "gate" for spec in asked)
    assert asked[0]["keys"] == ["store", "recompute"]


@pytest.mark.native
def test_a_wrong_kernel_does_not_pass_the_gate(monkeypatch):
    """The real worker, with a loss whose gradient lacks one row."""

    row = IMPLEMENTATIONS["store"]

    def build():
        right = row.build()

        def loss(inputs):
            value = right(inputs)
            inputs.student_hidden.register_hook(lambda grad: grad * (torch.arange(len(grad)) > 0)[:, None])
            return value

        return loss

    monkeypatch.setitem(_worker.IMPLEMENTATIONS, "store", replace(row, build=build))
    monkeypatch.setattr(kl_loss, "run_worker", in_this_process(_worker.errors))
    kl_loss.gate(["recompute"], "fp32", "cpu", 1)
    with pytest.raises(SystemExit, match="store, fp32, far: relative error of dX is"):
        kl_loss.gate(["recompute", "store"], "fp32", "cpu", 1)


def measure_toy(monkeypatch, build):
    monkeypatch.setitem(_worker.IMPLEMENTATIONS, "naive", replace(IMPLEMENTATIONS["naive"], build=build))
    monkeypatch.setattr(_worker, "extra_peak_bytes", lambda call, device: (call(), 7)[1])
    case = _cases.Case("toy", 8, 8, 8, 32).to_dict()
    spec = {"case": case, "dtype": "fp32", "device": "cpu", "key": "naive", "budget_s": 0.0, "reps": (3, 3)}
    return _worker.measure(spec)


def test_what_is_timed_is_the_loss(monkeypatch):
    right, calls = IMPLEMENTATIONS["naive"].build(), []

    def build():
        return lambda inputs: (calls.append(inputs), burn(5e-3), right(inputs))[-1]

    got = measure_toy(monkeypatch, build)
    assert len(calls) == 1 + 1 + 3 and got["extra_peak_bytes"] == 7  # warm-up, memory, three in turns
    assert len(got["call"]) == len(got["floor"]) == 3
    assert all(busy >= 5e-3 for _, busy in got["call"])


@pytest.mark.parametrize("wrong", ["nan", "no head", "zeros", "drifts"])
def test_a_timed_loss_that_did_no_work_is_refused(monkeypatch, wrong):
    right, calls = IMPLEMENTATIONS["naive"].build(), []

    def loss(inputs):
        calls.append(1)
        if wrong == "nan":
            return right(inputs) * (torch.nan if len(calls) > 3 else 1.0)
        if wrong == "no head":
            return inputs.student_hidden.square().mean()
        if wrong == "zeros":
            return right(inputs) * 0.0
        return right(inputs) * len(calls)

    with pytest.raises(SystemExit, match="wrong: what was timed gave"):
        measure_toy(monkeypatch, lambda: loss)


@pytest.mark.parametrize("wrong", ["student_hidden", "student_head"])
def test_the_error_of_a_gradient_is_its_own(monkeypatch, wrong):
    """A gradient that is 10 % too large shows in its own column, and there alone."""
    right = IMPLEMENTATIONS["naive"].build()

    class TooLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.1

    def loss(inputs):
        return right(replace(inputs, **{wrong: TooLarge.apply(getattr(inputs, wrong))}))

    monkeypatch.setitem(
        _worker.IMPLEMENTATIONS, "naive", replace(IMPLEMENTATIONS["naive"], build=lambda: loss)
    )
    case = _cases.Case("toy", 8, 8, 8, 32).to_dict()
    spec = {"case": case, "dtype": "fp32", "device": "cpu", "kind": "far", "keys": ["naive"]}
    row = _worker.errors(spec)["rows"]["naive"]
    own, other = ("dX", "dW") if wrong == "student_hidden" else ("dW", "dX")
    assert row[own] == pytest.approx(0.1, rel=1e-3) and row[other] < 1e-4


# ---- checkpoint


@pytest.fixture
def checkpoint_run(monkeypatch, tmp_path):
    """measure() of a checkpoint of two small layers; spoil(row, folder of the result, timed) may harm it."""
    pytest.importorskip("safetensors")
    pytest.importorskip("transformers")
    import checkpoint
    from checkpoint_rows import worker as _checkpoint_worker

    shape = {"hidden": 128, "mlp": 256, "heads": 2, "kv_heads": 1, "head_dim": 64, "vocab": 512}
    monkeypatch.setattr(checkpoint, "QUICK", shape)
    monkeypatch.setattr(checkpoint, "TARGETS", {128: (64, 192)})

    def run(spoil=lambda row, folder, timed: None, rows=("prune", "load")):
        timed = []

        def worker(spec):
            row, harmed = spec["work"], _checkpoint_worker.WORK[spec["work"]]

            def work(folder, threads):
                harmed[0](folder, threads)
                spoil(row, folder / harmed[2], "cache" in spec)

            timed.append(row) if "cache" in spec else None
            with monkeypatch.context() as patch:
                patch.setitem(_checkpoint_worker.WORK, row, (work, *harmed[1:]))
                return _checkpoint_worker.main(spec)

        monkeypatch.setattr(checkpoint, "run_worker", in_this_process(worker))
        args = checkpoint.parse_args(["--quick", "--threads", "1", "--row", *rows])
        args.gb = 1e-3
        return checkpoint.measure(tmp_path, args), timed

    return run


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


def spoil_one_element(tensors):
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensor[-1, -1] += 1


def test_checkpoints_that_are_right_are_timed(checkpoint_run):
    result, timed = checkpoint_run()
    assert timed == ["cp", "loop_fsync", "loop", "prune", "load"] * 2
    samples = result["runs"][0]["samples"]
    for row in ("prune", "cp", "loop_fsync", "loop"):
        assert {sample["bytes"] for sample in samples[row]} == {result["kept_bytes"]}


def test_a_checkpoint_faster_than_its_floor_is_marked(checkpoint_run):
    import checkpoint

    result, _ = checkpoint_run(rows=("prune",))
    for seconds, marked in ((0.5, True), (1.0, False)):
        samples = {
            row: [{**s, "wall_s": 1.0} for s in got] for row, got in result["runs"][0]["samples"].items()
        }
        samples["prune"] = [{**sample, "wall_s": seconds} for sample in samples["prune"]]
        samples["loop"] = [
            {**sample, "wall_s": 0.1} for sample in samples["loop"]
        ]  # a floor itself: no fault
        run = result["runs"][0] | {"samples": samples, "rows": checkpoint.summaries(samples)}
        drawn = checkpoint.table(result, run, checkpoint.tables.aligned)
        assert drawn.count("†") == (2 if marked else 0), drawn


@pytest.mark.parametrize("row", ["prune", "load"])
@pytest.mark.parametrize("change", [spoil_one_element, lambda tensors: tensors.pop(next(iter(tensors)))])
def test_a_wrong_checkpoint_ends_the_run(checkpoint_run, row, change):
    with pytest.raises(SystemExit, match=r"correctness gate: .*Wrong results are not timed"):
        checkpoint_run(lambda which, folder, timed: which == row and rewrite(folder, change))


@pytest.mark.parametrize("row", ["cp", "prune"])
def test_a_timed_call_that_writes_less_ends_the_run(checkpoint_run, row):
    def lose(which, folder, timed):
        if timed and which == row:
            rewrite(folder, lambda tensors: tensors.pop(next(iter(tensors))))

    with pytest.raises(SystemExit, match="bytes in a timed call"):
        checkpoint_run(lose, rows=("prune",))
