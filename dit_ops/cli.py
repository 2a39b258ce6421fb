"""`dit-ops demo · train · generate · preprocess · convert · bench · doctor`.

What the user got wrong ends in one sentence on stderr and exit code 2; Ctrl-C in 130. Heavy imports wait inside the commands.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, NotImplementedError) as error:
        message = str(error)
        print(f"dit-ops {arguments.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dit-ops {arguments.command}: {stop or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dit-ops", description="Video diffusion transformers as real-time, camera-controlled world models."
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    p = _command(commands, "demo", _demo, "render rooms, train all stages, generate, score, write a report")
    p.add_argument("--output", type=Path, default=Path("out/demo"), help="folder (default: %(default)s)")
    p.add_argument("--preset", default="tiny", help="tiny: two CPU cores; gpu: ten minutes on one GPU (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="start over instead of skipping finished steps")

    p = _command(commands, "train", _train, "run one training stage from a YAML config")
    p.add_argument("config", type=Path, help="YAML file, such as configs/rooms-tiny/bidirectional.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="change config values, such as optim.lr=1e-4")
    p.add_argument("--no-resume", action="store_true", help="refuse to go on from the checkpoints in the output folder")

    p = _command(commands, "generate", _generate, "generate videos from prompts and camera trajectories")
    p.add_argument("--model", type=Path, required=True, help="model directory: ours, or a stock diffusers Wan pipeline")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--prompts", type=Path, help='JSONL file of {"prompt": …, "pose": …, "seed": …}')
    p.add_argument(
        "--pose", help="pose string such as w*4,l*8 (one pose per latent frame, plus the first), or a pose JSON file"
    )
    p.add_argument("--frames", type=int, help="latent frames (default: what the pose gives)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=Path("out/videos"), help="folder, or an .mp4 file for a single video")
    p.add_argument("--overwrite", action="store_true", help="generate again what is finished")
    p.add_argument("--mode", choices=("bidirectional", "autoregressive", "few_step"), help="default: what the model says")
    p.add_argument("--steps", type=int, dest="num_steps", help="steps of a multi-step sampler")
    p.add_argument("--guidance", type=float, help="classifier-free guidance; 1 turns it off")
    p.add_argument("--solver", choices=("euler", "unipc"))
    p.add_argument("--shift", type=float, help="shift of the flow schedule")
    p.add_argument("--negative-prompt")
    p.add_argument("--height", type=int, help="pixels")
    p.add_argument("--width", type=int, help="pixels")
    p.add_argument("--fps", type=float, help="frames per second of the file")
    p.add_argument("--block-frames", type=int, help="latent frames per causal block")
    p.add_argument("--window-frames", type=int, help="latent frames that the KV cache keeps, sink and current block included")
    p.add_argument("--sink-frames", type=int, help="first latent frames that the KV cache never drops")
    p.add_argument("--condition", type=Path, help="directory of the condition (text encoder and codec), if the model has none")
    p.add_argument("--device", help="default: the GPU if there is one")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")

    p = _command(commands, "preprocess", _preprocess, "make a latent data set from rendered rooms or a folder of mp4 files")
    p.add_argument("source", help="a folder of mp4 files with captions and poses, or the word rooms")
    p.add_argument("output", type=Path, help="folder of the data set")
    p.add_argument("--size", default="64", help="pixels: one number, or HEIGHTxWIDTH (default: %(default)s)")
    p.add_argument("--frames", type=int, help="pixel frames per video (rooms: 8; mp4: all that fill latent frames)")
    p.add_argument("--fps", type=float, help="frames per second of the data set")
    p.add_argument("--split", help="name of the split that the samples belong to (rooms: train)")
    p.add_argument("--count", type=int, default=256, help="rooms: number of videos (default: %(default)s)")
    p.add_argument("--prompt", action="append", dest="prompts", help="rooms: a room; may be repeated")
    p.add_argument("--exclude", action="append", default=[], help="rooms: a pose string to hold out; may be repeated")
    p.add_argument("--seed", type=int, default=0, help="rooms: seed of the trajectories")
    p.add_argument(
        "--condition", type=Path, help="mp4: directory of the condition; default: a linear codec fitted to the videos"
    )
    p.add_argument("--device", help="default: the GPU if there is one")
    p.add_argument("--overwrite", action="store_true", help="replace the data set instead of going on with it")

    p = _command(commands, "convert", _convert, "turn an original Wan or minWM checkpoint into a diffusers transformer folder")
    p.add_argument("weights", type=Path, help=".pt or .safetensors file with the original key names")
    p.add_argument("output", type=Path, help="transformer folder to write")
    p.add_argument("--config", type=Path, required=True, help="the original config.json")
    p.add_argument("--block-frames", type=int, help="latent frames per causal block")
    p.add_argument("--ema", action=argparse.BooleanOptionalAction, help="take generator_ema or not; default: if it is there")

    p = _command(commands, "bench", _bench, "microbenchmarks of the ops; further arguments go to the benchmark")
    p.add_argument("op", nargs="?", help="default: every op")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    _command(commands, "doctor", _doctor, "what this machine offers, and which backend each op will use")
    return top


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    p.set_defaults(run=run)
    return p


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _demo(a: argparse.Namespace) -> None:
    from dit_ops.demo import demo

    print(demo(a.output, a.preset, a.seed, overwrite=a.overwrite, say=_say))


def _train(a: argparse.Namespace) -> None:
    from dit_ops.training.config import load_config
    from dit_ops.training.engine import run
    from dit_ops.training.validation import validation_videos

    config = load_config(a.config, a.overrides)
    print(run(config, resume=not a.no_resume, validate=validation_videos(config)))


SAMPLER = [
    *("frames", "num_steps", "guidance", "solver", "shift", "negative_prompt", "height", "width", "fps"),
    *("block_frames", "window_frames", "sink_frames"),
]


def _generate(a: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from dit_ops.pipelines import files, loading

    items = files.read_items(a.prompts, a.pose, a.seed) if a.prompts else [files.Item(a.prompt, a.pose, a.seed)]
    options = {name: getattr(a, name) for name in SAMPLER}
    model = files.fingerprint(a.model, a.mode, a.dtype)
    wanted = [files.request(item, model, options) for item in items]
    paths = files.output_paths(a.output, wanted)
    todo = {path: (item, request) for path, item, request in zip(paths, items, wanted, strict=True)}
    for path, (_, request) in list(todo.items()):
        if not a.overwrite and files.is_finished(path, request):
            _say(f"{path}: finished before")
            del todo[path]
    if not todo:
        return
    dtype = getattr(torch, a.dtype) if a.dtype else None
    pipeline = loading.load(a.model, a.device, dtype, mode=a.mode, condition=a.condition)
    for number, (path, (item, request)) in enumerate(todo.items(), 1):
        with tqdm(desc=f"video {number} of {len(todo)}", unit="step") as bar:

            def on_step(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            record = files.generate_file(pipeline, item, path, request, on_step=on_step)
        _say(f"{record['pixel_frames']} frames in {record['seconds']} s, the first after {record['first_chunk_seconds']} s")
        print(path)


def _preprocess(a: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from dit_ops import conditions, rooms
    from dit_ops.training.preprocess import make_rooms, preprocess

    try:
        size = tuple(int(n) for n in a.size.split("x"))
    except ValueError:
        size = ()
    if len(size) not in (1, 2):
        raise ValueError(f"--size must be a number or HEIGHTxWIDTH, got {a.size!r}")
    height, width = size * 2 if len(size) == 1 else size
    device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    mode: Literal["overwrite", "resume"] = "overwrite" if a.overwrite else "resume"
    with tqdm(unit="video") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if a.source == "rooms":
            dataset = make_rooms(
                a.output,
                prompts=a.prompts or rooms.PROMPTS,
                count=a.count,
                frames=a.frames or 8,
                size=(height, width),
                seed=a.seed,
                split=a.split or "train",
                exclude=a.exclude,
                fps=a.fps or 8,
                mode=mode,
                device=device,
                progress=progress,
            )
        else:
            condition = conditions.load(a.condition).to(device) if a.condition else None
            options = {"frames": a.frames, "fps": a.fps, "split": a.split, "mode": mode, "progress": progress}
            dataset = preprocess(a.source, a.output, condition, size=(height, width), **options)
    _say(f"{len(dataset)} samples")
    print(a.output)


def _convert(a: argparse.Namespace) -> None:
    import json

    from dit_ops.backbones.wan import WanBackbone

    config = json.loads(a.config.read_text(encoding="utf-8"))
    WanBackbone.from_original(a.weights, config, block_frames=a.block_frames, ema=a.ema).save_pretrained(a.output)
    print(a.output)


def _bench(a: argparse.Namespace) -> None:
    import runpy

    folder = Path(__file__).resolve().parent / "bench"
    known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if a.op is not None and a.op not in known:
        raise ValueError(f"op must be one of {', '.join(known)}, got {a.op!r}")
    before = sys.argv
    try:
        for op in [a.op] if a.op else known:
            sys.argv = [f"bench_{op}", *a.arguments]
            runpy.run_path(str(folder / f"bench_{op}.py"), run_name="__main__")
    finally:
        sys.argv = before


def _doctor(a: argparse.Namespace) -> None:
    from dit_ops.doctor import doctor

    print(doctor())
