"""The web server: one page, one WebSocket, one video download."""

import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.websockets import WebSocketState

from dit_ops.play.client import Client
from dit_ops.play.engine import Engine, Limits
from dit_ops.play.gate import Gate, is_loopback
from dit_ops.play.protocol import MAX_MESSAGE

PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",  # the address may hold the token
    "X-Content-Type-Options": "nosniff",
}


def application(engine: Engine, prompt: str = "") -> FastAPI:
    """Page, WebSocket and video of an engine, to be put behind a Gate."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    settings, page = engine.settings, PAGE.read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=HEADERS)

    @app.get("/video.mp4")
    async def video(session: str = "") -> Response:
        stream = engine.streams.get(session)
        if stream is None or not stream.kept:
            return Response("no frames of this session are kept\n", 404, HEADERS, "text/plain")
        data = await engine.video(stream)
        if data is None:
            return Response("another video is being made\n", 503, HEADERS | {"Retry-After": "5"}, "text/plain")
        attached = {"Content-Disposition": 'attachment; filename="world.mp4"'}
        return Response(data, headers=HEADERS | attached, media_type="video/mp4")

    @app.websocket("/ws")
    async def connect(websocket: WebSocket) -> None:
        with suppress(WebSocketDisconnect):  # the page may be gone at any time
            await websocket.accept()
            if engine.clients >= engine.limits.clients:
                await websocket.send_json({"type": "error", "message": f"all {engine.limits.clients} places are taken"})
                await websocket.close(1013)
                return
            client = Client(websocket, engine)
            await client.tell("hello", fps=settings.fps, prompt=prompt, width=settings.width, height=settings.height)
            engine.clients += 1
            try:
                await client.run()
            finally:
                engine.clients -= 1
            if websocket.client_state is WebSocketState.CONNECTED:
                await websocket.close(1008)

    return app


def new_server(
    pipeline: Any,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    prompt: str = "",
    options: dict[str, Any] | None = None,
    limits: Limits | None = None,
    overlap: bool = False,
) -> tuple[uvicorn.Server, socket.socket, str]:
    """A server, its listening socket and the address of its page; `server.run(sockets=[socket])` serves until it is stopped.

    token     asked for in every request; made where it is not given and `host` can be reached from elsewhere
    port      0: any free one        options   fields of the pipeline's Settings for every stream
    overlap   a chunk is decoded while the next one is computed, whose keys are then read one chunk earlier
    """
    local = is_loopback(host)
    if token is None and not local:
        token = secrets.token_urlsafe(24)
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be 0 to 65535, got {port}")
    if token == "":
        raise ValueError("token must not be empty")
    engine = Engine(pipeline, options or {}, limits or Limits(), overlap)
    config = uvicorn.Config(
        Gate(application(engine, prompt), token, local),
        host,
        port,
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,  # JPEG files do not get smaller
        limit_concurrency=64,
        timeout_graceful_shutdown=3,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    at = f"[{host}]" if ":" in host else host
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted sockets inherit it: what a client never takes is not kept for ever
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * engine.limits.stall_seconds))
    query = "" if token is None else f"?token={quote(token)}"
    return uvicorn.Server(config), listening, f"http://{at}:{listening.getsockname()[1]}/{query}"


def serve(pipeline: Any, *args: Any, say: Callable[[str], None], **options: Any) -> None:
    """Runs a server of `new_server` until Ctrl-C; `say` gets its address. The pipeline must be a causal one with a camera."""
    backbone = pipeline.backbone
    if not pipeline.causal:
        raise ValueError("play needs a causal model, which makes a video block by block; this one makes all frames at once")
    if backbone.camera is None:
        raise ValueError("play needs a model that follows a camera; this one has no camera branch")
    if (pipeline.settings.block_frames or backbone.block_frames) is None:
        raise ValueError("play needs a model that was trained with causal blocks; this one has no block_frames")
    server, listening, address = new_server(pipeline, *args, **options)
    say(f"open {address}")
    with listening:
        server.run(sockets=[listening])
