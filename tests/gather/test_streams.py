"""What a ChannelIndex asks of CUDA's streams: a stand-in for torch.cuda notes every call, without a GPU."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from minitron_kernels.ops.gather import index as module
from minitron_kernels.ops.gather.index import ChannelIndex

GPU = torch.device("cuda:0")


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on the GPU; copies and recorded streams are noted."""

    log: ClassVar[list[str]] = []
    device = GPU

    @staticmethod
    def of(x):
        return x.detach().as_subclass(OnGpu)

    def detach(self):
        return self

    def contiguous(self):
        return self

    def to(self, *args, **options):
        plain = self.as_subclass(torch.Tensor)
        if args[0] == "cpu":
            self.log.append("to host, waits")
            return plain.clone()
        self.log.append(f"copy on the device, {Cuda.stream}")
        return OnGpu.of(plain.to(torch.int64, copy=True))

    def record_stream(self, stream):
        self.log.append(f"record {stream.cuda_stream}")


class Cuda:
    stream, capturing = 1, False

    @staticmethod
    def current_stream(device):
        assert device == GPU
        return SimpleNamespace(cuda_stream=Cuda.stream)

    @staticmethod
    def is_current_stream_capturing():
        return Cuda.capturing


@pytest.fixture
def log(monkeypatch):
    """The calls, in their order; and a copy to the GPU that notes whether it waits."""

    class Values(torch.Tensor):
        def to(self, device, *rest, **options):
            assert not rest and not options.get("non_blocking")
            calls.append(f"copy to {device}, {Cuda.stream}")
            return OnGpu.of(self.as_subclass(torch.Tensor).clone())

    calls = []
    monkeypatch.setattr(OnGpu, "log", calls)
    monkeypatch.setattr(Cuda, "stream", 1)
    monkeypatch.setattr(Cuda, "capturing", False)
    for name in ("current_stream", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(Cuda, name))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(module, "check_index_tensor", lambda name, keep: None)
    calls_of = SimpleNamespace(calls=calls, cpu=lambda x: x.as_subclass(Values))
    return calls_of


def test_an_index_from_the_gpu_is_there_before_the_host_goes_on(log):
    """The copy that is kept comes before the one that the host waits for, on the same stream."""
    index = ChannelIndex(OnGpu.of(torch.tensor([4, 1, 3])), 6)
    assert log.calls == ["copy on the device, 1", "to host, waits"]
    assert type(index.values) is torch.Tensor and index.values.tolist() == [4, 1, 3]
    assert index.on(GPU).tolist() == [4, 1, 3]


def test_each_stream_is_recorded_once(log):
    index = ChannelIndex(OnGpu.of(torch.tensor([4, 5, 2, 3])), 6)
    log.calls.clear()
    for stream in (1, 2, 2, 1, 3):
        Cuda.stream = stream
        index.on(GPU)
    assert log.calls == ["record 1", "record 2", "record 3"]


def test_an_index_from_the_host_is_copied_once_and_waited_for(log):
    index = ChannelIndex(torch.tensor([4, 5, 2, 3]), 6)
    index.values = log.cpu(index.values)
    for stream in (1, 2):
        Cuda.stream = stream
        index.on(GPU)
    assert log.calls == ["copy to cuda:0, 1", "record 1", "record 2"]


def test_a_capture_uses_what_is_there_and_makes_nothing(log):
    """No copy, and nothing recorded: the graph may be replayed on any stream, later."""
    index = ChannelIndex(torch.tensor([4, 5, 2, 3]), 6)
    index.values = log.cpu(index.values)
    Cuda.capturing = True
    with pytest.raises(RuntimeError, match=r"no copy on cuda:0 yet.*make the same call once before"):
        index.on(GPU)
    with pytest.raises(RuntimeError, match="keep cannot be checked while a CUDA graph is captured"):
        ChannelIndex(OnGpu.of(torch.tensor([1])), 6)
    assert log.calls == []
    Cuda.capturing = False
    kept = index.on(GPU)
    log.calls.clear()
    Cuda.capturing, Cuda.stream = True, 7
    assert index.on(GPU) is kept
    assert log.calls == []
    with pytest.raises(RuntimeError, match="no copy"):  # of blocks of two there is none
        index.on(GPU, 2)
