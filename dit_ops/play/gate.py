"""Who may talk to the server: the right Host, the right token, and for WebSockets the page of this very server as Origin."""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI application that refuses with one sentence or hands on to `app`.

    token   None: none is asked for
    local   only a Host that names this machine is served, so that the name of another site cannot be made to point here
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str | None, local: bool) -> None:
        self.app, self.token, self.local = app, token, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal})  # before accept: HTTP 403
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"{refusal}\n".encode()})

    def refusal(self, scope: Scope) -> str | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "").lower()
        if self.local and not is_loopback(_name(host)):
            return "the Host header must name this machine"
        if scope["type"] == "websocket" and headers.get("origin", "").lower() not in (f"http://{host}", f"https://{host}"):
            return "the Origin header must be that of the page of this server"
        if self.token is not None:
            (given,) = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1:]
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return "the address must end in ?token= and the token that the server printed"
        return None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
