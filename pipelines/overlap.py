"""Decoding beside denoising: a chunk is decoded by a thread of its own while the next chunk is made.

Denoising stays in the thread that asks for the video, and so do the reading of poses and the recording of graphs; the bits are
those of one after the other. On a GPU both have a CUDA stream of their own: the caller's stream waits for decoded pixels alone,
so that taking a chunk to the host does not wait for the next one, which is queued already.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dit_ops.pipelines import stages
from dit_ops.pipelines.request import State
from dit_ops.pipelines.transfer import give_back, take_stream

Pending = Future[tuple[Tensor, torch.cuda.Event | None]]  # pixels, and on a GPU the event after them


def decode_beside(state: State, condition: Any, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """As stages.decode. The first chunk is shown at once, a later one when the next is made, so one chunk is made ahead."""
    denoiser, decoder = Denoiser(state, chunks), Decoder(state, condition)
    waiting: Pending | None = None
    failure: Exception | None = None
    first = True
    try:
        while True:
            try:
                made = denoiser.next_chunk()
            except (ValueError, RuntimeError) as error:  # the chunk before it is shown all the same
                made, failure = None, error
            ahead = None if made is None else decoder.submit(*made)
            if waiting is not None:
                yield decoder.take(waiting)
            if failure is not None:
                raise failure
            if ahead is None:
                return
            waiting = ahead
            if first:
                yield decoder.take(waiting)
                waiting, first = None, False
    finally:
        decoder.close()
        denoiser.close()


class Denoiser:
    """Latents of chunk after chunk, on a GPU in a stream of its own."""

    def __init__(self, state: State, chunks: Iterator[Tensor]) -> None:
        self.state, self.chunks = state, chunks
        self.stream = take_stream(state.device, "denoise") if state.device.type == "cuda" else None
        self.made: torch.cuda.Event | None = None

    def next_chunk(self) -> tuple[Tensor, torch.cuda.Event | None] | None:
        """Latents, and on a GPU the event after them; None behind the last chunk."""
        if self.stream is None:
            latents = next(self.chunks, None)
            return None if latents is None else (latents, None)
        if self.made is not None and self.state.poses_come:
            self.made.synchronize()  # poses are read when the chunk before is made, not when it is queued
        self.stream.wait_stream(torch.cuda.current_stream(self.state.device))
        with torch.cuda.stream(self.stream):
            latents = next(self.chunks, None)
            self.made = self.stream.record_event()
        return None if latents is None else (latents, self.made)

    def close(self) -> None:
        """What the caller's stream allocates from now on is not used by a chunk that nobody will see."""
        if self.stream is not None:
            torch.cuda.current_stream(self.state.device).wait_stream(self.stream)
            give_back(self.stream, self.state.device, "denoise")


class Decoder:
    """A thread that decodes the chunks of one stream in order."""

    def __init__(self, state: State, condition: Any) -> None:
        self.state = state
        self.stream = take_stream(state.device, "decode") if state.device.type == "cuda" else None
        self.latents: Tensor | None = None  # of the chunk whose turn it is
        self.pixels = stages.decode(state, condition, self._given())
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="decode")

    def submit(self, latents: Tensor, made: torch.cuda.Event | None) -> Pending:
        """Begins with a chunk, whose latents are there after an event."""
        if self.stream is not None:
            latents.record_stream(self.stream)
        return self.pool.submit(self._decode, latents, made)

    def take(self, waiting: Pending) -> Tensor:
        """The pixels of a chunk, for the current stream."""
        pixels, done = waiting.result()
        if done is not None and pixels.is_cuda:
            here = torch.cuda.current_stream(pixels.device)
            here.wait_event(done)
            pixels.record_stream(here)
        return pixels

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.pixels.close()
        if self.stream is not None:
            give_back(self.stream, self.state.device, "decode")

    def _given(self) -> Iterator[Any]:
        while True:
            yield self.latents

    def _decode(self, latents: Tensor, made: torch.cuda.Event | None) -> tuple[Tensor, torch.cuda.Event | None]:
        self.latents = latents
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            if self.stream is None or made is None:
                return next(self.pixels), None
            self.stream.wait_event(made)
            return next(self.pixels), self.stream.record_event()
