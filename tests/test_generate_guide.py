"""docs/generate.md does what it says: every command and every fence is run, with random models in the place of the demo's."""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch
import uvicorn
from PIL import Image
from test_examples import NOTEBOOKS
from test_readme import commands
from toy_demo import demo_folder
from toy_rooms import random_rooms
from toy_terminal import open_terminal, read_available

from dit_ops.cli import main, parser
from dit_ops.pipelines import loading
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.play.server import serve
from dit_ops.video import read_mp4

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [shlex.split(line) for language, text in FENCES if language == "sh" for line in text.splitlines()]
GENERATE = [words for words in COMMANDS if words[:2] == ["dit-ops", "generate"]]
TORCHRUN = [words for words in COMMANDS if words[0] == "torchrun"]
(PLAY,) = [words for words in COMMANDS if words[:2] == ["dit-ops", "play"]]
(CUSTOM,) = [words for words in COMMANDS if words[:2] == ["python", "examples/custom_pipeline.py"]]
EXAMPLES = [words[1] for words in COMMANDS if words[0] == "python" and words != CUSTOM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the guide takes for granted: the demo's models, a picture and the file of requests that it shows."""
    folder = demo_folder(tmp_path_factory.mktemp("guide"))
    Image.new("RGB", (100, 80), (200, 40, 30)).save(folder / "start.png")
    (lines,) = [text for language, text in FENCES if language == "jsonl"]
    (folder / "prompts.jsonl").write_text(lines)
    return folder


@pytest.fixture
def model(folder, monkeypatch) -> Path:
    """The model directory that the guide names, below the working directory."""
    monkeypatch.chdir(folder)
    return Path("out/demo/dmd/model")


@contextmanager
def terminal() -> Iterator[bytearray]:
    """Standard error is a terminal; what it gets."""
    ours, theirs = open_terminal(80, 24)
    got = bytearray()

    def read() -> None:
        while (data := read_available(ours, 0.1)) is not None:
            got.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as stream, redirect_stderr(stream):
        yield got
    reader.join(10)
    os.close(ours)
    assert not reader.is_alive()


def test_every_fence_is_run_below():
    assert {language for language, _ in FENCES} == {"python", "sh", "jsonl"}
    assert len(COMMANDS) == len(GENERATE) + len(TORCHRUN) + len(EXAMPLES) + len([PLAY, CUSTOM])
    assert sorted(EXAMPLES) == [f"examples/{name}.py" for name in NOTEBOOKS]  # which tests/test_examples.py runs
    assert (ROOT / "docs/play.png").is_file()


def test_links_of_the_guide_lead_somewhere():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", GUIDE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert target[1:] in headings if target.startswith("#") else (ROOT / "docs" / target).is_file(), target


def test_options_named_in_the_guide_exist():
    known = {option for command in commands().values() for option in command._option_string_actions}
    assert set(re.findall(r"`(--[a-z][a-z0-9-]*)", GUIDE)) <= known


def test_the_python_fences_run(model, capsys):
    scope: dict = {}
    for language, code in FENCES:
        if language == "python":
            exec(compile(code, "docs/generate.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "4 frames are known, 8 there are now\n" in printed
    assert printed.count("torch.Size([1, 2, 3, 64, 64])") == 6
    assert sum(chunk.shape[1] for chunk in scope["seen"]) == 12
    batch = re.search(r"`pipeline.stream\((.*)\)`", GUIDE)[1]
    videos = list(eval(f"pipeline.stream({batch})", scope | {"a": "a red room", "b": "a blue room"}))
    assert videos[0].shape == (2, 2, 3, 64, 64)


@pytest.mark.parametrize("words", GENERATE, ids=lambda words: " ".join(words[4:]))
def test_generate(model, words, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    if "--video" in words and not Path(words[words.index("--video") + 1]).is_file():  # which the command before it leaves
        assert main(GENERATE[GENERATE.index(words) - 1][1:]) == 0
        capsys.readouterr()
    with terminal() as got:
        assert main(words[1:]) == 0
    assert ("▀".encode() in got) == ("--preview" in words) and b"frames" in got
    made = capsys.readouterr().out.split()
    lines = Path("prompts.jsonl").read_text().splitlines()
    assert len(made) == (len(lines) if "--prompts" in words else 1)
    for path in map(Path, made):
        record = json.loads(path.with_suffix(".json").read_text())
        assert len(read_mp4(path)[0]) == record["pixel_frames"] > 0 and record.keys() == sidecar_keys()


def sidecar_keys() -> set[str]:
    """Keys of the side-car in the guide's table."""
    table = GUIDE.split("| key | holds |")[1].split("\n\n")[0]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_timings_are_those_of_the_guide(model, capsys):
    assert main([*GENERATE[0][1:], "--output", "timed.mp4"]) == 0
    timings = json.loads(Path("timed.json").read_text())["timings"]
    row = next(line for line in GUIDE.splitlines() if line.startswith("| `timings`"))
    assert list(timings) == re.findall(r"`(\w+)`", row)[1:]


@pytest.mark.dist
def test_torchrun(model):
    """The second command, on two processes; the first is the same without --sequence-parallel."""
    assert TORCHRUN[1] == [*TORCHRUN[0], "--sequence-parallel", "4"]
    at = TORCHRUN[1].index("-m")
    assert TORCHRUN[1][: at + 2] == ["torchrun", "--standalone", "--nproc-per-node", "8", "-m", "dit_ops"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dit_ops"]
    command = [*launch, *TORCHRUN[1][at + 2 : -1], "2", "--output", "shared", "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert sorted(printed) == sorted(map(str, Path("shared").glob("*.mp4"))) and len(printed) == 3


def test_the_example_registers_and_loads_a_pipeline_of_its_own(model, monkeypatch, capsys):
    path = ROOT / "examples/custom_pipeline.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    spec = importlib.util.spec_from_file_location("custom_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_pipeline", module)
    monkeypatch.setattr(loading, "PIPELINES", dict(loading.PIPELINES))
    spec.loader.exec_module(module)
    module.main(CUSTOM[2:])
    assert capsys.readouterr().out == "13 frames in careful.mp4\n"
    assert read_mp4("careful.mp4")[0].shape == (13, 3, 64, 64)
    # one step of each kind is the same step: the new pipeline then is the few-step one
    plain = loading.load(model, device="cpu")
    own = module.CarefulStartPipeline(plain.backbone, plain.condition, plain.settings)
    steps: list[tuple[int, int]] = []
    options = {"pose": "w*4", "num_steps": 1, "denoising_steps": (1000,)}
    video = own("a red room", on_step=lambda *step: steps.append(step), **options)
    torch.testing.assert_close(video, plain("a red room", **options))
    assert steps == [(i + 1, 5) for i in range(5)]


def test_the_play_command_serves_a_page_until_ctrl_c(model):
    words = PLAY[1:]
    assert parser().parse_args(words).prompt.startswith("a red room")
    command = [sys.executable, "-m", "dit_ops", *words, "--port", "0", "--sink-frames", "1"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children ignore it
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        line = next(line for line in process.stderr if line.startswith("open "))
        assert re.fullmatch(r"open http://127\.0\.0\.1:\d+/\n", line)
        with urllib.request.urlopen(line.split()[1], timeout=20) as answer:
            assert "<canvas" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "nowhere"], "a model directory must hold model_index.json, nowhere does not"),
        (["--token="], "token must not be empty"),
        (["--port", "99999"], "port must be 0 to 65535, got 99999"),
        (["--window-frames", "2", "--sink-frames", "2"], "window_frames must exceed sink_frames"),
        (["--window-frames", "0"], "window_frames must exceed sink_frames"),
        (
            ["--window-frames", "2", "--sink-frames", "1"],
            "--window-frames must hold the sink (1) and a block of 2 frames, got 2",
        ),
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(model, extra, message, capsys, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("the server was started"))
    assert main(["play", "--model", str(model), "--port", "0", *extra]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-ops play: ")]
    assert message in line


def test_a_port_in_use_is_one_sentence(model, capsys, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("the server was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", "--model", str(model), "--port", str(port)]) == 2
    assert f"dit-ops play: port {port} is in use already; --port 0 takes a free one\n" in capsys.readouterr().err


def test_a_model_that_is_not_causal_is_refused():
    pipeline = random_rooms()
    whole = BidirectionalPipeline(pipeline.backbone, pipeline.condition, pipeline.settings)
    with pytest.raises(ValueError, match="play needs a causal model"):
        serve(whole, say=lambda line: None)
