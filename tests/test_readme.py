"""What README.md tells its readers to type works: examples run, commands parse, its table is true, its paths exist."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_ops import _library as lib
from dit_ops import explain
from dit_ops.cli import main, parser
from dit_ops.doctor import public_ops, sample_arguments
from dit_ops.training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in FENCES if language == "python"]
COMMANDS = [shlex.split(line, comments=True) for language, text in FENCES if language == "sh" for line in text.splitlines()]
OURS = [words[1:] for words in COMMANDS if words[0] == "dit-ops"]
RECIPES = [(ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/run", "csrc/build_ext.py")]


def test_every_fence_is_known():
    assert {language for language, _ in FENCES} == {"python", "sh"}
    assert {words[0] for words in COMMANDS} == {"make", "pip", "python", "PYTHONPATH=.", "dit-ops"}


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_python_example_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))))
def test_make_target_exists(target):
    assert re.search(rf"^{target}: ", RECIPES[0], re.MULTILINE)


def test_ci_runs_the_test_command():
    assert ["make", "test"] in COMMANDS
    assert re.search(r"^CI=true make test\b", RECIPES[1], re.MULTILINE)


def test_install_commands_are_those_of_the_makefile():
    """make runs them with its own python; the package is installed, and built against the torch that is there."""
    words = {word for words in COMMANDS if words[0] in ("pip", "python") for word in words[1:]}
    assert {word for word in words if word not in RECIPES[0]} <= {"."}


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_command_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = parser().parse_args(words)
    for config in [word for word in words if word.endswith(".yaml")]:
        assert load_config(config).output
    assert callable(arguments.run)


def test_package_runs_from_a_checkout():
    """PYTHONPATH=. python -m dit_ops doctor"""
    ((assignment, program, *words),) = [words for words in COMMANDS if words[0] == "PYTHONPATH=."]
    name, value = assignment.split("=")
    env = os.environ | {name: value}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "adaln" in done.stdout, done.stderr


def test_commands_named_in_the_text_parse():
    named = [shlex.split(text)[1:] for text in re.findall(r"`(dit-ops [^`]+)`", README)]
    assert named
    for words in named:
        parser().parse_args(words)


def test_options_named_in_the_text_exist():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    known = {option for command in commands().values() for option in command._option_string_actions}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", text))
    assert {"--preview", "--sequence-parallel", "--float8"} <= named <= known


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return action.choices


@pytest.mark.slow
def test_rooms_path_by_hand_ends_in_a_video(tmp_path, monkeypatch, capsys):
    """The first block of dit-ops commands, in order, with two videos and two steps of everything."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    smaller = {"preprocess": ["--count", "2"], "train": ["steps=2", "data.batch_size=1", "options.num_steps=4"]}
    chain = [words for words in OURS if "wan" not in " ".join(words) and words[0] in ("preprocess", "train", "generate")]
    assert [words[0] for words in chain] == ["preprocess", *["train"] * 5, "generate"]
    for words in chain:
        extra = smaller.get(words[0], [])
        if words[0] == "train" and not hasattr(load_config(words[1]).options, "num_steps"):
            extra = extra[:2]
        assert main([*words, *extra]) == 0, capsys.readouterr().err
    (video,) = tmp_path.glob("out/videos/*.mp4")
    assert video.stat().st_size > 1000


def test_operator_table_is_true():
    header, _, *rows = [
        line.strip("|").split("|")
        for line in README.splitlines()
        if re.match(r"\| (operator|`\w+`) \||\| --- \| --- \| :-", line)
    ]
    backends = [cell.strip(" `") for cell in header[2:]]
    assert tuple(backends) == lib.BACKENDS
    claimed = {row[0].strip(" `"): {b for b, cell in zip(backends, row[2:], strict=True) if cell.strip()} for row in rows}
    real = {}
    for name, op in public_ops().items():
        refused = explain(op, **sample_arguments(op, torch.device("cpu"))).refused
        real[name] = {b for b in lib.BACKENDS if refused.get(b) not in ("not written yet", "it has dense attention only")}
    assert claimed == real


def test_paths_in_the_text_exist():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    paths = re.findall(r"`((?:[\w.-]+/)*[\w.-]+/|[\w/.-]+\.(?:md|py|toml))`", text)
    assert len(paths) > 10
    folders = ("", "dit_ops", "training")
    missing = [path for path in paths if not any((ROOT / folder / path).exists() for folder in folders)]
    assert set(missing) <= {"out/demo/index.html"}
