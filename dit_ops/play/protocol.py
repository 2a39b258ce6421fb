"""What page and server say to each other over the WebSocket: JSON texts both ways, and one binary message per JPEG frame.

page → server   start {prompt, seed} · keys {down, number} · shown {frame} · stop
server → page   hello {fps, width, height, prompt} · waiting {ahead} · started {session}
                chunk {frames, pose, keys}, followed by that many JPEG frames · ended · error {message}

`number` counts the page's changes of keys, `keys` is the latest change that every step of a chunk follows; `shown` counts the
frames of the stream that the page has drawn, and the server makes the next chunk only when few are left to draw. `waiting` is
said again when the number of those before changes.
"""

import json
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 64 * 1024  # bytes
MAX_PROMPT = 2000  # characters
# a keyboard key as browsers name it (KeyboardEvent.code) → key of a pose string
KEYS = {
    "KeyW": "w",
    "KeyS": "s",
    "KeyA": "a",
    "KeyD": "d",
    "KeyR": "u",
    "KeyF": "dn",
    "ArrowLeft": "j",
    "ArrowRight": "l",
    "ArrowUp": "i",
    "ArrowDown": "k",
}


@dataclass(frozen=True)
class Start:
    prompt: str
    seed: int


@dataclass(frozen=True)
class Keys:
    down: tuple[str, ...]  # keys of a pose string, in the order of KEYS
    number: int


@dataclass(frozen=True)
class Shown:
    frame: int


@dataclass(frozen=True)
class Stop:
    pass


Message = Start | Keys | Shown | Stop


def parse(text: str) -> Message:
    """A message of the page; ValueError: one sentence that says what was expected and what came."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a message must be JSON, got {_short(text)}") from error
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "start":
        return Start(_prompt(raw), _integer(raw, "seed", 2**63 - 1))
    if kind == "keys":
        down = raw.get("down")
        if not isinstance(down, list) or not all(isinstance(key, str) and key in KEYS for key in down):
            raise ValueError(f"keys: down must be a list of {', '.join(KEYS)}, got {_short(json.dumps(down))}")
        return Keys(tuple(name for code, name in KEYS.items() if code in down), _integer(raw, "number", 2**53))
    if kind == "shown":
        return Shown(_integer(raw, "frame", 2**53))
    if kind == "stop":
        return Stop()
    raise ValueError(f"a message must be an object with a type of start, keys, shown or stop, got {_short(text)}")


def _prompt(raw: dict[str, Any]) -> str:
    prompt = raw.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        got = f"{len(prompt)} characters" if isinstance(prompt, str) else type(prompt).__name__
        raise ValueError(f"start: prompt must be a text of 1 to {MAX_PROMPT} characters, got {got}")
    return prompt


def _integer(raw: dict[str, Any], name: str, most: int) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{raw['type']}: {name} must be an integer from 0 to {most}, got {_short(json.dumps(value))}")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
