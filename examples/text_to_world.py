# %% [markdown]
# # Text to world
# A prompt and a camera become a video, block after block; then a camera that is decided while the video comes.
# The model is the one that `make demo` leaves behind. Run the cells in an editor that knows `# %%`, or the file as it is:
#
#     python examples/text_to_world.py

# %%
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dit_ops.pipelines import loading
from dit_ops.video import write_mp4

MODEL = Path("out/demo/dmd/model")
PROMPT = "a red room with a blue ball and a white box"
OUTPUT = Path("out/examples")

pipeline = loading.load(MODEL)
print(f"{type(pipeline).__name__} with {sum(p.numel() for p in pipeline.backbone.parameters()):,} parameters")

# %% [markdown]
# ## The whole video
# A pose string has one step per latent frame after the first: four to the left, then three turns to the right.

# %%
video = pipeline(PROMPT, pose="a*4,l*3", seed=1)  # [B, F, 3, H, W] in [−1, 1]
write_mp4(OUTPUT / "room.mp4", video[0], pipeline.settings.fps)
print("whole:", list(video.shape))

# %% [markdown]
# ## The same video as it is made
# A chunk is shown as soon as it is decoded. On a CPU, all chunks together have the bits of the whole video.

# %%
started, chunks = time.perf_counter(), []
for chunk in pipeline.stream(PROMPT, pose="a*4,l*3", seed=1):
    chunks.append(chunk)
    print(f"  {chunk.shape[1]} frames after {time.perf_counter() - started:.2f} s")
print("largest difference:", (torch.cat(chunks, 1) - video).abs().max().item())

# %% [markdown]
# ## A camera that looks at what it sees
# A generator of poses is read only as far as the next block needs. This one walks ahead, and turns where the middle of the
# newest frame is nearly one colour: there is a wall. The window keeps memory the same for any length.

# %%
seen: list[torch.Tensor] = []
given: list[str] = []


def explore(steps: int) -> Iterator[str]:
    for _ in range(steps):
        wall = bool(seen) and seen[-1][0, -1, :, 16:-16, 16:-16].std((1, 2)).mean() < 0.3
        given.append("l*1" if wall else "w*1")
        yield given[-1]


for chunk in pipeline.stream(PROMPT, pose=explore(23), seed=1, window_frames=8, sink_frames=1):
    seen.append(chunk)
write_mp4(OUTPUT / "explored.mp4", torch.cat(seen, 1)[0], pipeline.settings.fps)
print("explored along", ",".join(given))
print("videos in", OUTPUT)
