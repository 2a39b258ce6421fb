"""One connected page: a receiver, a sender with a bounded queue, and while it plays a task that asks the model for chunks.

Any of them ending ends the connection. A stream is stopped by cancelling its task: the generator is then closed on the model's
thread behind the network step that is being computed, and only after that the next client has its turn.
"""

import asyncio
import json
import logging
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from dit_ops.play.engine import Engine
from dit_ops.play.protocol import Keys, Shown, Start, parse
from dit_ops.play.stream import Chunk, Stream

log = logging.getLogger(__name__)


class _Stalled(Exception):
    """The page shows no more frames."""


class Client:
    """`run` returns when the page has gone or was dropped; nothing of it is left then."""

    def __init__(self, socket: WebSocket, engine: Engine) -> None:
        self.socket, self.engine = socket, engine
        self.out: asyncio.Queue[str | bytes | None] = asyncio.Queue(engine.limits.queue)  # None: the end
        self.stream: Stream | None = None
        self.playing: asyncio.Task[None] | None = None
        self.shown = 0
        self.progress = asyncio.Event()  # `shown` has grown

    async def run(self) -> None:
        tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("the connection of a client failed", exc_info=result)
            await self._stop()
            self._forget()

    async def tell(self, kind: str, **content: Any) -> None:
        await self.out.put(json.dumps({"type": kind, **content}))

    async def _send(self) -> None:
        loop, sender = asyncio.get_running_loop(), asyncio.current_task()
        assert sender is not None
        while (message := await self.out.get()) is not None:
            late = loop.call_later(self.engine.limits.stall_seconds, sender.cancel)
            try:
                await (self.socket.send_text(message) if isinstance(message, str) else self.socket.send_bytes(message))
            except (WebSocketDisconnect, RuntimeError):  # RuntimeError: the socket is closed already
                return
            finally:
                late.cancel()

    async def _receive(self) -> None:
        while (event := await self.socket.receive())["type"] == "websocket.receive":
            try:
                await self._obey(event.get("text"))
            except ValueError as error:
                await self.tell("error", message=str(error))

    async def _obey(self, text: str | None) -> None:
        if text is None:
            raise ValueError("a message must be a text with JSON, got bytes")
        message = parse(text)
        if isinstance(message, Start):
            await self._stop()
            self.playing = asyncio.create_task(self._play(message))
            self.playing.add_done_callback(self._played)
        elif isinstance(message, Keys):
            if self.stream is not None:
                self.stream.steering.press(message.down, message.number)
        elif isinstance(message, Shown):
            made = 0 if self.stream is None else self.stream.sent
            if not self.shown <= message.frame <= made:
                raise ValueError(f"shown: frame must be from {self.shown} to the {made} sent so far, got {message.frame}")
            if message.frame > self.shown:
                self.shown = message.frame
                self.progress.set()
        else:
            await self._stop()

    async def _play(self, start: Start) -> None:
        engine = self.engine
        async with engine.turn(self._wait):
            self._forget()
            stream = self.stream = engine.new_stream(start.prompt, start.seed)
            engine.streams[stream.name] = stream
            self.shown = 0
            await self.tell("started", session=stream.name)
            try:
                await self._produce(stream)
            finally:
                stream.stop()
                await asyncio.shield(asyncio.ensure_future(engine.on_model(stream.close)))

    def _wait(self, ahead: int) -> None:
        with suppress(asyncio.QueueFull):  # a page that takes no data need not know
            self.out.put_nowait(json.dumps({"type": "waiting", "ahead": ahead}))

    async def _produce(self, stream: Stream) -> None:
        """Chunk after chunk: the model computes one while the frames of the one before are encoded and sent."""
        ahead = self.engine.limits.ahead_seconds * self.engine.settings.fps
        sending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sending.set_result(None)
        try:
            while True:
                while stream.frames - self.shown > ahead:
                    await (self._shown_more() if sending.done() else sending)
                chunk = await self.engine.on_model(stream.next_chunk)
                await sending
                if chunk is None:
                    break
                sending = asyncio.create_task(self._deliver(stream, chunk))
        except _Stalled as error:
            await self.tell("error", message=str(error))
            await self.out.put(None)
            return
        except (ValueError, RuntimeError, OSError) as error:
            await asyncio.wait([sending])  # frames from before the error come first
            await self.tell("error", message=" ".join(str(error).split()))
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        await self.tell("ended")

    async def _deliver(self, stream: Stream, chunk: Chunk) -> None:
        frames = await self.engine.jpegs(chunk.images)
        stream.kept.extend(frames)
        stream.sent += len(frames)
        await self.tell("chunk", frames=len(frames), pose=chunk.pose, keys=chunk.keys)
        for frame in frames:
            await self.out.put(frame)

    async def _shown_more(self) -> None:
        """Waits for the page to show a frame. (wait_for may swallow a cancellation.)"""
        before = self.shown
        self.progress.clear()
        seconds = self.engine.limits.stall_seconds
        late = asyncio.get_running_loop().call_later(seconds, self.progress.set)
        try:
            await self.progress.wait()
        finally:
            late.cancel()
        if self.shown == before:
            raise _Stalled(f"nothing was shown for {seconds:g} seconds")

    def _played(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the stream of a client failed", exc_info=error)
            sorry = f"the server failed with a {type(error).__name__}; its log says more"
            for message in (json.dumps({"type": "error", "message": sorry}), None):
                while self.out.full():
                    self.out.get_nowait()
                self.out.put_nowait(message)

    async def _stop(self) -> None:
        if self.playing is not None:
            self.playing.cancel()
            await asyncio.wait([self.playing])
            self.playing = None

    def _forget(self) -> None:
        if self.stream is not None:
            del self.engine.streams[self.stream.name]
            self.stream = None
