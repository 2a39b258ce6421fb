"""A pipeline of your own: the first block in many steps, the blocks after it in a few.

    python examples/custom_pipeline.py out/demo/dmd/model careful.mp4 --pose "w*6,w+l*6"

It derives a model directory that names the new class, registers the class, loads the directory by that name and streams
a video.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dit_ops import flow_to_x0, renoise
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import loading, stages
from dit_ops.pipelines.base import Pipeline
from dit_ops.pipelines.solvers import solver


class CarefulStartPipeline(Pipeline):
    """`num_steps` network steps for the first block, those of `denoising_steps` for the others."""

    def network_steps(self, state: stages.State) -> int | None:
        blocks = stages.count_blocks(self.backbone, state)
        few = len(state.settings.denoising_steps)
        return None if blocks is None else state.settings.num_steps + (blocks - 1) * (1 + few)

    def denoise(self, state: stages.State) -> Iterator[Tensor]:
        caches = stages.new_caches(self.backbone, state)
        x: Tensor | None = None
        for first, last in stages.causal_blocks(self.backbone, state):
            if x is not None:
                stages.remember(self.backbone, state, x, first, caches)
            x = stages.initial_noise(state, first, last)
            x = self.few_steps(state, x, first, caches) if first else self.many_steps(state, x, caches)
            yield x

    def many_steps(self, state: stages.State, x: Tensor, caches: list) -> Tensor:
        sampler = solver(state.settings)
        for i, t in enumerate(sampler.timesteps):
            x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t, 0, caches))
        return x

    def few_steps(self, state: stages.State, x: Tensor, first: int, caches: list) -> Tensor:
        timesteps = FlowSchedule(state.settings.shift).few_step(state.settings.denoising_steps).tolist()
        for i, (t, following) in enumerate(zip(timesteps, [*timesteps[1:], None], strict=True)):
            flow, _ = stages.predict_flow(self.backbone, state, x, t, first, caches)
            if following is None:
                return flow_to_x0(x, flow, t / 1000)
            noise = stages.renoise_noise(state, first, first + x.shape[1], i)
            x = renoise(x, flow, noise, t / 1000, following / 1000)
        raise ValueError("denoising_steps must hold at least one step, got none")


def derive(model: Path, target: Path) -> None:
    """A model directory with the same weights whose index names our class."""
    index = loading.read_index(model) | {"_class_name": "CarefulStartPipeline"}
    for name in ("transformer", "condition"):
        (target / name).symlink_to((model / name).resolve())
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of a few-step model")
    parser.add_argument("video", type=Path, help="mp4 file to write")
    parser.add_argument("--prompt", default="a red room with a blue ball and a white box")
    parser.add_argument("--pose", default="w*6,w+l*6")
    a = parser.parse_args(argv)
    loading.register("CarefulStartPipeline", f"{__name__}:CarefulStartPipeline")
    with tempfile.TemporaryDirectory() as folder:
        derive(a.model, Path(folder))
        pipeline = loading.load(folder)
    chunks = pipeline.stream(a.prompt, pose=a.pose, num_steps=20)
    print(f"{stages.write_videos(chunks, [a.video], pipeline.settings.fps)} frames in {a.video}")


if __name__ == "__main__":
    main()
