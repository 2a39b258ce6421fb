"""A pipeline of your own: the first block in many steps, the blocks after it in a few.

    python examples/custom_pipeline.py out/demo/dmd/model careful.mp4 --pose "w*6,w+l*6"

It derives a model directory that names the new class, registers the class, loads the directory by that name and streams
a video.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dit_ops.pipelines import loading, stages
from dit_ops.pipelines.causal import CausalPass
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.request import State
from dit_ops.pipelines.solvers import solver


class CarefulStartPipeline(FewStepPipeline):
    """`num_steps` network steps for the first block, those of `denoising_steps` for the others."""

    def network_steps(self, state: State) -> int | None:
        steps = super().network_steps(state)
        return None if steps is None else steps + state.settings.num_steps - len(state.timesteps)

    def denoise_block(self, state: State, first: int, last: int, passes: list[CausalPass]) -> Tensor:
        if first > 0:
            return super().denoise_block(state, first, last, passes)
        sampler = solver(state.settings)
        x = stages.initial_noise(state, first, last)
        for i, t in enumerate(sampler.timesteps):
            x = sampler.step(i, x, *stages.predict_flow(self.backbone, state, x, t, first, passes))
        return x


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
