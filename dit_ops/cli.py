"""`dit-ops demo · train · generate · play · preprocess · convert · bench · plan · doctor`.

What the user got wrong ends in one sentence on stderr and exit code 2; Ctrl-C in 130. Heavy imports wait inside the commands.
"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dit_ops import cli_generate

MISTAKES = ("NotImplementedError", "OutOfMemoryError")  # of the RuntimeErrors; the latter is torch's


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has enough: `dit-ops doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ not in MISTAKES:
            raise
        print(f"dit-ops {arguments.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"dit-ops {arguments.command}: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split()))
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text.split('. ')[0]}; docs/low_memory.md and docs/distributed.md say what helps"
    return text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="dit-ops", description="Video diffusion transformers as real-time, camera-controlled world models."
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    p = _command(commands, "demo", _demo, "render rooms, train all stages, generate, score, write a report")
    p.add_argument("--output", type=Path, help="folder (default: out/demo, or out/demo-<backbone>)")
    p.add_argument(
        "--backbone", default="wan", help="wan or hunyuan_video15, in a size that trains at once (default: %(default)s)"
    )
    p.add_argument("--preset", default="tiny", help="tiny: two CPU cores; gpu: ten minutes on one GPU (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="start over instead of skipping finished steps")

    p = _command(commands, "train", _train, "run one training stage from a YAML config")
    p.add_argument("config", type=Path, help="YAML file, such as configs/rooms-tiny/bidirectional.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="change config values, such as optim.lr=1e-4")
    p.add_argument("--no-resume", action="store_true", help="refuse to go on from the checkpoints in the output folder")

    p = _command(commands, "generate", _generate, "generate videos from prompts and camera trajectories")
    cli_generate.add_arguments(p)

    p = _command(commands, "play", _play, "steer a causal model with the keyboard, on a local web page")
    p.add_argument("--model", type=Path, required=True, help="model directory")
    p.add_argument("--prompt", default="", help="what the page starts with")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; others than this machine need the token")
    p.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    p.add_argument("--token", help="asked for in every request (default: a new one, where --host is not this machine)")
    p.add_argument("--window-frames", type=int, help="latent frames that the KV cache keeps (default: as many as were trained)")
    p.add_argument("--sink-frames", type=int, help="first latent frames that the KV cache never drops")
    p.add_argument("--block-frames", type=int, help="latent frames per causal block")
    p.add_argument(
        "--overlap", action="store_true", help="decode a block while the next one is computed; keys are read one block earlier"
    )
    cli_generate.add_model_arguments(p)

    p = _command(commands, "preprocess", _preprocess, "make a latent data set of rendered rooms, mp4 files or minWM's data")
    p.add_argument("source", help="a folder of mp4 files with captions and poses, the word rooms, or as --format says")
    p.add_argument("output", type=Path, help="folder of the data set")
    p.add_argument(
        "--format",
        choices=("mp4", "lmdb", "pt"),
        default="mp4",
        help="lmdb: minWM's Wan data, an LMDB or a folder of them; pt: the train_index.json of its HunyuanVideo data",
    )
    p.add_argument(
        "--size",
        action="append",
        help="pixels: one number, or HEIGHTxWIDTH (default: 64); mp4: may be repeated, a clip goes to the nearest aspect ratio",
    )
    p.add_argument(
        "--frames",
        type=int,
        action="append",
        help="pixel frames per video (rooms: 8; mp4: all that fill latent frames; if repeated, the most that a clip has)",
    )
    p.add_argument("--fps", type=float, help="frames per second of the data set")
    p.add_argument("--split", help="name of the split that the samples belong to (rooms: train)")
    p.add_argument("--count", type=int, default=256, help="rooms: number of videos (default: %(default)s)")
    p.add_argument("--prompt", action="append", dest="prompts", help="rooms: a room; may be repeated")
    p.add_argument("--exclude", action="append", default=[], help="rooms: a pose string to hold out; may be repeated")
    p.add_argument("--seed", type=int, default=0, help="rooms: seed of the trajectories")
    p.add_argument(
        "--condition", type=Path, help="mp4: directory of the condition; default: a linear codec fitted to the videos"
    )
    p.add_argument("--negative-prompt", default="", help="prompt of the unconditional passes (default: none)")
    p.add_argument("--action", action="store_true", help="mp4: store the action labels of the poses as a condition")
    p.add_argument("--image-condition", action="store_true", help="mp4: store the first frame as a condition: image to video")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of stored latents and text; default: as computed"
    )
    p.add_argument("--shard", metavar="I/N", help="mp4: encode part I of N (default: rank and world size under torchrun)")
    p.add_argument("--negative", type=Path, help="pt: file of the negative prompt's states")
    p.add_argument("--negative-byt5", type=Path, help="pt: file of the negative prompt's glyph states")
    p.add_argument("--device", help="default: the GPU if there is one")
    p.add_argument("--overwrite", action="store_true", help="replace the data set instead of going on with it")

    p = _command(
        commands, "convert", _convert, "turn original weights or a training checkpoint into a diffusers folder, or back"
    )
    p.add_argument(
        "weights", type=Path, help="file with original names (Wan, HunyuanVideo, minWM), training checkpoint, or model folder"
    )
    p.add_argument("output", type=Path, help="transformer folder to write, or with the suffix .pt minWM's model.pt")
    p.add_argument("--config", type=Path, help="the original config.json, for a file with original names")
    p.add_argument("--role", default="generator", help="training checkpoint: which network (default: %(default)s)")
    p.add_argument("--lora", type=Path, help="LoRA weights to merge: a file, or its folder")
    p.add_argument("--block-frames", type=int, help="latent frames per causal block")
    p.add_argument("--ema", action=argparse.BooleanOptionalAction, help="take the average or not; default: if it is there")

    p = _command(commands, "bench", _bench, "microbenchmarks of the ops; further arguments go to the benchmark")
    p.add_argument("op", nargs="?", help="default: every op")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    _command(commands, "plan", _plan, "memory and traffic per GPU of teacher forcing, by calculation, from 1 to 1024 GPUs")

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

    output = a.output or Path("out") / ("demo" if a.backbone == "wan" else f"demo-{a.backbone}")
    print(demo(output, a.preset, a.seed, backbone=a.backbone, overwrite=a.overwrite, say=_say))


def _train(a: argparse.Namespace) -> None:
    from dit_ops.training.config import load_config
    from dit_ops.training.engine import run
    from dit_ops.training.validation import validation_videos

    config = load_config(a.config, a.overrides)
    path = run(config, resume=not a.no_resume, validate=validation_videos(config))
    if os.environ.get("RANK", "0") == "0":
        print(path)


def _plan(a: argparse.Namespace) -> None:
    from dit_ops.training.plan import table

    print(table())


def _generate(a: argparse.Namespace) -> None:
    for path in cli_generate.generate(a, _say):
        print(path)


def _play(a: argparse.Namespace) -> None:
    try:
        from dit_ops.play.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'dit-ops[play]' does it") from error
    pipeline = cli_generate.load_pipeline(a)
    window = a.window_frames
    if window is None:
        window = pipeline.settings.window_frames or pipeline.settings.frames  # a stream has no end
    sink = pipeline.settings.sink_frames if a.sink_frames is None else a.sink_frames
    block = a.block_frames or pipeline.settings.block_frames or getattr(pipeline.backbone, "block_frames", None) or 1
    if sink < window < sink + block:
        raise ValueError(f"--window-frames must hold the sink ({sink}) and a block of {block} frames, got {window}")
    options = {
        "window_frames": window,
        "sink_frames": a.sink_frames,
        "block_frames": a.block_frames,
        "compact_cache": a.compact_cache,
    }
    given = {"token": a.token, "prompt": a.prompt, "options": options, "overlap": a.overlap}
    try:
        serve(pipeline, a.host, a.port, **given, say=_say)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ValueError(f"port {a.port} is in use already; --port 0 takes a free one") from error


def _preprocess(a: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from dit_ops import conditions, rooms
    from dit_ops.training.importers_lmdb import import_lmdb
    from dit_ops.training.importers_pt import import_pt
    from dit_ops.training.preprocess import make_rooms, preprocess

    sizes = [_size(text) for text in a.size or ["64"]]
    frames = a.frames or []
    if a.source == "rooms" and max(len(sizes), len(frames)) > 1:
        raise ValueError("--size and --frames may be repeated for mp4 files only")
    part = _part(a.shard)
    local = os.environ.get("LOCAL_RANK", "0")
    device = cli_generate.device_of(a.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
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
                frames=frames[0] if frames else 8,
                size=sizes[0],
                seed=a.seed,
                split=a.split or "train",
                exclude=a.exclude,
                fps=a.fps or 8,
                mode=mode,
                device=device,
                progress=progress,
            )
        elif a.format == "pt":
            if a.negative is None or a.negative_byt5 is None:
                raise ValueError("--format pt needs --negative and --negative-byt5, the files of the negative prompt's states")
            given = {"negative": a.negative, "negative_byt5": a.negative_byt5}
            dataset = import_pt(a.source, a.output, **given, fps=a.fps or 16, split=a.split, progress=progress)
        elif a.format == "lmdb":
            if a.condition is None:
                raise ValueError("--format lmdb needs --condition, a model directory whose text encoder encodes the prompts")
            condition = conditions.load(a.condition).to(device)
            options = {"fps": a.fps or 16, "negative_prompt": a.negative_prompt, "split": a.split, "progress": progress}
            dataset = import_lmdb(a.source, a.output, condition, **options)
        else:
            dataset = preprocess(
                a.source,
                a.output,
                conditions.load(a.condition).to(device) if a.condition else None,
                size=sizes,
                frames=frames or None,
                fps=a.fps,
                negative_prompt=a.negative_prompt,
                image=a.image_condition,
                action=a.action,
                split=a.split,
                part=part,
                dtype=getattr(torch, a.dtype) if a.dtype else None,
                mode=mode,
                progress=progress,
            )
    _say(f"{len(dataset)} samples in {dataset.directory}")
    print(a.output)


def _size(text: str) -> tuple[int, int]:
    try:
        size = tuple(int(n) for n in text.split("x"))
    except ValueError:
        size = ()
    if len(size) not in (1, 2):
        raise ValueError(f"--size must be a number or HEIGHTxWIDTH, got {text!r}")
    return size[0], size[-1]


def _part(text: str | None) -> tuple[int, int]:
    """(i, n) of --shard I/N, else of torchrun's environment."""
    text = text or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--shard must be I/N, part I (from 0) of N, got {text!r}")
    return int(numbers[0]), int(numbers[1])


def _convert(a: argparse.Namespace) -> None:
    from dit_ops import convert
    from dit_ops.registry import load_backbone

    if a.config or a.weights.is_file():
        if a.config is None:
            raise ValueError(f"--config, the original config.json, is needed for the original weights {a.weights}")
        backbone = convert.from_original(a.weights, a.config, block_frames=a.block_frames, ema=a.ema)
    elif (a.weights / "trainer.json").is_file():
        backbone = convert.from_checkpoint(a.weights, a.role, ema=a.ema)
    else:
        backbone = load_backbone(a.weights)
    if a.lora:
        from dit_ops.training.lora import load_lora, merge_lora

        load_lora(backbone, a.lora)
        merge_lora(backbone)
    if a.output.suffix == ".pt":
        convert.to_minwm(backbone, a.output)
    else:
        backbone.save_pretrained(a.output)
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
