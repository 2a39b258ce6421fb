"""Chromium without a window, driven over its DevTools protocol."""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
KEYS = {"KeyW": ("w", 87), "ArrowRight": ("ArrowRight", 39), "Enter": ("Enter", 13), "MetaLeft": ("Meta", 91)}
TEXT = {"KeyW": "w", "Enter": "\r"}


class Browser:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.complaints: list[str] = []  # exceptions and errors of the page

    def call(self, method: str, **params: Any) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.complaints.append(json.dumps(answer["params"]["entry"]))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, name: str) -> str:
        return self.evaluate(f"document.getElementById({name!r}).textContent")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Until a script gives something true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} did not come true; the page says {self.text('message')!r}"
            time.sleep(0.02)
        return value

    def key(self, code: str, down: bool, **options: Any) -> None:
        key, number = KEYS[code]
        text = {"text": TEXT[code]} if code in TEXT and down else {}
        kind = "keyDown" if down else "keyUp"
        self.call("Input.dispatchKeyEvent", type=kind, code=code, key=key, windowsVirtualKeyCode=number, **text, **options)

    def click(self, name: str) -> None:
        x, y = self.middle(f"#{name}")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is in the window."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        return x, y


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A page of a fresh browser with its profile in `folder`; downloads go to folder/downloads."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-sandbox", "--disable-gpu"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--disable-extensions", "--disable-dev-shm-usage", "--window-size=900,800", "about:blank"]
    process = subprocess.Popen(
        [CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(folder)}
    )
    try:
        address, end = folder / "DevToolsActivePort", time.monotonic() + 30
        while not (address.exists() and (lines := address.read_text().split()) and len(lines) == 2):
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=10) as answer:
            (page,) = [target for target in json.load(answer) if target["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None, compression=None) as socket:
            browser = Browser(socket)
            for domain in ("Page", "Runtime", "Log"):
                browser.call(f"{domain}.enable")
            browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
            yield browser
            browser.call("Browser.close")
        process.wait(10)
    finally:
        process.kill()
        process.wait()
