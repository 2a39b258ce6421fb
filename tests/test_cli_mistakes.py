"""Damaged and foreign files through the command line: one sentence, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_pipelines import SETTINGS, make_backbone
from toy_stage import MODEL, write_dataset

from dit_ops.backbones.wan import WanBackbone
from dit_ops.cli import main
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines import loading
from dit_ops.rooms import PROMPTS, film
from dit_ops.video import write_mp4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes") / "model"
    condition = LinearCondition.fit(torch.rand(1, 1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    loading.save(folder, "few_step", make_backbone(), condition, SETTINGS)
    return folder


def sentence(argv: list[str], capsys, output: Path) -> str:
    """The error of a command that must fail and leave nothing at `output`."""
    before = sorted(output.parent.iterdir())
    assert main(argv) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith(f"dit-ops {argv[0]}: ") and "Traceback" not in captured.err and captured.out == ""
    assert not output.exists() and sorted(output.parent.iterdir()) == before, "nothing is left, not even a hidden file"
    return line


def generate(model: Path, output: Path) -> list[str]:
    return [
        "generate",
        "--model",
        str(model),
        "--prompt",
        "a room",
        "--pose",
        "w*2",
        "--device",
        "cpu",
        "--output",
        str(output),
    ]


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "transformer/camera.safetensors"])
def test_a_truncated_weight_file(model, tmp_path, capsys, file):
    copy = shutil.copytree(model, tmp_path / "model")
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    assert Path(file).name in sentence(generate(copy, tmp_path / "out"), capsys, tmp_path / "out")


def test_a_missing_camera_file(model, tmp_path, capsys):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "transformer" / "camera.safetensors").unlink()
    assert "camera" in sentence(generate(copy, tmp_path / "out"), capsys, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "MochiPipeline"}, "unknown pipeline class 'MochiPipeline'; known: Bidirectional"),
        ("transformer/config.json", {"_class_name": "MochiTransformer3DModel"}, "no backbone for 'MochiTransformer3DModel'"),
        ("model_index.json", {"guidanse": 3}, "did you mean guidance?"),
    ],
)
def test_an_unknown_class_or_key(model, tmp_path, capsys, file, change, message):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    line = sentence(generate(copy, tmp_path / "out"), capsys, tmp_path / "out")
    assert message in line and ("_class_name" not in change or "docs/adding_a_backbone.md" in line)


class Code:
    def __reduce__(self):
        return print, ("this code must not run",)


def original(state: dict) -> dict:
    from dit_ops.backbones.wan_original import original as name

    return {f"model.{name(key)}": value for key, value in state.items()}


CONFIG = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "in_dim": 2, "out_dim": 2, "text_dim": 8, "freq_dim": 16}


@pytest.fixture
def weights() -> dict:
    return original(WanBackbone.from_config(MODEL).transformer.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w | {"model.nonsense.weight": torch.zeros(1)}, "nonsense.weight"),
        (lambda w: {k: v for k, v in w.items() if k != "model.head.head.bias"}, "proj_out.bias"),
        (lambda w: w | {"model.head.head.bias": torch.zeros(3)}, "proj_out.bias"),
        (lambda w: w | {"code": Code()}, "not a plain torch weight file"),
    ],
    ids=["a wrong key", "a missing key", "a wrong shape", "code"],
)
def test_weights_that_do_not_fit(tmp_path, capsys, weights, damage, message):
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save({"generator": damage(weights)} if "Code" not in str(damage(weights)) else damage(weights), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    output = tmp_path / "out"
    argv = ["convert", str(folder / "model.pt"), str(output), "--config", str(folder / "config.json")]
    assert message in sentence(argv, capsys, output)
    assert "this code must not run" not in capsys.readouterr().out
    (folder / "config.json").write_text("{}")
    assert "original config.json of Wan ('dim')" in sentence(argv, capsys, output)


def test_a_clip_without_its_camera(tmp_path, capsys):
    source = tmp_path / "clips"
    source.mkdir()
    write_mp4(source / "a.mp4", film(PROMPTS[0], "w*2", 32), 8)
    (source / "a.txt").write_text("a room")
    argv = ["preprocess", str(source), str(tmp_path / "out"), "--size", "32", "--device", "cpu"]
    assert "must have one pose" in sentence(argv, capsys, tmp_path / "out")
    lines = '{"video": "a.mp4", "pose": "gone.json"}'
    (source / "captions.jsonl").write_text(lines)
    assert "gone.json" in sentence(argv, capsys, tmp_path / "out")
    (source / "captions.jsonl").unlink()
    (source / "a.pose").write_text("w*2")
    assert "--shard must be I/N" in sentence([*argv, "--shard", "1of2"], capsys, tmp_path / "out")
    assert "part must be (i, n)" in sentence([*argv, "--shard", "2/2"], capsys, tmp_path / "out")


def test_a_damaged_data_set(tmp_path, capsys):
    data = write_dataset(tmp_path / "data")
    shard = next(data.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:200])
    config = {
        "stage": "bidirectional",
        "output": str(tmp_path / "run"),
        "steps": 1,
        "device": "cpu",
        "model": {"config": MODEL},
    }
    config |= {"data": {"path": str(data), "batch_size": 1, "split": "train"}, "tensorboard": False}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    message = sentence(["train", str(tmp_path / "run.yaml")], capsys, tmp_path / "run")
    assert f"{shard.name} is truncated" in message
