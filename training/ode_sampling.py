"""ODE trajectories of a teacher-forced model, the data of the causal ODE stage: a sampling run, no training.

Every block is sampled by Euler steps with guidance, given the clean ground truth of the blocks before it. The clean frames'
keys and values do not depend on the noise level, so they are computed once per block and kept in a cache instead of running
`[clean | noisy]` at every step: half the cost, the same numbers.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dit_ops import cfg_euler_step
from dit_ops.conditions.arguments import in_dtype, of_clean, of_frames, with_negative
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.layout import VideoLayout
from dit_ops.training.config import RunConfig, load_config, save_config
from dit_ops.training.data import DatasetWriter, LatentDataset, collate, to_device
from dit_ops.training.engine import device_of, load_backbones
from dit_ops.training.guidance import twice
from dit_ops.training.join import join_parts, parts_folder
from dit_ops.training.roles import take_roles


@dataclass(frozen=True)
class ODESamplingConfig:
    """guidance g in `u + g·(c − u)`; the kept states, at denoising_steps, must be levels of the num_steps sampler."""

    num_steps: int = 48
    shift: float = 5.0
    guidance: float = 6.0
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)

    def __post_init__(self):
        kept_indices(self.denoising_steps, self.num_steps)


class ODESampling:
    """Role generator: the teacher-forced model. A step samples one batch; the run ends after `steps` or with the data set."""

    config_class = ODESamplingConfig

    @staticmethod
    def run(config: RunConfig, *, resume: bool = True, progress: bool = True) -> Path:
        """Writes config.output, a data set with trajectories, from the samples of config.data; goes on where it was stopped.

        Under torchrun each process samples every n-th of them on its own device, and the last one to finish joins the parts.
        """
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        output, device = Path(config.output), device_of(config)
        if config.model.lora is not None:
            raise ValueError("ode_sampling: model.lora trains adapters and nothing is trained here, leave it out")
        if config.parallel.sequence != 1 or config.parallel.fsdp != "none":
            raise ValueError(
                "ode_sampling: every process has samples and a model of its own, so parallel.sequence must be 1 and "
                f"parallel.fsdp none, got {config.parallel.sequence} and {config.parallel.fsdp}"
            )
        dataset = LatentDataset(config.data.path, config.data.split)
        wanted = dataset.entries[: config.steps * config.data.batch_size][rank::ranks]
        generator = take_roles("ode_sampling", load_backbones(config), trained=(), frozen=("generator",))["generator"].eval()
        if resume:
            _check_same_run(output, config)
        if ranks > 1 and resume and (output / "index.jsonl").is_file():
            return output  # the parts were joined before
        part = output if ranks == 1 else parts_folder(output) / f"{rank:05d}-of-{ranks:05d}"
        writer = DatasetWriter(
            part,
            fps=dataset.meta["fps"],
            negative=dataset.negative,
            condition=dataset.meta["condition"],
            mode="resume" if resume else "create",
        )
        with writer, torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            save_config(config, part / "config.yaml")
            if dataset.condition_directory is not None:
                shutil.copytree(dataset.condition_directory, part / "condition", dirs_exist_ok=True)
            todo = [i * ranks + rank for i, entry in enumerate(wanted) if entry["id"] not in writer.done]
            done, shown = len(wanted) - len(todo), progress and rank == 0
            with tqdm(total=len(wanted), initial=done, desc=config.stage, unit="sample", disable=not shown) as bar:
                try:
                    for indices in _batches(dataset, todo, config.data.batch_size):
                        _sample_batch(generator, dataset, indices, config, device, writer)
                        bar.update(len(indices))
                finally:
                    writer.flush()  # finished samples survive Ctrl-C
        if ranks > 1:
            join_parts(output, ranks)
        return output


@torch.inference_mode()
def sample_trajectories(
    generator: Any,
    config: ODESamplingConfig,
    noise: Tensor,
    clean: Tensor,
    condition: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    *,
    viewmats: Tensor | None = None,
    Ks: Tensor | None = None,
) -> Tensor:
    """`[B, K + 2, F, Cz, h, w]`: the states at the K denoising_steps, the sample at σ = 0, and the ground truth.

    noise, clean [B, F, Cz, h, w] fp32   condition: dict of [B, …]   negative: of one sample   viewmats, Ks [B, F, …]
    Conditional and unconditional run as one batch of 2B (of B where guidance is 1).
    """
    B, frames, _, height, width = noise.shape
    sigmas = FlowSchedule(config.shift).sampling(config.num_steps).tolist()
    kept = kept_indices(config.denoising_steps, config.num_steps)
    guided = config.guidance != 1
    copies, rows = (twice, 2 * B) if guided else (lambda x: x, B)
    condition = with_negative(condition, negative) if guided else condition
    cache = generator.new_cache(rows, height, width)
    out = noise.new_empty(B, len(kept) + 2, *noise.shape[1:])
    out[:, -1] = clean

    for first, last in VideoLayout(frames, height, width, generator.block_frames).blocks:
        chunk = {
            "cache": cache,
            "start_frame": first,
            "viewmats": None if viewmats is None else copies(viewmats[:, first:last]),
            "Ks": None if Ks is None else copies(Ks[:, first:last]),
        }
        x, given = noise[:, first:last], of_frames(condition, first, last)
        for i in range(config.num_steps):
            if i in kept:
                out[:, kept.index(i), first:last] = x
            flow = generator(copies(x), x.new_full((rows,), 1000 * sigmas[i]), **given, **chunk)
            cond, *uncond = flow.split(B)
            x = cfg_euler_step(x, cond, uncond[0] if uncond else None, config.guidance, sigmas[i], sigmas[i + 1])
        out[:, -2, first:last] = x
        if last < frames:
            generator(copies(clean[:, first:last]), x.new_zeros(rows), **of_clean(given), **chunk, keys_only=True)
    return out


def kept_indices(denoising_steps: tuple[float, ...], num_steps: int) -> list[int]:
    """Steps of an N-step sampler that start at the few-step levels, `i = N·(1 − s/1000)`: N = 48 → [0, 12, 24, 36]."""
    FlowSchedule(1.0).few_step(denoising_steps)
    places = [num_steps * (1 - s / 1000) for s in denoising_steps]
    for s, place in zip(denoising_steps, places, strict=True):
        if abs(place - round(place)) > 1e-6:
            raise ValueError(f"ode_sampling: denoising_steps must be levels of the {num_steps}-step sampler, got {s:g}")
    return [round(place) for place in places]


def _sample_batch(
    generator: Any, dataset: LatentDataset, indices: list[int], config: RunConfig, device: torch.device, writer: DatasetWriter
) -> None:
    """Samples one batch and hands it to the writer, in the data set's dtype. Noise is drawn by sample id, not by batch."""
    samples = [dataset[i] for i in indices]
    batch = to_device(collate(samples), device)
    draws = Draws(config.seed)
    shape = tuple(batch["latents"].shape[1:])
    noise = torch.stack([draws.normal(f"noise of {sample['id']}", shape) for sample in samples]).to(device)
    states = sample_trajectories(
        generator,
        config.options,
        noise,
        batch["latents"].float(),
        in_dtype(batch["condition"], device, generator.dtype),
        in_dtype(dataset.negative, device, generator.dtype),
        viewmats=batch.get("viewmats"),
        Ks=batch.get("Ks"),
    )
    for i, sample, trajectory in zip(indices, samples, states.to(batch["latents"].dtype), strict=True):
        entry = {key: dataset.entries[i].get(key) for key in ("height", "width", "split")}
        writer.add(**{**sample, **entry, "trajectory": trajectory})


def _batches(dataset: LatentDataset, indices: list[int], size: int) -> Iterator[list[int]]:
    """Groups of at most `size` samples of one shape."""
    shapes: dict[tuple, list[int]] = {}
    for i in indices:
        shapes.setdefault(tuple(dataset.entries[i].get(key) for key in ("frames", "height", "width")), []).append(i)
    for group in shapes.values():
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _check_same_run(output: Path, config: RunConfig) -> None:
    """ValueError: output holds trajectories that were sampled in another way."""
    path = output / "config.yaml"
    if not path.is_file():
        return
    old = load_config(path)
    for name in ("options", "init", "seed"):
        was, now = getattr(old, name), getattr(config, name)
        if was != now:
            raise ValueError(f"{output} cannot be resumed: {name} was {was} and is now {now}")
