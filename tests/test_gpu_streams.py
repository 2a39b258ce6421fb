"""Which device and which CUDA stream work goes to, and copies to a GPU, seen by stand-ins for what torch has on one only."""

import contextlib
import threading
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_graphs import chunk_at, of_pass
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_ops import _library as lib
from dit_ops.pipelines import request, transfer
from dit_ops.pipelines.cameras import CameraPath
from dit_ops.pipelines.causal import CudaGraphs
from dit_ops.pipelines.settings import Settings
from dit_ops.pipelines.transfer import give_back, take_stream, to_device

ONE = torch.device("cuda", 1)


class Graph:
    """Its device, and replay."""


class Cuda:
    """A machine with two GPUs: the current device, and what was recorded where."""

    def __init__(self) -> None:
        self.current, self.made, self.recorded, self.replayed = 0, 0, [], []

    def device(self, device):
        return self.at(torch.device("cuda", device).index if isinstance(device, int) else device.index)

    @contextlib.contextmanager
    def at(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def new_stream(self, device):
        self.made += 1
        return f"stream {self.made} of {device.index}"

    def new_graph(self):
        graph, number = Graph(), len(self.recorded)
        graph.device, graph.replay = self.current, lambda: self.replayed.append(number)
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, *, capture_error_mode):
        assert capture_error_mode == "thread_local" and not torch.is_inference_mode_enabled()
        self.recorded.append((graph.device, pool, stream))
        yield


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()
    pools = iter(range(100))
    stand_ins = {"device": cuda.device, "current_device": lambda: cuda.current, "Stream": cuda.new_stream, "graph": cuda.graph}
    stand_ins |= {"graph_pool_handle": lambda: next(pools), "CUDAGraph": cuda.new_graph}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(transfer, "_idle", defaultdict(list))
    return cuda


def test_a_stream_that_was_given_back_is_taken_again(cuda):
    wanted = [(torch.device("cuda", i), use) for i in (0, 1) for use in ("denoise", "decode")]
    first, second = ([take_stream(*each) for each in wanted] for _ in range(2))
    assert len({*first, *second}) == 8
    for stream, each in zip(first, wanted, strict=True):
        give_back(stream, *each)
    assert [take_stream(*each) for each in wanted] == first
    assert take_stream(*wanted[0]) not in (*first, *second)


def test_graphs_of_one_video_are_recorded_on_their_device_and_on_a_stream_of_their_own(cuda):
    capture, other = CudaGraphs(ONE), CudaGraphs(ONE)
    found = []
    step = lambda: found.append((cuda.current, torch.is_inference_mode_enabled()))
    with torch.inference_mode():
        replays = [each(step)[0] for each in (capture, capture, other)]
    assert found == [(1, True)] * 3 and cuda.current == 0
    assert cuda.recorded == [(1, 0, "stream 1 of 1"), (1, 0, "stream 1 of 1"), (1, 1, "stream 2 of 1")]
    for replay in replays:
        replay()
    assert cuda.replayed == [0, 1, 2]
    graphs = [weakref.ref(graph) for graph in capture.graphs]
    del capture, replay, replays[0]
    assert graphs[0]() is not None and CudaGraphs(ONE).stream == "stream 3 of 1"  # one graph is left
    del replays[0]
    assert [graph() for graph in graphs] == [None, None]
    assert CudaGraphs(ONE).stream == "stream 1 of 1"


def test_a_step_is_recorded_by_a_thread_that_has_launched_it():
    recorded = []
    capture = lambda step: recorded.append(threading.get_ident()) or (lambda: None, step())
    a_pass, (x, given) = of_pass(window=2, capture=capture), chunk_at(0)
    call = lambda: a_pass(x, 900.0, 0, given)
    with ThreadPoolExecutor(1) as other:
        call(), other.submit(call).result()
        assert recorded == []
        other.submit(call).result(), call()
    assert len(recorded) == 1 and recorded != [threading.get_ident()]


@pytest.mark.parametrize("current", [0, 1])
def test_a_triton_kernel_is_launched_on_the_device_of_its_tensors(current, cuda, monkeypatch):
    cuda.current = current
    launched = []
    module = SimpleNamespace(launch=lambda *args: launched.append(cuda.current))
    monkeypatch.setattr(lib.importlib, "import_module", lambda name: module)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    launch = lib.kernel("triton", "any", "launch")
    launch(x, 1), launch(3, None, x, 2.0), launch([x, x], [x], 0.5), launch([(x, x)], x)
    assert launched == [1] * 4 and cuda.current == current
    launch(torch.ones(2))  # the interpreter's are on the CPU
    assert launched[-1] == current


def test_tensors_that_were_expanded_go_through_pinned_memory(monkeypatch):
    def pin_memory(self):
        """As torch's: memory of the same strides, written tensor by tensor."""
        pinned.append(torch.empty(0, dtype=self.dtype).set_(torch.UntypedStorage(self.nbytes), 0, self.shape, self.stride()))
        return pinned[-1].copy_(self)

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    meta, rows = torch.device("meta"), torch.arange(3.0).expand(4, 3)
    assert to_device(rows, meta).is_meta and torch.equal(pinned[-1], rows)
    for pose in ("w*3", ["w*3", "a*3"]):
        path = CameraPath(*request._cameras(pose, 2, None, Settings()), meta)
        assert path.of(0, 4)[1].shape == (2, 4, 3, 3)
    path = CameraPath.from_pieces(iter(["w*1"]), 2, Settings().intrinsics, meta)
    assert path.ready(2) == 2
