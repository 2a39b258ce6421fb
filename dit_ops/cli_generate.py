"""`dit-ops generate`: prompts and camera trajectories to video files, on one process or on the ranks of torchrun.

The videos are dealt out to groups of `--sequence-parallel` ranks; the ranks of a group share every video of theirs, and its
first one decodes and writes.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dit_ops.parallel import SequenceParallel
    from dit_ops.pipelines.base import Pipeline

MODES = ("bidirectional", "autoregressive", "few_step")
SAMPLER = [
    *("frames", "num_steps", "guidance", "solver", "shift", "negative_prompt", "height", "width", "fps"),
    *("block_frames", "window_frames", "sink_frames", "compact_cache"),
]
ITEM = ("pose", "seed", "image", "video")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", type=Path, required=True, help="model directory: ours, or a stock diffusers one")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what is to be seen")
    what.add_argument("--prompts", type=Path, help='JSONL file of {"prompt": …, "pose": …, "seed": …, "image": …, "video": …}')
    p.add_argument(
        "--pose",
        help="pose string such as w*4,l*8 (a step per latent frame after the first), pose JSON file, or .txt file of strings",
    )
    p.add_argument("--image", help="picture of the first frame")
    p.add_argument("--video", help="mp4 file whose end is continued; the pose is that of all frames, the known ones included")
    p.add_argument("--frames", type=int, help="latent frames (default: what the pose gives)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    where = "folder, or an .mp4 file for a single video (default: %(default)s)"
    p.add_argument("--output", type=Path, default=Path("out/videos"), help=where)
    p.add_argument("--overwrite", action="store_true", help="generate again what is finished")
    p.add_argument("--preview", action="store_true", help="show the newest frame in the terminal, in 24-bit colours")
    how = p.add_argument_group("sampling", "where nothing is given, as the model directory says")
    how.add_argument("--steps", type=int, dest="num_steps", help="steps of a multi-step sampler")
    how.add_argument("--guidance", type=float, help="classifier-free guidance; 1 turns it off")
    how.add_argument("--negative-prompt", help="what guidance leads away from")
    how.add_argument("--solver", choices=("euler", "unipc"), help="of a multi-step sampler")
    how.add_argument("--shift", type=float, help="shift of the flow schedule")
    how.add_argument("--height", type=int, help="pixels")
    how.add_argument("--width", type=int, help="pixels")
    how.add_argument("--fps", type=float, help="frames per second of the file")
    how.add_argument("--block-frames", type=int, help="latent frames per causal block")
    how.add_argument(
        "--window-frames",
        type=int,
        help="latent frames that the KV cache keeps, sink and current block included",
    )
    how.add_argument("--sink-frames", type=int, help="first latent frames that the KV cache never drops")
    p.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="decode a chunk while the next one is denoised; the same video (default: on a GPU)",
    )
    p.add_argument(
        "--sequence-parallel", type=int, default=1, metavar="P", help="ranks of torchrun that share a video (default: 1)"
    )
    add_model_arguments(p)


def add_model_arguments(p: argparse.ArgumentParser) -> None:
    """How a model directory is loaded; `generate` and `play` have them in common."""
    p.add_argument("--mode", choices=MODES, help="how to sample (default: what the model says)")
    p.add_argument("--condition", type=Path, help="directory of the condition (text encoder and codec), if the model has none")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    low = p.add_argument_group("low memory", "docs/low_memory.md says what each of them saves and costs")
    low.add_argument(
        "--compact-cache", action="store_true", default=None, help="keep keys before RoPE and camera: a smaller cache"
    )
    low.add_argument("--offload", action="store_true", help="keep weights in host memory, copied ahead of their use")
    low.add_argument("--float8", action="store_true", help="keep the linear weights of the blocks in 8 bits")
    low.add_argument("--vae-tiling", action="store_true", help="encode and decode frames in tiles")


def load_pipeline(a: argparse.Namespace, device: "torch.device | str | None" = None) -> "Pipeline":
    """The pipeline that the arguments of `add_model_arguments` describe."""
    import torch

    from dit_ops.pipelines import loading

    device = device or (device_of(a.device) if a.device else None)
    dtype = getattr(torch, a.dtype) if a.dtype else None
    low = {name: True for name in ("offload", "float8", "vae_tiling") if getattr(a, name)}
    return loading.load(a.model, device, dtype, mode=a.mode, condition=a.condition, **low)


def device_of(name: str) -> "torch.device":
    """The device that a name stands for. ValueError where this machine has none of that name."""
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device must be one that torch can use, {torch.cuda.device_count()} GPUs here, got {name!r}")
    return torch.device(name)


def generate(a: argparse.Namespace, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields the path of every video that this process has written."""
    from dit_ops.pipelines import files, inputs
    from dit_ops.preview import Preview

    given = {name: getattr(a, name) for name in ITEM}
    if a.prompts:
        items = files.read_items(a.prompts, **given)
    else:
        items = [files.Item(a.prompt, **{**given, "pose": inputs.deal_poses(a.pose, 1)[0]})]
        items[0].check()
    options = {name: getattr(a, name) for name in SAMPLER}
    # what changes the result; None where it does not, so that finished files stay so when an argument is added
    how = {"mode": a.mode, "dtype": a.dtype, "condition": a.condition, "float8": a.float8, "vae_tiling": a.vae_tiling}
    model = files.fingerprint(a.model, **{name: value for name, value in how.items() if value})
    wanted = [files.request(item, model, options) for item in items]
    jobs = {path: (item, w) for path, item, w in zip(files.output_paths(a.output, wanted), items, wanted, strict=True)}
    preview = Preview(sys.stderr) if a.preview and os.environ.get("RANK", "0") == "0" else None
    with process_group(a.device) as device:
        place = Place.of(a.sequence_parallel, device)
        todo = place.agree(lambda: _unfinished(jobs, a.overwrite, say))
        mine = todo[place.group :: place.groups]
        if not mine:
            return
        pipeline = load_pipeline(a, device)
        _check_used(pipeline, options)
        for path in todo:  # before an hour is spent on those in front of it
            files.check_request(pipeline, *jobs[path], alone=len(todo) == 1)
        place.share(pipeline)
        streaming = {} if a.overlap is None else {"overlap": a.overlap}
        for number, path in enumerate(mine, 1):
            item, request = jobs[path]
            if not place.writes:
                for _ in files.chunks_of(pipeline, item, request["options"], **streaming):
                    pass
                continue
            total = files.pixel_frames(pipeline, item, request["options"])
            title = f"{number} of {len(mine)}: " if len(mine) > 1 else ""
            with Progress(title, total, preview, silent=place.rank > 0) as progress:
                calls: dict[str, Any] = {"on_step": progress.on_step, "on_chunk": progress.on_chunk}
                record = files.generate_file(pipeline, item, path, request, **calls, **streaming)
            times = record["timings"]
            say(
                f"{record['pixel_frames']} frames in {times['seconds']:.2f} s, the first after "
                f"{times['first_chunk_seconds']:.2f} s, then {times['frames_per_second']:.1f} per second"
            )
            yield path


def _unfinished(jobs: dict[Path, tuple[Any, dict[str, Any]]], overwrite: bool, say: Callable[[str], None]) -> list[Path]:
    """The paths that are to be written. ValueError where that would replace what was not made for the same request."""
    from dit_ops.pipelines import files

    todo = []
    for path, (_, wanted) in jobs.items():
        if not overwrite and files.is_finished(path, wanted):
            say(f"{path}: finished before")
        else:
            files.check_free(path, wanted, overwrite=overwrite)
            files.check_writable(path)
            todo.append(path)
    return todo


def _check_used(pipeline: "Pipeline", options: dict[str, Any]) -> None:
    """ValueError for options given that would name another file and make the same video."""
    from dit_ops.pipelines.few_step import FewStepPipeline

    unused: tuple[str, ...] = ()
    if type(pipeline) is FewStepPipeline:
        unused += ("num_steps", "solver", "negative_prompt")
    if not pipeline.causal:
        unused += ("block_frames", "window_frames", "sink_frames", "compact_cache")
    given = [name for name in unused if options.get(name) is not None]
    if given:
        flags = ", ".join("--" + ("steps" if name == "num_steps" else name.replace("_", "-")) for name in given)
        raise ValueError(f"{flags}: not used by {type(pipeline).__name__}, which samples here, and would change nothing")


class Progress:
    """Frames done, how fast, and the time left: a bar over network steps below a picture of the newest frame.

    Where standard error is no terminal, it is a line every `interval` seconds instead.
    """

    def __init__(self, title: str, frames: int, preview: Any, *, silent: bool = False, interval: float = 10):
        from tqdm import tqdm

        self.title, self.frames, self.done = title, frames, 0
        self.preview = preview or nullcontext()
        self.interval, self.started = interval, time.perf_counter()
        self.said = self.started
        self.lines = not (silent or sys.stderr.isatty())
        layout = "{desc}, {remaining} left |{bar}| {percentage:.0f}%"  # what is cut off a narrow terminal comes last
        self.bar = tqdm(bar_format=layout, desc=self._text(), dynamic_ncols=True, disable=silent or self.lines)

    def __enter__(self) -> "Progress":
        self.preview.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.bar.leave = kind is None or not issubclass(kind, Exception)  # of a mistake only its sentence stays
        try:
            self.preview.__exit__(kind, *error)
        finally:
            self.bar.close()

    def on_step(self, done: int, total: int) -> None:
        self.bar.total = total or None
        self.bar.update(done - self.bar.n)
        now = time.perf_counter()
        if self.lines and now - self.said >= self.interval:
            self.said = now
            left = f"{(now - self.started) * (total - done) / done:.0f} s" if total else "?"
            sys.stderr.write(f"{self._text()}, {left} left\n")
            sys.stderr.flush()

    def on_chunk(self, chunk: "torch.Tensor") -> None:
        self.done += chunk.shape[1]
        self.bar.set_description_str(self._text())
        if not isinstance(self.preview, nullcontext):
            self.preview.show(chunk[0, -1])

    def _text(self) -> str:
        rate = self.done / (time.perf_counter() - self.started)
        return f"{self.title}{self.done}/{self.frames} frames" + (f", {rate:.1f} fps" if self.done else "")


@contextmanager
def process_group(name: str | None) -> "Iterator[torch.device]":
    """This process's device and, under torchrun, the default process group; one that exists already is used as it is."""
    import torch
    import torch.distributed as dist

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = device_of(name)
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Place:
    """Where this process stands: in group `group` of `groups`, which make videos of their own; `parallel` joins its ranks."""

    rank: int = 0
    group: int = 0
    groups: int = 1
    parallel: "SequenceParallel | None" = None

    @classmethod
    def of(cls, ranks: int, device: "torch.device") -> "Place":
        """Neighbouring ranks form a group. ValueError where `ranks` does not divide the processes."""
        import torch.distributed as dist

        from dit_ops.parallel import SequenceParallel

        world = dist.get_world_size() if dist.is_initialized() else 1
        if ranks < 1 or world % ranks:
            hint = "" if world > 1 else "; start with torchrun --nproc-per-node"
            raise ValueError(f"--sequence-parallel must divide the number of processes, {world}, got {ranks}{hint}")
        if world == 1:
            return cls()
        rank = dist.get_rank()
        if ranks == 1:
            return cls(rank, rank, world)
        mesh = dist.device_mesh.init_device_mesh(device.type, (world // ranks, ranks), mesh_dim_names=("data", "sequence"))
        return cls(rank, rank // ranks, world // ranks, SequenceParallel(mesh.get_group("sequence")))

    @property
    def writes(self) -> bool:
        return self.parallel is None or self.parallel.rank == 0

    def agree(self, choose: Callable[[], list[Path]]) -> list[Path]:
        """What the first process chooses, on all of them; others may see files that were finished in the meantime."""
        if self.groups == 1 and self.parallel is None:
            return choose()
        import torch
        import torch.distributed as dist

        shared: list[Any] = [None]
        if self.rank == 0:
            try:
                shared = [choose()]
            except (ValueError, OSError) as error:
                shared = [error]
        dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
        if isinstance(shared[0], Exception):
            raise shared[0]
        return shared[0]

    def share(self, pipeline: "Pipeline") -> None:
        """Splits every video's tokens over the ranks of the group, the first of which decodes."""
        if self.parallel is None:
            return
        pipeline.backbone.sequence_parallel = self.parallel
        if not self.writes:
            pipeline.condition = Undecoded(pipeline.condition)


class Undecoded:
    """A condition whose videos stay latents."""

    def __init__(self, condition: Any):
        self._condition = condition

    def __getattr__(self, name: str) -> Any:
        return getattr(self._condition, name)

    def decode_stream(self, chunks: Iterator[Any], **given: Any) -> Iterator[Any]:
        yield from chunks
