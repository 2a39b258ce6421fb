"""A stand-in for a pipeline that streams, and a real web server around it in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_ops.pipelines.settings import Settings
from dit_ops.play.engine import Limits
from dit_ops.play.server import new_server


class ToyPipeline:
    """Two frames per pose step of noise that needs no network; counts the streams that are open."""

    def __init__(self, height: int = 32, width: int = 48, seconds: float = 0.0, length: int | None = None) -> None:
        self.settings = Settings(height=height, width=width, fps=16)
        self.seconds, self.length = seconds, length
        self.opened = self.closed = self.chunks = 0
        self.threads: set[str] = set()
        self.poses: list[str] = []

    def stream(self, prompt: str, *, pose: Iterator[str], seed: int, **options: Any) -> Iterator[Tensor]:
        self.threads.add(threading.current_thread().name)
        self.opened += 1
        try:
            if prompt == "refused":
                raise ValueError("prompt must be\nsomething else")
            while self.length is None or self.chunks < self.length:
                time.sleep(self.seconds)
                self.poses += [next(pose), next(pose)]
                self.chunks += 1
                generator = torch.Generator().manual_seed(seed + self.chunks)
                yield torch.rand(1, 4, 3, self.settings.height, self.settings.width, generator=generator) * 2 - 1
        finally:
            self.closed += 1


@dataclass
class Address:
    host: str
    port: int
    url: str
    server: Any

    @property
    def origin(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def query(self) -> str:
        return self.url.partition("/?")[2]

    @property
    def ws(self) -> str:
        return f"ws://{self.host}:{self.port}/ws?{self.query}"


@contextmanager
def running(pipeline: Any, limits: Limits | None = None, host: str = "127.0.0.1", **options: Any) -> Iterator[Address]:
    server, listening, url = new_server(pipeline, host, 0, limits=limits, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Address("127.0.0.1", listening.getsockname()[1], url, server)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for a condition; fails when it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
