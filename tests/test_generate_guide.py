"""docs/generate.md and examples/custom_pipeline.py do what they say, with a random model in the place of the demo's."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import uvicorn
from toy_rooms import random_rooms

from dit_ops.cli import main, parser
from dit_ops.pipelines import loading
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.play.server import serve
from dit_ops.video import read_mp4

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [shlex.split(line) for language, text in FENCES if language == "sh" for line in text.splitlines()]


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A model directory where the guide has it, below the working directory."""
    pipeline = random_rooms()
    loading.save(tmp_path / "out/demo/dmd/model", "few_step", pipeline.backbone, pipeline.condition, pipeline.settings)
    monkeypatch.chdir(tmp_path)
    return Path("out/demo/dmd/model")


def test_every_fence_is_run_below():
    assert [language for language, _ in FENCES] == ["python", "python", "sh", "sh"]
    assert [words[:2] for words in COMMANDS] == [["dit-ops", "play"], ["python", "examples/custom_pipeline.py"]]
    assert (ROOT / "docs/play.png").is_file()


def test_the_python_examples_run(model, capsys):
    scope: dict = {}
    for language, code in FENCES:
        if language == "python":
            exec(compile(code, "docs/generate.md", "exec"), scope)
    assert capsys.readouterr().out.count("torch.Size([1, 2, 3, 64, 64])") == 6
    assert sum(chunk.shape[1] for chunk in scope["seen"]) == 12


def test_the_example_registers_and_loads_a_pipeline_of_its_own(model, monkeypatch, capsys):
    path = ROOT / "examples/custom_pipeline.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    spec = importlib.util.spec_from_file_location("custom_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_pipeline", module)
    monkeypatch.setattr(loading, "PIPELINES", dict(loading.PIPELINES))
    spec.loader.exec_module(module)
    module.main(COMMANDS[1][2:])
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
    words = COMMANDS[0][1:]
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
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(model, extra, message, capsys, monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("the server was started"))
    assert main(["play", "--model", str(model), "--port", "0", *extra]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-ops play: ")]
    assert message in line


def test_a_model_that_is_not_causal_is_refused():
    pipeline = random_rooms()
    whole = BidirectionalPipeline(pipeline.backbone, pipeline.condition, pipeline.settings)
    with pytest.raises(ValueError, match="play needs a causal model"):
        serve(whole, say=lambda line: None)
