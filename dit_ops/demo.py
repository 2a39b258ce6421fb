"""The main job: from rendered rooms to a 4-step, camera-controlled, causal world model, and a page that shows and scores it.

rooms → bidirectional → teacher forcing → ODE trajectories → causal ODE → consistency → DMD → videos and scores → report
Every step is skipped when it was finished before with the same inputs, and a stopped one goes on where it was.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_ops import rooms
from dit_ops.camera import mirror_trajectory
from dit_ops.conditions import load as load_condition
from dit_ops.evaluate import Sample, generate_samples, held_out_samples, score
from dit_ops.files import atomic_path
from dit_ops.pipelines import loading
from dit_ops.report import Points, Report, Score, Strip, write_report
from dit_ops.training.config import RunConfig, config_dict, load_config
from dit_ops.training.engine import device_of, run
from dit_ops.training.preprocess import make_rooms
from dit_ops.training.validation import validation_videos
from dit_ops.video import to_uint8, write_mp4

STAGES = ("bidirectional", "teacher_forcing", "ode_sampling", "causal_ode", "consistency", "dmd")
MODELS = {  # stages that leave a model: what the report calls it
    "bidirectional": "Bidirectional",
    "teacher_forcing": "Autoregressive",
    "causal_ode": "Causal ODE",
    "consistency": "Consistency",
    "dmd": "DMD student",
}


BACKBONES = ("wan", "hunyuan_video15")  # the first is that of configs/rooms-<preset>/


@dataclass(frozen=True)
class Preset:
    """The rooms that a demo trains on, and the pose strings that it holds out. Models are in configs/rooms-<preset>/."""

    prompts: tuple[str, ...]
    videos: int
    frames: int
    size: int  # pixels
    held_out: tuple[str, ...]
    patch: int = 8
    fps: float = 8
    threads: int | None = None  # CPU threads of PyTorch; None = its own choice


PRESETS = {
    "tiny": Preset(rooms.PROMPTS[:2], 256, 8, 64, ("l*7", "a*3,l*4", "w*5,j*2", "d*7"), patch=16, fps=4, threads=1),
    "gpu": Preset(rooms.PROMPTS, 4096, 16, 128, ("l*15", "a*8,l*7", "w*6,j*9", "d*8,i*7")),
}


def demo(
    output: str | Path = "out/demo",
    preset: str = "tiny",
    seed: int = 0,
    *,
    backbone: str = "wan",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Runs every step that is not done yet and returns the page; `say` is given a line at each step."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    with reproducible(PRESETS[preset].threads):
        return _demo(Path(output), preset, seed, backbone, overwrite, say)


@contextmanager
def reproducible(threads: int | None) -> Iterator[None]:
    """The same figures twice, on CUDA too; a fixed number of CPU threads also gives them on another number of cores.

    A model as small as the tiny preset's is best on one thread: on two free cores a second thread saves a third of a step,
    beside any other load the two wait for each other and a step takes ten times as long.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=True)


def _demo(output: Path, preset: str, seed: int, backbone: str, overwrite: bool, say: Callable[[str], None]) -> Path:
    configs = stage_configs(preset, output, seed, backbone)
    plan = PRESETS[preset]
    journal = Journal(output, steps=len(STAGES) + len(MODELS) + 2, say=say, overwrite=overwrite)
    data = journal.step("data", {"preset": asdict(plan), "seed": seed}, output / "data", lambda: _rooms(plan, seed, output))
    digests = {"data": data}
    for stage, config in configs.items():
        inputs: dict[str, Any] = {
            "config": portable(config, output),
            "after": [digests[name] for name in sources(config, output)],
        }
        digests[stage] = journal.step(stage, inputs, Path(config.output), partial(_train, config))
    samples = held_out_samples(plan.prompts, plan.held_out, plan.size)
    for stage in MODELS:
        folder = output / "generated" / stage
        inputs = {"after": digests[stage], "held_out": list(plan.held_out), "seed": seed}
        job = partial(_generate, output / stage / "model", samples, seed, folder)
        journal.step(f"videos of {stage}", inputs, folder, job)
    journal.announce("report")
    page = _report(output, preset, seed, configs, samples, journal)
    journal.announce_end(page)
    return page


class Journal:
    """Which steps of an output folder are finished, with what inputs: `<output>/.demo/<step>.json`."""

    def __init__(self, output: Path, steps: int, say: Callable[[str], None], overwrite: bool = False):
        self.folder, self.steps, self.say, self.overwrite = output / ".demo", steps, say, overwrite
        self.started, self.number = time.perf_counter(), 0
        self.seconds: dict[str, float] = {}

    def step(self, name: str, inputs: Any, folder: Path, job: Callable[[], None]) -> str:
        """Runs `job`, which fills `folder`, unless it was finished with these inputs; returns the digest of the inputs."""
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        mark = self.folder / f"{name.replace(' ', '-')}.json"
        old = json.loads(mark.read_text()) if mark.is_file() else {}
        if old.get("digest") != digest or self.overwrite:
            if folder.exists() and not old:
                raise FileExistsError(f"{folder} was not made by the demo: choose another output")
            shutil.rmtree(folder, ignore_errors=True)
            old = {}
        if old.get("finished") and folder.exists():
            self.announce(f"{name}: done before")
            self.seconds[name] = old["seconds"]
            return digest
        self.announce(name)
        before = old.get("seconds", 0.0)
        self._write(mark, {"digest": digest, "finished": False, "seconds": before})
        began, finished = time.perf_counter(), False
        try:
            job()
            finished = True
        finally:
            self.seconds[name] = round(before + time.perf_counter() - began, 1)
            self._write(mark, {"digest": digest, "finished": finished, "seconds": self.seconds[name]})
        return digest

    def announce(self, what: str) -> None:
        self.number += 1
        self.say(f"[{self.number}/{self.steps}] {what} ({self.elapsed()} so far)")

    def announce_end(self, page: Path) -> None:
        self.say(f"done in {self.elapsed()}: {page}")

    def elapsed(self) -> str:
        minutes, seconds = divmod(round(time.perf_counter() - self.started), 60)
        return f"{minutes} min {seconds:02d} s"

    def _write(self, mark: Path, content: dict[str, Any]) -> None:
        with atomic_path(mark) as file:
            file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def config_folder(preset: str) -> Path:
    """configs/rooms-<preset>: inside an installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    for root in (here / "configs", here.parent / "configs"):
        if (root / f"rooms-{preset}").is_dir():
            return root / f"rooms-{preset}"
    raise FileNotFoundError(f"configs/rooms-{preset} was found neither in {here} nor in {here.parent}")


def hunyuan_video15_config(wan: dict[str, Any]) -> dict[str, Any]:
    """The HunyuanVideo15Transformer3DModel with the width, depth and token grid of a WanTransformer3DModel config."""
    head = wan["attention_head_dim"]
    across = 2 * ((head - head // 4) // 4)
    return {
        "in_channels": wan["in_channels"],
        "out_channels": wan["out_channels"],
        "num_attention_heads": wan["num_attention_heads"],
        "attention_head_dim": head,
        "num_layers": wan["num_layers"],
        "num_refiner_layers": 1,
        "mlp_ratio": wan["ffn_dim"] / (wan["num_attention_heads"] * head),
        "patch_size": wan["patch_size"][1],
        "text_embed_dim": wan["text_dim"],
        "text_embed_2_dim": wan["text_dim"],
        "image_embed_dim": wan["text_dim"],
        "rope_axes_dim": [head - 2 * across, across, across],
    }


def stage_configs(preset: str, output: Path, seed: int, backbone: str = "wan") -> dict[str, RunConfig]:
    """The preset's config of every stage, with the paths `out/rooms-<preset>/…` moved to `output` and the seed set.

    Only the stage that makes a model from scratch says which backbone it is.
    """
    folder, root = config_folder(preset), Path("out") / f"rooms-{preset}"
    move = lambda path: str(output / Path(path).relative_to(root))
    configs = {}
    for stage in STAGES:
        config = load_config(folder / f"{stage}.yaml", [f"seed={seed}"])
        config.output, config.data.path = move(config.output), move(config.data.path)
        config.init = {role: move(path) for role, path in config.init.items()}
        if backbone == "hunyuan_video15" and config.model.config is not None:
            config.model.class_name = "HunyuanVideo15Transformer3DModel"
            config.model.config = hunyuan_video15_config(config.model.config)
        configs[stage] = config
    return configs


def portable(config: RunConfig, output: Path) -> dict[str, Any]:
    """The config with paths counted from `output`, so that a moved folder is still finished."""
    inside = lambda path: Path(path).relative_to(output).as_posix()
    plain = config_dict(config)
    plain |= {"output": inside(config.output), "init": {role: inside(path) for role, path in config.init.items()}}
    return plain | {"data": plain["data"] | {"path": inside(config.data.path)}}


def sources(config: RunConfig, output: Path) -> list[str]:
    """The earlier steps that a stage reads: the first folder of its data and of its initial weights."""
    return [Path(path).relative_to(output).parts[0] for path in (config.data.path, *config.init.values())]


def _rooms(plan: Preset, seed: int, output: Path) -> None:
    exclude = [*plan.held_out, *map(mirror_trajectory, plan.held_out)]
    make_rooms(
        output / "data",
        prompts=plan.prompts,
        count=plan.videos,
        frames=plan.frames,
        size=plan.size,
        seed=seed,
        exclude=exclude,
        patch=plan.patch,
        fps=plan.fps,
        mode="resume",
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def _train(config: RunConfig) -> None:
    if config.stage == "ode_sampling":
        run(config)
    else:
        run(config, validate=validation_videos(config))


def _generate(model: Path, samples: Sequence[Sample], seed: int, folder: Path) -> None:
    """videos.safetensors and scores.json of one model."""
    pipeline = loading.load(model)
    began = time.perf_counter()
    videos = generate_samples(pipeline, samples, seed)
    settings = pipeline.settings
    steps = len(settings.denoising_steps) if "FewStep" in type(pipeline).__name__ else settings.num_steps
    result = score(videos, samples) | {
        "sampler": f"{steps} steps" + (f", guidance {settings.guidance:g}" if settings.guidance != 1 else ""),
        "seconds_per_video": round((time.perf_counter() - began) / len(samples), 3),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "videos.safetensors") as file:
        save_file({"videos": torch.stack([to_uint8(video) for video in videos])}, file)
    with atomic_path(folder / "scores.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _report(
    output: Path, preset: str, seed: int, configs: dict[str, RunConfig], samples: Sequence[Sample], journal: Journal
) -> Path:
    plan = PRESETS[preset]
    condition = load_condition(output / "data" / "condition")
    truth = torch.stack([sample.truth for sample in samples])
    ceiling = score(condition.decode_to_pixel(condition.encode_to_latent(truth)), samples)
    results = {stage: json.loads((output / "generated" / stage / "scores.json").read_text()) for stage in MODELS}
    figures = {stage: {k: v for k, v in r.items() if not k.startswith("seconds")} for stage, r in results.items()}
    with atomic_path(output / "scores.json") as file:
        content = {"preset": preset, "seed": seed, "codec_psnr": ceiling["psnr"], "models": figures}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    scores = [Score(MODELS[stage], r["sampler"], r["psnr"], r["psnr_wrong"]) for stage, r in results.items()]
    scores.append(Score("Codec alone", "truth, coded: the ceiling", ceiling["psnr"]))
    hero, *strips = _strips(output, samples, results, plan.fps)
    dmd = results["dmd"]
    follows = "follows the camera" if dmd["difference"] > 0 else "does not follow the camera"
    report = Report(
        title="A camera-controlled world model in a few steps",
        subtitle=f"dit-ops demo, preset {preset}, seed {seed}; {plan.frames} frames of {plan.size}×{plan.size} pixels",
        headline=f"{dmd['difference']:+.2f} dB",
        claim=f"The DMD student ({dmd['sampler']}) {follows}: on held-out trajectories its videos reach {dmd['psnr']:.2f} dB "
        f"PSNR to the true render, and {dmd['psnr_wrong']:.2f} dB to the render of the mirrored trajectory.",
        hero=hero,
        scores=scores,
        score_note=f"Mean over {len(samples)} held-out videos: {len(plan.prompts)} prompts along {', '.join(plan.held_out)}. "
        "The wrong trajectory is the mirror image: every key replaced by its opposite.",
        strips=strips,
        charts={stage.replace("_", " "): _curves(Path(c.output)) for stage, c in configs.items() if stage in MODELS},
        configs={stage: yaml.safe_dump(config_dict(c), sort_keys=False) for stage, c in configs.items()},
        facts=_facts(configs["dmd"], journal, results),
    )
    write_report(output / "index.html", report)
    return output / "index.html"


def _strips(output: Path, samples: Sequence[Sample], results: dict[str, Any], fps: float) -> list[Strip]:
    """The DMD student beside both truths, then both truths and every model, for one prompt per held-out trajectory."""
    videos = {stage: load_file(output / "generated" / stage / "videos.safetensors")["videos"] for stage in MODELS}
    poses = list(dict.fromkeys(sample.pose for sample in samples))
    along = [[i for i, s in enumerate(samples) if s.pose == pose] for pose in poses]
    chosen = [same_pose[p % len(same_pose)] for p, same_pose in enumerate(along)]  # another prompt for every pose

    def strip(name: str, i: int, stages: Sequence[str], first: str = "") -> Strip:
        sample = samples[i]
        truths = [
            ("Rendered truth", "the asked trajectory", sample.truth),
            ("Wrong trajectory", "its mirror image", sample.wrong),
        ]
        models = []
        for stage in stages:
            each = results[stage]["samples"][i]
            note = f"{each['psnr']:.1f} dB (wrong {each['psnr_wrong']:.1f})"
            models.append((first + MODELS[stage], note, videos[stage][i].permute(0, 3, 1, 2) / 127.5 - 1))
        panels = models + truths if first else truths + models
        write_mp4(output / "videos" / f"{name}.mp4", side_by_side([video for *_, video in panels]), fps)
        labels = [(label, note) for label, note, _ in panels]
        return Strip(f"“{sample.prompt}” along {sample.pose}", f"videos/{name}.mp4", labels)

    rest = [strip(f"held-out-{n}", i, list(MODELS)) for n, i in enumerate(chosen, 1)]
    return [strip("student", chosen[0], ["dmd"], first="Generated by the "), *rest]


def side_by_side(videos: Sequence[Tensor], height: int = 192, gap: int = 8) -> Tensor:
    """Videos [F, 3, H, W] enlarged by a whole factor to at least `height` rows and joined with grey bars between them."""
    scale = max(1, -(-height // videos[0].shape[-2]))
    large = [video.repeat_interleave(scale, -1).repeat_interleave(scale, -2) for video in videos]
    bar = torch.full((*large[0].shape[:3], gap), 0.0)
    return torch.cat([part for video in large for part in (video, bar)][:-1], dim=-1)


def _curves(folder: Path) -> dict[str, Points]:
    """Losses of a stage's metrics.jsonl by role."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if name.startswith("loss/"):
                lines.setdefault(name.removeprefix("loss/").replace("_", " "), []).append((line["step"], value))
    return dict(lines)


def _facts(config: RunConfig, journal: Journal, results: dict[str, Any]) -> dict[str, str]:
    device = device_of(config)
    packages = ("torch", "triton", "diffusers", "transformers", "safetensors", "av")
    facts = {name: _version(name) for name in packages}
    facts["python"] = f"{platform.python_version()}, {platform.platform()}"
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts["cores"] = str(os.cpu_count())
    facts["seconds per step"] = ", ".join(f"{name} {seconds:.0f}" for name, seconds in journal.seconds.items())
    per_video = (f"{stage} {result['seconds_per_video']}" for stage, result in results.items())
    return facts | {"seconds per generated video": ", ".join(per_video)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
