"""A stand-in for a pipeline that streams, a real web server around it in a thread of this process, a page without a browser."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from dit_ops.pipelines.settings import Settings
from dit_ops.play.engine import Limits
from dit_ops.play.server import new_server

START = json.dumps({"type": "start", "prompt": "a red room", "seed": 3})


class ToyPipeline:
    """Two frames per pose step of noise that needs no network, none of the start pose; counts the streams that are open."""

    backbone = SimpleNamespace(device=torch.device("cpu"))
    condition = SimpleNamespace(latent_frames=lambda pixel_frames: 1 + pixel_frames // 2)

    def __init__(self, height: int = 32, width: int = 48, seconds: float = 0.0, length: int | None = None) -> None:
        self.settings = Settings(height=height, width=width, fps=16)
        self.seconds, self.length = seconds, length
        self.network_steps = 1  # of a chunk
        self.opened = self.closed = self.chunks = self.steps = 0
        self.threads: set[str] = set()

    def stream(
        self,
        prompt: str,
        *,
        pose: Iterator[str],
        seed: int,
        on_step: Callable[[int, int], None],
        overlap: bool = False,
        **options: Any,
    ) -> Iterator[Tensor]:
        self.threads.add(threading.current_thread().name)
        self.opened += 1
        try:
            if prompt == "refused":
                raise ValueError("prompt must be\nsomething else")
            if overlap:  # poses are read a chunk early
                next(pose), next(pose)
            while self.length is None or self.chunks < self.length:
                next(pose), next(pose)
                for _ in range(self.network_steps):
                    time.sleep(self.seconds)
                    self.steps += 1
                    on_step(self.steps, 0)
                self.chunks += 1
                yield self.pixels(seed, self.chunks)
        finally:
            self.closed += 1

    def pixels(self, seed: int, chunk: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + chunk)
        return torch.rand(1, 4, 3, self.settings.height, self.settings.width, generator=generator) * 2 - 1


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
def running(
    pipeline: Any, limits: Limits | None = None, host: str = "127.0.0.1", port: int = 0, **options: Any
) -> Iterator[Address]:
    server, listening, url = new_server(pipeline, host, port, limits=limits, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
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


class Page:
    """What the page does, without a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.frames: list[bytes] = []
        self.messages: list[dict] = []

    def send(self, kind: str, **content) -> None:
        self.socket.send(json.dumps({"type": kind, **content}))

    def receive(self, kind: str) -> dict:
        """The next message of a kind; frames on the way are shown."""
        while True:
            message = self.socket.recv(timeout=10)
            if isinstance(message, bytes):
                self.frames.append(message)
                self.send("shown", frame=len(self.frames))
            else:
                self.messages.append(json.loads(message))
                if self.messages[-1]["type"] == kind:
                    return self.messages[-1]

    def chunk(self) -> dict:
        """The next chunk with its frames."""
        chunk = self.receive("chunk")
        for _ in range(chunk["frames"]):
            self.frames.append(self.socket.recv(timeout=10))
        self.send("shown", frame=len(self.frames))
        return chunk

    def start(self) -> str:
        self.socket.send(START)
        self.frames.clear()
        return self.receive("started")["session"]

    def vanish(self) -> None:
        self.socket.socket.shutdown(socket.SHUT_RDWR)
        self.socket.recv_events_thread.join(5)


@contextmanager
def page(address: Address, width: int = 48, height: int = 32, fps: float = 16.0) -> Iterator[Page]:
    with connect(address.ws, origin=address.origin, compression=None, close_timeout=2) as connection:
        client = Page(connection)
        hello = client.receive("hello")
        assert hello == {"type": "hello", "fps": fps, "prompt": hello["prompt"], "width": width, "height": height}
        yield client


def get(address: Address, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return content
