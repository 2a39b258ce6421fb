"""The command line: errors in one sentence, generated files, a whole training run, and the demo on toy sizes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_pipelines import CONFIG, SETTINGS, make_backbone

from dit_ops import demo as demo_module
from dit_ops.cli import main
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines import files, loading
from dit_ops.video import read_mp4

CONFIGS = Path(__file__).parents[1] / "configs" / "rooms-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    condition = LinearCondition.fit(torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    loading.save(folder, "few_step", make_backbone(), condition, SETTINGS)
    return folder


def generate(model: Path, output: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(model), "--output", str(output), "--device", "cpu", *arguments])


def test_help_needs_no_heavy_import():
    code = "import sys; from dit_ops.cli import parser; parser().format_help(); print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_generate_writes_a_video_and_its_side_car_once(model, tmp_path, capsys):
    arguments = ("--prompt", "A red/room: ../with a ball?", "--pose", "w*2,l*2", "--seed", "3")
    assert generate(model, tmp_path, *arguments) == 0
    (video,) = tmp_path.glob("*.mp4")
    assert video.name.startswith("a-red-room-with-a-ball_w-2-l-2_seed3_") and capsys.readouterr().out.strip() == str(video)
    frames, fps = read_mp4(video)
    assert frames.shape == (5, 3, 32, 48) and fps == SETTINGS.fps
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["request"]["prompt"] == "A red/room: ../with a ball?" and record["request"]["seed"] == 3
    assert record["pipeline"] == "FewStepPipeline" and record["chunks"] == 3 and record["pixel_frames"] == 5
    assert record["settings"]["denoising_steps"] == [1000, 500]

    made = video.stat().st_mtime_ns
    assert generate(model, tmp_path, *arguments) == 0
    assert "finished before" in capsys.readouterr().err and video.stat().st_mtime_ns == made
    assert generate(model, tmp_path, *arguments, "--overwrite") == 0
    assert video.stat().st_mtime_ns > made


def test_only_finished_work_is_skipped(model, tmp_path, capsys):
    arguments = ("--prompt", "a room", "--pose", "w*2")
    assert generate(model, tmp_path, *arguments) == 0
    (video,) = tmp_path.glob("*.mp4")
    video.with_suffix(".json").unlink()  # stopped between the two files
    assert generate(model, tmp_path, *arguments) == 0
    assert "finished before" not in capsys.readouterr().err and video.with_suffix(".json").is_file()
    trained = shutil.copytree(model, tmp_path / "model")
    assert generate(trained, tmp_path / "b", *arguments) == 0
    (trained / "transformer" / "camera.safetensors").touch()
    assert generate(trained, tmp_path / "b", *arguments) == 0
    assert "finished before" not in capsys.readouterr().err and len(list((tmp_path / "b").glob("*.mp4"))) == 1


def test_every_request_has_its_own_file_name(model, tmp_path):
    lines = [
        {"prompt": "a room", "pose": "w*2"},
        {"prompt": "a room", "pose": "s*2"},
        {"prompt": "a room", "pose": "w*2", "seed": 1},
        {"prompt": "a room!", "pose": "w*2"},
        {"prompt": "a room"},
        {"prompt": "a room", "pose": "w*2"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = ("--prompts", str(tmp_path / "prompts.jsonl"), "--pose", "d*2")
    assert generate(model, tmp_path / "out", *prompts) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 5  # the last line repeats the first
    assert generate(model, tmp_path / "out", *prompts, "--fps", "4") == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 10


def test_names_are_safe_and_tell_models_apart():
    wanted = files.request(files.Item("../../ÄÖ  " + "x" * 500, "w*2"), {"path": "a", "weights": "1"}, {"fps": None})
    stem = files.file_stem(wanted)
    assert len(stem) < 120 and set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    assert files.file_stem(wanted | {"model": {"path": "a", "weights": "2"}}) == stem
    assert files.file_stem(wanted | {"model": {"path": "b", "weights": "1"}}) != stem


def test_pose_file_and_single_output_file(model, tmp_path):
    pose = {str(i): {"extrinsic": torch.eye(4).tolist(), "K": [[50, 0, 50], [0, 90, 50], [0, 0, 1]]} for i in range(4)}
    (tmp_path / "pose.json").write_text(json.dumps(pose))
    arguments = ("--prompt", "a room", "--pose", str(tmp_path / "pose.json"))
    assert generate(model, tmp_path / "one.mp4", *arguments, "--mode", "autoregressive", "--steps", "2") == 0
    assert len(read_mp4(tmp_path / "one.mp4")[0]) == 4
    assert json.loads((tmp_path / "one.json").read_text())["pipeline"] == "AutoregressivePipeline"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --model {tmp}/none --prompt a", "must hold model_index.json"),
        ("generate --model {model} --prompt a --device cpu --output {tmp}/out", "pose is needed"),
        ("generate --model {model} --prompt a --pose w*2,q*1 --device cpu --output {tmp}/out", "segment 2"),
        ("generate --model {model} --prompt a --pose w*2 --frames 9 --device cpu --output {tmp}/out", "gives 3 latent frames"),
        ("generate --model {model} --prompt a --pose {tmp}/no.json --device cpu --output {tmp}/out", "no.json"),
        (
            "generate --model {model} --prompts {tmp}/bad.jsonl --device cpu --output {tmp}/out",
            "line 2: expected an object with a",
        ),
        ("generate --model {model} --prompts {tmp}/two.jsonl --output {tmp}/a.mp4", "must be a folder for 2 videos"),
        ("train {tmp}/none.yaml", "none.yaml"),
        ("train {configs}/bidirectional.yaml optim.lrr=1", "did you mean"),
        ("demo --preset huge --output {tmp}/out", "preset must be one of tiny, gpu, got 'huge'"),
        ("demo --backbone mochi --output {tmp}/out", "backbone must be one of wan, hunyuan_video15, got 'mochi'"),
        ("preprocess rooms {tmp}/out --size 12by12", "--size must be a number or HEIGHTxWIDTH"),
        ("preprocess rooms {tmp}/out --count 1 --prompt nonsense", "nonsense"),
        ("preprocess {tmp} {tmp}/out", "must be a folder with .mp4 files"),
        ("bench nonsense", "op must be one of adaln"),
        ("convert {tmp}/none.pt {tmp}/out --config {tmp}/none.json", "none.json"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(model, tmp_path, capsys, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "pose": "w*2"}\n{"text": "b"}\n')
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "pose": "w*2"}\n{"prompt": "b", "pose": "w*2"}\n')
    argv = [word.format(tmp=tmp_path, model=model, configs=CONFIGS) for word in arguments.split()]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"dit-ops {argv[0]}: ") and message in error
    assert not list(tmp_path.rglob("*.mp4"))


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(demo_module, "demo", stop)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "dit-ops demo: stopped after step 3\n"


def test_a_full_gpu_is_one_sentence(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of …")

    monkeypatch.setattr(demo_module, "demo", full)
    assert main(["demo"]) == 2
    expected = "CUDA out of memory; docs/low_memory.md and docs/distributed.md say what helps\n"
    assert capsys.readouterr().err == f"dit-ops demo: {expected}"


def test_an_error_of_ours_is_a_traceback(monkeypatch):
    def bug(*args, **kwargs):
        raise RuntimeError("something inside is wrong")

    monkeypatch.setattr(demo_module, "demo", bug)
    with pytest.raises(RuntimeError, match="something inside"):
        main(["demo"])


def test_a_reader_that_has_enough_is_no_error():
    env = os.environ | {"PYTHONPATH": str(CONFIGS.parents[1])}
    with subprocess.Popen([sys.executable, "-m", "dit_ops", "plan"], stdout=-1, stderr=-1, env=env) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_bench_passes_its_arguments_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dit_ops.cli.__file__", str(tmp_path / "cli.py"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_adaln.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv[1:])")
    before = list(sys.argv)
    assert main(["bench", "adaln", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == "['--device', 'cpu']" and sys.argv == before


def small_configs(folder: Path) -> Path:
    """configs/rooms-tiny with a toy model and two steps per stage."""
    folder.mkdir(parents=True)
    for path in CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        config |= {"steps": 2, "log_every": 1, "tensorboard": False}
        config["data"]["batch_size"] = 2
        if "config" in config.get("model", {}):
            config["model"]["config"] = CONFIG
        if path.stem in ("bidirectional", "teacher_forcing"):
            config["sampler"]["num_steps"] = 2
        if path.stem == "ode_sampling":
            config["options"]["num_steps"] = 4
        (folder / path.name).write_text(yaml.safe_dump(config))
    return folder


def test_rooms_to_a_trained_model_with_validation_videos(tmp_path, capsys):
    data = tmp_path / "data"
    rooms = ["preprocess", "rooms", str(data), "--count", "4", "--size", "32x48", "--frames", "4", "--exclude", "l*3"]
    assert main([*rooms, "--prompt", "a red room with a blue ball"]) == 0
    assert "4 samples" in capsys.readouterr().err
    config = small_configs(tmp_path / "configs") / "bidirectional.yaml"
    overrides = [f"data.path={data}", f"output={tmp_path}/run", "validate.every=2"]
    overrides += ["validate.prompts=[a red room with a blue ball]", "validate.poses=['l*3']"]
    assert main(["train", str(config), *overrides]) == 0
    model = capsys.readouterr().out.strip()
    assert model == f"{tmp_path}/run/model"
    (video,) = (tmp_path / "run" / "validation").rglob("*.mp4")
    assert len(read_mp4(video)[0]) == 4
    assert main(["train", str(config), *overrides, "--no-resume"]) == 2
    assert generate(Path(model), tmp_path / "out", "--prompt", "a red room with a blue ball", "--pose", "l*3") == 0


@pytest.fixture
def toy_demo(tmp_path, monkeypatch):
    """demo() on toy sizes; returns (function of output and seed, lines that it said)."""
    configs = small_configs(tmp_path / "configs" / "rooms-tiny")
    plan = demo_module.Preset(("a red room with a blue ball",), 4, 5, 32, ("l*4", "w*2,j*2"))
    monkeypatch.setattr(demo_module, "config_folder", lambda preset: configs)
    monkeypatch.setitem(demo_module.PRESETS, "tiny", plan)
    said: list[str] = []

    def run(output: Path, seed: int = 0, **options) -> dict:
        said.clear()
        page = demo_module.demo(output, "tiny", seed, say=said.append, **options)
        assert page == output / "index.html"
        return json.loads((output / "scores.json").read_text())

    return run, said


def test_demo_runs_every_stage_resumes_and_repeats(toy_demo, tmp_path, monkeypatch):
    run, said = toy_demo
    scores = run(tmp_path / "a")
    assert list(scores["models"]) == list(demo_module.MODELS) and scores["codec_psnr"] > 15
    for result in scores["models"].values():
        assert len(result["samples"]) == 2
        assert result["difference"] == pytest.approx(result["psnr"] - result["psnr_wrong"], abs=1e-3)
    page = (tmp_path / "a" / "index.html").read_text()
    for name in ("student", "held-out-1", "held-out-2"):
        assert f'src="videos/{name}.mp4"' in page and (tmp_path / "a" / "videos" / f"{name}.mp4").is_file()
    assert page.count("<svg") == 5 and "DMD student" in page
    assert len(said) == 14 and said[0].startswith("[1/13] data") and said[-1].startswith("done in")

    # finished steps are skipped, also in a folder that was moved
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert run(tmp_path / "moved") == scores
    assert sum("done before" in line for line in said) == 12

    # a changed config repeats that stage and what follows from it, nothing else
    path = demo_module.config_folder("tiny") / "causal_ode.yaml"
    path.write_text(path.read_text() + "clip_norm: 0.5\n")
    run(tmp_path / "moved")
    again = [line.split("] ")[1].split(" (")[0] for line in said if "done before" not in line and line.startswith("[")]
    assert again == ["causal_ode", "dmd", "videos of causal_ode", "videos of dmd", "report"]


def test_demo_with_the_other_backbone(toy_demo, tmp_path):
    run, _ = toy_demo
    scores = run(tmp_path / "a", backbone="hunyuan_video15")
    assert list(scores["models"]) == list(demo_module.MODELS)
    for stage in demo_module.MODELS:
        config = json.loads((tmp_path / "a" / stage / "model" / "transformer" / "config.json").read_text())
        assert config["_class_name"] == "HunyuanVideo15Transformer3DModel" and config["num_layers"] == CONFIG["num_layers"]


def test_demo_gives_the_same_figures_twice(toy_demo, tmp_path):
    run, _ = toy_demo
    first = run(tmp_path / "a")
    assert run(tmp_path / "b") == first
    assert run(tmp_path / "a", overwrite=True) == first
    assert run(tmp_path / "a", seed=1)["models"] != first["models"]


def test_demo_goes_on_after_it_was_stopped_and_touches_no_foreign_folder(toy_demo, tmp_path, monkeypatch):
    run, said = toy_demo
    train = demo_module._train

    def stop(config):
        if config.stage == "causal_ode":
            raise KeyboardInterrupt
        train(config)

    monkeypatch.setattr(demo_module, "_train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a")
    monkeypatch.setattr(demo_module, "_train", train)
    run(tmp_path / "a")
    assert [line.split(" (")[0] for line in said[:6]] == [
        "[1/13] data: done before",
        "[2/13] bidirectional: done before",
        "[3/13] teacher_forcing: done before",
        "[4/13] ode_sampling: done before",
        "[5/13] causal_ode",
        "[6/13] consistency",
    ]
    (tmp_path / "b" / "data").mkdir(parents=True)
    (tmp_path / "b" / "data" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not made by the demo"):
        run(tmp_path / "b")
    assert (tmp_path / "b" / "data" / "precious.txt").is_file()


def test_configs_are_found_in_the_checkout():
    for preset in demo_module.PRESETS:
        assert {path.stem for path in demo_module.config_folder(preset).glob("*.yaml")} == set(demo_module.STAGES)
    with pytest.raises(FileNotFoundError, match="configs/rooms-none was found neither in"):
        demo_module.config_folder("none")
