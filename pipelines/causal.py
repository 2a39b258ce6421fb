"""One guidance pass of one causal stream: its cache, the fixed tensors that a step reads, and where there is a GPU its graphs.

A step (`backbone.predict`) reads and writes nothing but weights, the condition, the cache and the static inputs, all of which
stay where they are, so that the launches of one step can be recorded as a CUDA graph and replayed for every later chunk that
takes the same slots of the ring (`cache.phase`). What differs between chunks is copied into place before the step.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_ops.conditions.arguments import PER_FRAME
from dit_ops.pipelines.transfer import give_back, take_stream

Step = Callable[[], Tensor]
Recorded = tuple[Callable[[], None], Tensor]  # replay, and the tensor that every replay fills
Capture = Callable[[Step], Recorded]
_CAPTURING = threading.Lock()  # a process records one graph at a time


class CausalPass:
    """Flow predictions `[rows, F, Cz, h, w]` of chunk after chunk; rows = B, or 2B for batched guidance.

    condition   arguments of the backbone, [rows, …]; what is not of single frames must stay the same tensor objects
    cache       of the backbone, for these rows
    capture     records a step; None: every step is launched anew. A step of a full ring is launched the first time that its
                phase is met, which compiles and tunes what it needs, recorded the second time, and replayed from then on. The
                thread that records it has launched it before: libraries keep handles and plans per thread
    """

    def __init__(self, backbone: Any, condition: Mapping[str, Tensor], cache: Any, capture: Capture | None = None) -> None:
        self.backbone, self.cache, self.capture = backbone, cache, capture
        self.per_frame = {name: value for name, value in condition.items() if name in PER_FRAME}
        self.whole = {name: value for name, value in condition.items() if name not in PER_FRAME}
        self.rows = len(next(iter(condition.values())))
        self.inputs: dict[int, dict[str, Tensor]] = {}  # by frames of a chunk
        self.steps: dict[Hashable, Recorded | int] = {}  # int: the thread that has launched it
        self._chunk = (0, 0)
        self._filled: set[str] = set()  # inputs that hold what belongs to this chunk

    def __call__(self, x: Tensor, t: float, first: int, given: Mapping[str, Tensor], *, keys_only: bool = False) -> Tensor:
        """Flow of x at timestep t; x and the tensors of `given` are [B, F, …] of frames [first, first + F).

        keys_only: a clean result, whose keys and values the cache is to keep; returns an empty tensor
        """
        frames = x.shape[1]
        inputs = self._fill(x, t, first, given)
        if keys_only:
            inputs.pop("action", None)  # teacher forcing was trained with the labels of noisy frames alone
        step = lambda: self.backbone.predict(**inputs, **self.whole, cache=self.cache, keys_only=keys_only)
        flow = self._run(step, (self.cache.phase, frames, keys_only))
        self.cache.commit()
        return flow

    def _run(self, step: Step, key: Hashable) -> Tensor:
        if self.capture is None or not self.cache.full:
            return step()
        recorded, thread = self.steps.get(key), threading.get_ident()
        if recorded is None or (isinstance(recorded, int) and recorded != thread):
            self.steps[key] = thread
            return step()
        if isinstance(recorded, int):
            recorded = self.steps[key] = self.capture(step)
        replay, flow = recorded
        replay()
        return flow.clone()  # the next replay writes there again, and a solver may keep its history

    def _fill(self, x: Tensor, t: float, first: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The static inputs, holding the arguments of this step."""
        frames = x.shape[1]
        inputs = self.inputs.setdefault(frames, {})
        if "latents" not in inputs:
            inputs["latents"] = x.new_empty(self.rows, *x.shape[1:], dtype=self.backbone.dtype)
            inputs["timestep"] = x.new_empty(self.rows, dtype=torch.float32)
        is_new = self._chunk != (first, first + frames)
        if is_new:
            self._chunk, self._filled = (first, first + frames), set()
        chunk = {name: value[:, first : first + frames] for name, value in self.per_frame.items()} | dict(given)
        for name in chunk.keys() - self._filled:
            value = chunk[name]
            if name not in inputs:
                inputs[name] = value.new_empty(self.rows, *value.shape[1:])
            _copy(inputs[name], value)
            self._filled.add(name)
        _copy(inputs["latents"], x)
        inputs["timestep"].fill_(t)
        if is_new:
            cameras = {name: inputs[name] for name in ("viewmats", "Ks") if name in inputs}
            self.backbone.announce(self.cache, first, frames, *x.shape[3:], **cameras)
        return dict(inputs)


def _copy(rows: Tensor, value: Tensor) -> None:
    """value [B, …] into rows [B or 2B, …], for each half."""
    rows.unflatten(0, (-1, len(value))).copy_(value)


def capture_of(backbone: Any, windowed: bool) -> Capture | None:
    """How the steps of a model are recorded; None where they cannot be.

    Without a window every chunk has more keys. The exchanges of several ranks and the copies of offloaded weights are not
    work of one stream.
    """
    alone = backbone.sequence_parallel is None and not backbone.offloaded
    return CudaGraphs(backbone.device) if windowed and alone and backbone.device.type == "cuda" else None


class CudaGraphs:
    """Records steps as CUDA graphs, which share one pool of memory: they run one after the other, and their flows stay.

    They are recorded on a stream that nothing else uses until all of them are gone: graphs of one stream have its cuBLAS
    workspace in common, and in torch 2.13 the end of one frees it for all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.graph_pool_handle(), take_stream(device, "capture")
        self.graphs: list[torch.cuda.CUDAGraph] = []
        weakref.finalize(self, _end, self.graphs, self.stream, device).atexit = False

    def __call__(self, step: Step) -> Recorded:
        with _CAPTURING, torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            # other threads, which decode meanwhile, may allocate while this one captures;
            # the random state that all graphs of a process share must not be of inference tensors
            recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
            with torch.inference_mode(False), recording, torch.inference_mode():
                flow = step()
        self.graphs.append(graph)
        return partial(self._replay, len(self.graphs) - 1), flow

    def _replay(self, i: int) -> None:
        self.graphs[i].replay()


def _end(graphs: list[torch.cuda.CUDAGraph], stream: torch.cuda.Stream, device: torch.device) -> None:
    graphs.clear()
    give_back(stream, device, "capture")
