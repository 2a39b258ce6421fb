"""The page in a real browser: keys steer a small model, frames arrive on the canvas, the video is saved."""

import base64
from pathlib import Path

import pytest
from toy_browser import CHROMIUM, chromium
from toy_play import running, until
from toy_rooms import random_rooms

from dit_ops.pipelines import loading
from dit_ops.video import read_mp4

ROOMS = Path(__file__).parents[1] / "out/demo/dmd/model"  # what `dit-ops demo` trains


PROMPT = "a red room with a blue ball and a white box"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
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
        assert browser.evaluate("document.querySelectorAll('kbd.down').length") == 2
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
