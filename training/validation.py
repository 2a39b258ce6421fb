"""Validation videos of a training run: what the engine calls every `validate.every` steps."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from dit_ops import conditions
from dit_ops.pipelines.files import Item, file_stem, request
from dit_ops.pipelines.loading import pipeline_class
from dit_ops.pipelines.settings import Settings
from dit_ops.pipelines.stages import write_videos
from dit_ops.training.checkpoint import PIPELINES, is_writer
from dit_ops.training.config import RunConfig
from dit_ops.training.data import LatentDataset
from dit_ops.training.ranks import device_of


def validation_videos(config: RunConfig) -> Callable[[nn.Module, int, Path], dict[str, float]] | None:
    """A function (generator, step, folder) that writes one mp4 per validation prompt; None where the run asks for none."""
    if not config.validate.every or not config.validate.prompts or config.stage not in PIPELINES:
        return None
    dataset = LatentDataset(config.data.path, config.data.split)
    directory = dataset.condition_directory or config.data.condition
    if directory is None:
        raise ValueError("validate.every needs a condition to decode with: the data set holds none, give data.condition")
    condition = conditions.load(directory).to(device_of(config))
    options = {key: getattr(config.options, key, None) for key in ("shift", "denoising_steps")}
    video = {key: dataset.entries[0].get(key) for key in ("frames", "height", "width", "fps")}
    settings = Settings().override({**options, **video, "intrinsics": dataset.intrinsics, **config.sampler})
    seed, prompts, poses = config.validate.seed, config.validate.prompts, config.validate.poses
    items = [Item(prompt, pose, seed + i) for i, (prompt, pose) in enumerate(zip(prompts, poses, strict=True))]

    def validate(generator: nn.Module, step: int, folder: Path) -> dict[str, float]:
        pipeline = pipeline_class(PIPELINES[config.stage])(generator, condition, settings)
        for item in items:
            chunks = pipeline.stream(item.prompt, pose=item.pose, seed=item.seed)
            if is_writer():
                write_videos(chunks, [folder / f"{file_stem(request(item, {}, {}))}.mp4"], settings.fps)
            else:  # the other ranks take part in a sharded or sequence-parallel forward
                list(chunks)
        return {}

    return validate
