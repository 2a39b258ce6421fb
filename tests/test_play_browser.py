"""The page in a real browser: keys steer a small model, frames arrive on the canvas, the video is saved, mishaps are named."""

import base64
import threading
import time
from pathlib import Path

import pytest
from toy_browser import CHROMIUM, Browser, chromium
from toy_play import ToyPipeline, page, running, until
from toy_rooms import random_rooms

from dit_ops.pipelines import loading
from dit_ops.play.engine import Limits
from dit_ops.video import read_mp4

ROOMS = Path(__file__).parents[1] / "out/demo/dmd/model"  # what `dit-ops demo` trains


PROMPT = "a red room with a blue ball and a white box"


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def test_a_person_steers_the_model_in_a_browser(tmp_path):
    pipeline = loading.load(ROOMS, device="cpu") if ROOMS.is_dir() else random_rooms()
    fps, options = pipeline.settings.fps, {"window_frames": 8}
    with running(pipeline, prompt=PROMPT, options=options) as address, chromium(tmp_path) as browser:
        browser.call("Page.navigate", url=address.url)
        browser.wait(f"document.querySelector('[name=prompt]')?.value === {PROMPT!r}")
        browser.evaluate("document.querySelector('[name=seed]').focus()")
        browser.key("Enter", True)
        browser.key("Enter", False)
        browser.wait("Number(document.getElementById('frames').textContent) >= 2")
        assert browser.evaluate("[canvas.width, canvas.height]") == [pipeline.settings.width, pipeline.settings.height]
        before = browser.evaluate("canvas.toDataURL()")
        assert browser.evaluate("pen.getImageData(0, 0, canvas.width, canvas.height).data.some((v, i) => i % 4 < 3 && v > 0)")
        browser.key("KeyW", True)
        browser.wait("/(^|,)w\\*\\d/.test(document.getElementById('pose').textContent)")
        browser.key("ArrowRight", True)
        browser.wait("/(^|,)w\\+l\\*\\d/.test(document.getElementById('pose').textContent)")
        assert browser.evaluate("document.querySelectorAll('.keys .down').length") == 2
        browser.wait("/^\\d+ ms$/.test(document.getElementById('latency').textContent)")
        pose = browser.text("pose")
        frames = int(browser.text("frames"))
        browser.wait(f"Number(document.getElementById('frames').textContent) >= {frames + 8}")
        assert browser.text("pose") != pose and browser.text("pose").startswith("stay*")
        assert browser.evaluate("canvas.toDataURL()") != before
        assert 0 < float(browser.text("fps")) < 2 * fps
        shot = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
        (tmp_path / "play.png").write_bytes(shot)
        browser.key("KeyW", False)
        browser.key("ArrowRight", False)
        browser.wait("/,stay\\*\\d+$/.test(document.getElementById('pose').textContent)")
        browser.click("stop")
        browser.click("save")
        video = tmp_path / "downloads/world.mp4"
        until(video.is_file, 20)
        film, rate = read_mp4(video)
        assert film.shape[0] >= frames + 8 and film.shape[2:] == (pipeline.settings.height, pipeline.settings.width)
        assert rate == fps
        assert browser.text("message") == "" and browser.complaints == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
        assert [text for text in browser.complaints if "WebSocket connection to" not in text] == []  # a server was away


SENT = """
window.sent = []
const plain = WebSocket.prototype.send
WebSocket.prototype.send = function (message) { sent.push(JSON.parse(message)); plain.call(this, message) }
"""


HIDDEN = """
Object.defineProperty(document, "hidden", {get: () => true, configurable: true})
document.dispatchEvent(new Event("visibilitychange"))
delete document.hidden
document.dispatchEvent(new Event("visibilitychange"))
"""


def opened(browser: Browser, url: str, prompt: str = PROMPT) -> None:
    """The page, connected; `sent` holds what it says to the server."""
    browser.call("Page.navigate", url=url)
    browser.wait("document.getElementById('start')?.disabled === false")
    browser.evaluate(SENT)
    browser.evaluate(f"form.prompt.value = {prompt!r}")


def started(browser: Browser) -> None:
    browser.click("start")
    browser.wait("Number(document.getElementById('frames').textContent) > 4")


def keys(browser: Browser) -> list[list[str]]:
    """The keys that were down after each change."""
    return [message["down"] for message in browser.evaluate("sent") if message["type"] == "keys"]


def test_keys_do_not_stick_and_typing_does_not_steer(browser):
    with running(ToyPipeline(seconds=0.01)) as address:
        opened(browser, address.url, "")
        browser.evaluate("form.prompt.focus()")
        browser.key("KeyW", True)
        browser.key("KeyW", False)
        assert browser.evaluate("form.prompt.value") == "w" and keys(browser) == []
        started(browser)
        assert browser.evaluate("document.activeElement.id") == "canvas"
        browser.key("KeyW", True)
        for _ in range(5):
            browser.key("KeyW", True, autoRepeat=True)
        assert keys(browser) == [["KeyW"]]
        browser.evaluate("dispatchEvent(new Event('blur'))")
        assert keys(browser) == [["KeyW"], []]
        browser.key("KeyW", True)
        browser.evaluate("form.prompt.focus()")
        browser.key("KeyW", False)  # let go of in the box
        browser.evaluate("canvas.focus()")
        browser.key("KeyW", True)
        browser.key("MetaLeft", True)
        browser.key("MetaLeft", False)  # while it was held the w came up, which macOS does not tell
        browser.key("KeyW", True, modifiers=2)  # Ctrl-W is the browser's
        assert keys(browser)[2:] == [["KeyW"], [], ["KeyW"], []]
        browser.key("KeyW", True)
        browser.evaluate(HIDDEN)
        assert keys(browser)[6:] == [["KeyW"], []]
        browser.evaluate("document.querySelector('[data-code=KeyA]').focus()")
        browser.key("Enter", True)
        browser.key("Enter", False)
        browser.wait("sent.filter(m => m.type === 'keys').length === 10")
        assert keys(browser)[8:] == [["KeyA"], []]
        x, y = browser.middle("[data-code=KeyA]")
        for kind, up in (("mousePressed", 0), ("mouseReleased", 200)):  # the button is let go of beside the key
            browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y - up, button="left", clickCount=1)
        assert keys(browser)[10:] == [["KeyA"], []]
        assert browser.evaluate("document.querySelectorAll('.keys .down').length") == 0


PHONE = dict(width=360, height=740, deviceScaleFactor=3, mobile=True)
CONTRAST = r"""
(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  const sum = rgb => rgb.reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * channel(c), 0)
  const light = colour => sum(colour.match(/[\d.]+/g).slice(0, 3).map(Number))
  const paint = e => getComputedStyle(e).backgroundColor
  const behind = e => paint(e) === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : paint(e)
  const texts = [...document.querySelectorAll("body *")].filter(e => !["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName))
    .filter(e => !e.disabled && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  return texts.map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a)
    return [e.outerHTML.slice(0, 60), (a + 0.05) / (b + 0.05)]
  })
})()
"""


def test_a_phone_has_buttons_for_the_keys(browser, tmp_path):
    with running(ToyPipeline(seconds=0.01)) as address:
        browser.call("Emulation.setDeviceMetricsOverride", **PHONE)
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        try:
            opened(browser, address.url)
            started(browser)
            assert browser.evaluate("document.documentElement.scrollWidth === 360 && devicePixelRatio === 3")
            assert browser.evaluate("[...codes.values()].every(b => b.offsetWidth >= 40 && b.offsetHeight >= 40)")
            pads = browser.evaluate("[...document.querySelectorAll('.keys')].map(pad => pad.getBoundingClientRect().top)")
            assert pads[0] == pads[1]  # one for each thumb
            one, two = browser.middle("[data-code=KeyW]"), browser.middle("[data-code=ArrowRight]")
            points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate((one, two))]
            browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points[:1])
            browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points)
            browser.wait("/(^|,)w\\+l\\*\\d/.test(document.getElementById('pose').textContent)")
            contrast = browser.evaluate(CONTRAST)
            away = points[0] | {"x": 180, "y": 100}  # a finger that slides off still holds its key
            browser.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[away, points[1]])
            browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            browser.wait("/,stay\\*\\d+$/.test(document.getElementById('pose').textContent)")
            assert keys(browser)[:2] == [["KeyW"], ["KeyW", "ArrowRight"]] and keys(browser)[-1] == []
            (tmp_path / "phone.png").write_bytes(base64.b64decode(browser.call("Page.captureScreenshot")["data"]))
        finally:
            browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
            browser.call("Emulation.clearDeviceMetricsOverride")
    assert len(contrast) > 15 and [(what, ratio) for what, ratio in contrast if ratio < 4.5] == []


def test_everything_to_press_or_fill_in_has_a_name(browser):
    with running(ToyPipeline()) as address:
        opened(browser, address.url)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node]
    controls = [name for role, name in names if role in ("button", "textbox", "spinbutton", "image", "group")]
    assert all(controls) and {"prompt", "seed", "start", "move", "turn", "turn left", "generated video"} <= set(controls)


def test_the_page_says_what_went_wrong_and_connects_again(browser):
    pipeline = ToyPipeline(seconds=0.01)
    with running(pipeline) as address:
        opened(browser, address.url, "refused")
        browser.click("start")
        browser.wait("document.getElementById('message').textContent === 'prompt must be something else'")
        browser.wait("document.getElementById('start').textContent === 'start'")
        browser.evaluate("form.prompt.value = ' '")
        browser.click("start")  # the form does not let it through
        assert browser.evaluate("sent.filter(m => m.type === 'start').length") == 1
        browser.evaluate(f"form.prompt.value = {PROMPT!r}")
        started(browser)
        assert browser.text("message") == "" and browser.text("start") == "restart"
        browser.evaluate("form.prompt.value = 'another room'")
        port = address.port
    browser.wait("document.getElementById('message').textContent === 'no connection to the server · trying to connect again'")
    assert browser.evaluate("['start', 'stop', 'save'].every(id => $(id).disabled)")
    with running(ToyPipeline(seconds=0.01), port=port, prompt="of the server"):
        browser.wait("!document.getElementById('start').disabled")
        assert browser.text("message") == "" and browser.evaluate("form.prompt.value") == "another room"
        started(browser)
        browser.wait("document.getElementById('message').textContent === ''")
        assert browser.evaluate("!$('save').disabled && !$('stop').disabled")


def test_latency_is_that_of_the_change_that_waited_longest(browser):
    pipeline, go = ToyPipeline(), threading.Event()
    pixels = pipeline.pixels
    pipeline.pixels = lambda seed, chunk: pixels(seed, chunk) if chunk < 4 or go.wait(10) else None
    with running(pipeline) as address:
        opened(browser, address.url)
        browser.click("start")
        browser.wait("document.getElementById('frames').textContent === '12'")  # all that there are
        browser.key("KeyW", True)
        time.sleep(1)
        browser.key("ArrowRight", True)
        go.set()
        browser.wait("/^\\d+ ms$/.test(document.getElementById('latency').textContent)")
        assert int(browser.text("latency").split()[0]) >= 1000
        assert browser.text("pose").startswith("stay*8,w+l*")
        browser.key("ArrowRight", False)
        browser.key("KeyW", False)


def test_the_page_says_what_it_waits_for(browser):
    pipeline = ToyPipeline(seconds=0.01)
    with running(pipeline) as address:
        with page(address) as other:
            other.start()
            opened(browser, address.url)
            browser.click("start")
            browser.wait("document.getElementById('message').textContent === 'waiting for the model: 1 before you'")
            pipeline.seconds = 0.5
            other.send("stop")
            browser.wait("document.getElementById('message').textContent === 'the first frames are being made'")
            pipeline.seconds = 0.01
        browser.wait("Number(document.getElementById('frames').textContent) > 0")
        assert browser.text("message") == "" and browser.text("latency") == "–"  # no key was pressed


def test_a_page_that_nobody_sees_gives_the_model_to_others(browser):
    """It shows nothing while it is hidden, so the server drops it; seen again, it connects and says why it stopped."""
    pipeline = ToyPipeline(seconds=0.01)
    with running(pipeline, Limits(stall_seconds=1.6)) as address:
        opened(browser, address.url)
        started(browser)
        browser.key("KeyW", True)
        cover = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.wait("document.hidden")
        assert keys(browser) == [["KeyW"], []]
        shown = browser.text("frames")  # timers of a hidden page go once a second
        until(lambda: pipeline.closed == 1)
        assert int(browser.text("frames")) - int(shown) <= 1
        browser.call("Target.closeTarget", targetId=cover)
        browser.wait("!document.hidden")
        browser.wait("document.getElementById('message').textContent === 'nothing was shown for 1.6 seconds'")
        browser.wait("!document.getElementById('start').disabled")
        browser.key("KeyW", False)
        started(browser)


def test_a_browser_without_websockets_says_so(browser):
    with running(ToyPipeline()) as address:
        script = browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.WebSocket")["identifier"]
        try:
            browser.call("Page.navigate", url=address.url)
            browser.wait("document.getElementById('message')?.textContent.includes('no WebSocket')")
            assert browser.evaluate("$('start').disabled")
        finally:
            browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
