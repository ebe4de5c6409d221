"""Native code lets other Python threads run: what one op computes costs the others nothing."""

import ctypes
import sys
import threading
import time

import pytest
import torch

import minitron_kernels as mk
from kl_loss.problems import make_linear

pytestmark = pytest.mark.native
OPS = torch.ops.minitron_kernels


class Counter:
    """A thread that counts; it comes to run only when another lets it.

    The interpreter's own turns are put off for good, so that the count stands still unless the thread that
    runs lets go of the interpreter by itself.
    """

    def __enter__(self):
        self.count, self._done = 0, False
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(1e6)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self):
        while not self._done:
            self.count += 1
            time.sleep(0)  # lets the other thread take over

    def __exit__(self, *_):
        self._done = True
        sys.setswitchinterval(self._interval)
        self._thread.join()

    def runs_during(self, call, turns):
        """Whether it counts while `call` runs, in one of so many turns."""
        for _ in range(turns):
            before = self.count
            call()
            if self.count > before:
                return True
        return False


def test_the_counter_tells_who_lets_go():
    """Of the same sleep of 5 ms, once with the interpreter held and once without."""
    with Counter() as counter:
        assert not counter.runs_during(lambda: ctypes.PyDLL(None).usleep(5000), turns=10)
        assert counter.runs_during(lambda: ctypes.CDLL(None).usleep(5000), turns=1000)


def loss_calls():
    """Calls whose native part takes milliseconds."""
    hidden, head, *teacher = make_linear(128, 64, 64, 4096, torch.float32)
    hidden.requires_grad_(), head.requires_grad_()
    logits, other = (torch.randn(64, 8192) for _ in range(2))
    logits.requires_grad_()
    ids = torch.arange(4).expand(128, 4)
    log_p, tail = torch.full((128, 4), 0.2).log(), torch.full((128,), 0.2).log()
    x, weight, keep = torch.randn(4, 256, 2048), torch.randn(1024, 4096), torch.arange(0, 4096, 2)
    state, index = mk.ImportanceState(2048), mk.ChannelIndex(keep, 4096)
    layers = mk.TokenMeanState(1)
    return {
        ("linear_kl_loss_cpu_", "kl_scale_grad_"): lambda: (
            3 * mk.linear_kl_loss(hidden, head, *teacher)
        ).backward(),
        ("linear_sparse_kl_loss_cpu_",): lambda: mk.linear_sparse_kl_loss(hidden, head, ids, log_p, tail),
        ("kl_loss_forward", "kl_loss_backward"): lambda: mk.kl_loss(logits, other).backward(),
        ("importance_accumulate_",): lambda: mk.accumulate_importance_(state, x),
        ("importance_rows",): lambda: mk.accumulate_block_importance_(layers, 0, x, x),
        ("gather_channels_",): lambda: mk.gather_channels(weight, None, index),
    }


def test_native_code_lets_other_threads_run(monkeypatch):
    with Counter() as counter:
        for names, call in loss_calls().items():
            moved = dict.fromkeys(names, False)

            def watch(name, moved=moved):
                native = getattr(OPS, name)

                def watched(*args):
                    before = counter.count
                    result = native(*args)
                    moved[name] |= counter.count > before
                    return result

                watched.default = watched
                monkeypatch.setattr(OPS, name, watched)

            for name in names:
                watch(name)
            for _ in range(1000):
                call()
                if all(moved.values()):
                    break
            assert all(moved.values()), moved
