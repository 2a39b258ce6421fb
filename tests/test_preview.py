"""The picture in the terminal: its characters and colours as a function, and on a pseudo-terminal with a progress bar."""

import codecs
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_rooms import random_rooms
from toy_terminal import Screen, open_terminal, read_available
from tqdm import tqdm

from dit_ops.pipelines import loading
from dit_ops.preview import Preview, half_blocks

ROOT = Path(__file__).parents[1]


def on_screen(lines: list[str], columns: int) -> Screen:
    screen = Screen(columns, len(lines) + 1)
    screen.feed("".join(line + "\r\n" for line in lines))
    return screen


def colours(frame: Tensor) -> list[list[tuple]]:
    """Pixels of [3, H, W] in [−1, 1] as (r, g, b)."""
    levels = ((frame + 1) * 127.5).round().int()
    return [[tuple(levels[:, y, x].tolist()) for x in range(frame.shape[2])] for y in range(frame.shape[1])]


def test_every_pixel_of_a_small_picture_is_there():
    frame = torch.rand(3, 6, 5) * 2 - 1
    screen = on_screen(half_blocks(frame, 40, 20), 40)
    pixels = colours(frame)
    assert len(screen.texts()) == 3
    for row in range(3):
        expected = [("▀", upper, lower) for upper, lower in zip(pixels[2 * row], pixels[2 * row + 1], strict=True)]
        assert screen.lines[row] == expected
    assert screen.colours == [None, None], "the colours are reset at the end of a line"


@pytest.mark.parametrize(
    ("height", "width", "columns", "rows", "size"),
    [
        (480, 832, 80, 24, (23, 80)),  # the width binds: 480 · 80 / 832 / 2 lines
        (480, 832, 200, 10, (10, 35)),  # the height binds
        (832, 480, 79, 22, (22, 25)),
        (64, 64, 200, 60, (32, 64)),  # never enlarged
        (7, 3, 10, 10, (4, 3)),  # an odd height
        (1000, 2, 10, 5, (5, 1)),  # never less than one character
        (2, 1000, 10, 5, (1, 10)),
    ],
)
def test_a_picture_fits_and_keeps_its_shape(height, width, columns, rows, size):
    lines = half_blocks(torch.zeros(3, height, width), columns, rows)
    assert (len(lines), {line.count("▀") for line in lines}) == (size[0], {size[1]})


def test_a_large_picture_is_averaged():
    frame = torch.rand(3, 8, 8) * 2 - 1
    screen = on_screen(half_blocks(frame, 4, 2), 4)
    expected = colours(frame.reshape(3, 4, 2, 4, 2).mean((2, 4)))
    assert [cell[1:] for cell in screen.lines[0]] == list(zip(expected[0], expected[1], strict=True))


def test_a_colour_is_named_where_it_changes_only():
    (line,) = half_blocks(torch.tensor([-1.0, 1, 1]).expand(3, 2, 3), 10, 1)
    assert line == "\x1b[38;2;0;0;0;48;2;0;0;0m▀\x1b[38;2;255;255;255;48;2;255;255;255m▀▀\x1b[0m"


def test_a_picture_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"half_blocks: frames must be \[F, 3, H, W\]"):
        half_blocks(torch.zeros(1, 4, 4), 10, 10)


@pytest.fixture
def terminal(request):
    """(stream to write to, function that reads what came onto a screen of 40 × 12, or as asked for)."""
    size = getattr(request, "param", (40, 12))
    ours, theirs = open_terminal(*size)
    screen, decoder = Screen(*size), codecs.getincrementaldecoder("utf-8")()

    def read() -> Screen:
        while data := read_available(ours):
            screen.feed(decoder.decode(data))
        return screen

    with open(theirs, "w") as stream:
        yield stream, read
    os.close(ours)


def test_the_picture_is_redrawn_in_place_above_the_bar(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, read = terminal
    print("before", file=stream, flush=True)
    with tqdm(total=3, file=stream, desc="video", ncols=38, ascii=True) as bar, Preview(stream) as preview:
        for shade in (-1.0, 0.0, 1.0):
            preview.show(torch.full((3, 480, 832), shade))
            bar.update()
            screen = read()
            level = round((shade + 1) * 127.5)
            assert screen.picture() == list(range(1, 11)), "10 rows, one below the text before"
            assert {cell[1:] for row in screen.picture() for cell in screen.lines[row]} == {((level,) * 3,) * 2}
            assert screen.text(0) == "before" and screen.text(11).startswith("video:")
            assert all(len(screen.lines[row]) <= 39 for row in screen.picture())
    print("after", file=stream, flush=True)
    screen = read()
    assert screen.picture() == [] and screen.colours == [None, None]
    assert [text[:6] for text in screen.texts()] == ["before", "video:", "after"] and "3/3" in screen.text(1)


def test_the_next_picture_takes_the_place_of_the_one_before(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, read = terminal
    preview = Preview(stream)
    for number, height in enumerate((20, 6)):
        with tqdm(total=1, file=stream, desc=f"video {number}", ncols=38, ascii=True), preview:
            preview.show(torch.zeros(3, height, 8))
            assert len(read().picture()) == height // 2
            preview.show(torch.zeros(3, height - 2, 8))  # the terminal, or the video, became smaller
            assert len(read().picture()) == height // 2 - 1
    assert [text[:7] for text in read().texts()] == ["video 0", "video 1"]


@pytest.mark.parametrize("terminal", [(120, 40)], indirect=True)
def test_ctrl_c_waits_for_a_whole_picture(terminal, monkeypatch):
    """The terminal takes some kilobytes and stops; the interrupt comes while the rest of the picture waits."""
    monkeypatch.setenv("TERM", "xterm")
    stream, read = terminal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    written = threading.Event()

    def interrupt() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        while not written.is_set():
            read()

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Preview(stream).show(torch.rand(3, 480, 832) * 2 - 1)
    finally:
        written.set()
        other.join()
        handler = signal.signal(signal.SIGINT, before)
    screen = read()
    assert len(screen.picture()) == 34 and all(len(screen.lines[row]) == 119 for row in screen.picture())
    assert screen.colours == [None, None] and handler is signal.default_int_handler


def test_without_a_terminal_is_an_error(monkeypatch, terminal):
    with pytest.raises(ValueError, match="preview needs a terminal to draw in, but standard error is none"):
        Preview(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(ValueError, match="preview needs a terminal"):
        Preview(terminal[0])


def test_generate_shows_the_video_and_ctrl_c_leaves_a_clean_terminal(tmp_path):
    pipeline = random_rooms()
    loading.save(tmp_path / "model", "few_step", pipeline.backbone, pipeline.condition, pipeline.settings)
    words = ["--model", str(tmp_path / "model"), "--prompt", "a room", "--pose", "w*4000", "--window-frames", "6"]
    command = [sys.executable, "-m", "dit_ops", "generate", *words, "--output", str(tmp_path / "out"), "--preview"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "CUDA_VISIBLE_DEVICES": ""}
    ours, theirs = open_terminal(70, 16)
    before = os.popen(f"stty -g < {os.ttyname(theirs)}").read()
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    process = subprocess.Popen(command, env=env, stderr=theirs, stdout=theirs, stdin=theirs, preexec_fn=heed)
    screen, decoder, end, pictures = Screen(70, 16), codecs.getincrementaldecoder("utf-8")(), time.monotonic() + 60, set()
    stopped = False
    try:
        while time.monotonic() < end:
            screen.feed(decoder.decode(read_available(ours, 0.2) or b""))
            if screen.picture():
                pictures.add(str(screen.lines))
            if len(pictures) >= 3 and not stopped:
                process.send_signal(signal.SIGINT)
                stopped = True
            if process.poll() is not None:
                break
        while data := read_available(ours):
            screen.feed(decoder.decode(data))
        assert process.wait(1) == 130 and os.popen(f"stty -g < {os.ttyname(theirs)}").read() == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
    assert screen.picture() == [] and screen.colours == [None, None]
    bar, last = screen.texts()
    assert re.match(r"\d+/4001 frames, [\d.]+ fps, [\d:]+ left \|.*\d+%$", bar), bar
    assert last == "dit-ops generate: stopped"
    assert not list((tmp_path / "out").glob("*")), "no half video is left, not even a hidden one"
