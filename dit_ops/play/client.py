"""One connected page: a receiver, a sender with a bounded queue, and while it plays a task that asks the model for chunks.

Any of them ending ends the connection. A stream is stopped by cancelling its task: the generator is then closed on the model's
thread behind the chunk that is being computed, and only after that the next client has its turn.
"""

import asyncio
import json
import logging
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from dit_ops.play.engine import Engine
from dit_ops.play.protocol import Keys, Shown, Start, parse
from dit_ops.play.stream import Stream

log = logging.getLogger(__name__)


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
            made = 0 if self.stream is None else self.stream.frames
            if not self.shown <= message.frame <= made:
                raise ValueError(f"shown: frame must be from {self.shown} to the {made} sent so far, got {message.frame}")
            if message.frame > self.shown:
                self.shown = message.frame
                self.progress.set()
        else:
            await self._stop()

    async def _play(self, start: Start) -> None:
        engine = self.engine
        engine.asking += 1
        try:
            if engine.turn.locked():
                await self.tell("waiting", ahead=engine.asking - 1)
            async with engine.turn:
                self._forget()
                stream = self.stream = engine.new_stream(start.prompt, start.seed)
                engine.streams[stream.name] = stream
                self.shown = 0
                await self.tell("started", session=stream.name)
                try:
                    await self._produce(stream)
                finally:
                    await asyncio.shield(asyncio.ensure_future(engine.on_model(stream.close)))
        finally:
            engine.asking -= 1

    async def _produce(self, stream: Stream) -> None:
        limits = self.engine.limits
        ahead = limits.ahead_seconds * self.engine.settings.fps
        while True:
            while stream.frames - self.shown > ahead:
                if not await self._shown_more():
                    await self.tell("error", message=f"nothing was shown for {limits.stall_seconds:g} seconds")
                    await self.out.put(None)
                    return
            try:
                chunk = await self.engine.on_model(stream.next_chunk)
            except (ValueError, RuntimeError) as error:
                await self.tell("error", message=" ".join(str(error).split()))
                chunk = None
            if chunk is None:
                await self.tell("ended")
                return
            await self.tell("chunk", frames=len(chunk.frames), pose=chunk.pose, keys=chunk.keys, seconds=chunk.seconds)
            for frame in chunk.frames:
                await self.out.put(frame)

    async def _shown_more(self) -> bool:
        """Waits for the page to show a frame; False: it did not in time. (wait_for may swallow a cancellation.)"""
        before = self.shown
        self.progress.clear()
        late = asyncio.get_running_loop().call_later(self.engine.limits.stall_seconds, self.progress.set)
        try:
            await self.progress.wait()
        finally:
            late.cancel()
        return self.shown > before

    def _played(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the stream of a client failed", exc_info=error)
            while self.out.full():
                self.out.get_nowait()
            self.out.put_nowait(None)

    async def _stop(self) -> None:
        if self.playing is not None:
            self.playing.cancel()
            await asyncio.wait([self.playing])
            self.playing = None

    def _forget(self) -> None:
        if self.stream is not None:
            del self.engine.streams[self.stream.name]
            self.stream = None
