# %% [markdown]
# # Compare the stages
# Every training stage leaves a model. Here the same prompt, cameras and seeds go through all of them, side by side with the
# true render, and each gets a score: how close it comes to the truth, and how much closer than to the mirrored trajectory.
#
#     python examples/compare_stages.py

# %%
import time
from pathlib import Path

import torch

from dit_ops.evaluate import generate_samples, held_out_samples, score
from dit_ops.pipelines import loading
from dit_ops.video import write_mp4

RUNS = Path("out/demo")
STAGES = ("bidirectional", "teacher_forcing", "causal_ode", "consistency", "dmd")
PROMPT = "a red room with a blue ball and a white box"
POSES = ("a*3,l*4", "w*5,j*2")
OUTPUT = Path("out/examples")

found = [stage for stage in STAGES if (RUNS / stage / "model" / "model_index.json").is_file()]
assert found, f"no model below {RUNS}: make demo trains them"

# %% [markdown]
# ## Generate
# `generate_samples` gives sample i the seed `seed + i`, for every model the same.

# %%
videos, results = {}, {}
for stage in found:
    pipeline = loading.load(RUNS / stage / "model")
    samples = held_out_samples([PROMPT], POSES, pipeline.settings.height)
    started = time.perf_counter()
    videos[stage] = generate_samples(pipeline, samples, seed=1)  # [n, F, 3, H, W]
    results[stage] = score(videos[stage], samples) | {"seconds": time.perf_counter() - started}

# %% [markdown]
# ## Scores
# *difference* is what following the camera is worth. A model that makes fine rooms and ignores its camera has about none.

# %%
print(f"{'stage':<16} {'PSNR':>6} {'difference':>11} {'seconds per video':>18}")
for stage, result in results.items():
    seconds = result["seconds"] / len(samples)
    print(f"{stage:<16} {result['psnr']:>6.2f} {result['difference']:>11.2f} {seconds:>18.2f}")

# %% [markdown]
# ## Side by side
# One row per trajectory; first the truth, then the stages in order.

# %%
rows = [torch.cat([sample.truth, *(videos[stage][i] for stage in found)], -1) for i, sample in enumerate(samples)]
write_mp4(OUTPUT / "stages.mp4", torch.cat(rows, -2), pipeline.settings.fps)
print(f"{OUTPUT / 'stages.mp4'}: the render, {', '.join(found)}")
