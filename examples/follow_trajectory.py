# %% [markdown]
# # Follow a recorded trajectory
# A camera path goes into a pose file, is read again and followed. The file is what trackers and simulators can write:
# `{"0": {"extrinsic": camera-to-world 4×4, "K": 3×3 in pixels}, "1": …}`, one entry per latent frame. The axes are
# OpenCV's (x right, y down, z forward), and poses are taken relative to the first.
#
#     python examples/follow_trajectory.py

# %%
import json
import math
from pathlib import Path

import torch

from dit_ops import rooms
from dit_ops.camera import invert_rigid, trajectory_from_json
from dit_ops.evaluate import psnr
from dit_ops.pipelines import loading
from dit_ops.video import write_mp4

MODEL = Path("out/demo/dmd/model")
PROMPT = "a red room with a blue ball and a white box"
OUTPUT = Path("out/examples")
FRAMES = 8

pipeline = loading.load(MODEL)
settings = pipeline.settings

# %% [markdown]
# ## Record
# A slow arc to the right that looks back at the middle of the room: 4 degrees and a step to the side per frame.


# %%
def arc(i: int) -> list[list[float]]:
    """Camera-to-world of frame i."""
    turn, side = math.radians(-4 * i), 0.08 * i
    c, s = math.cos(turn), math.sin(turn)
    return [[c, 0, s, side], [0, 1, 0, 0], [-s, 0, c, 0.02 * i], [0, 0, 0, 1]]


fx, fy, cx, cy = settings.intrinsics
W, H = settings.width, settings.height
K = [[fx * W, 0, cx * W], [0, fy * H, cy * H], [0, 0, 1]]
path = OUTPUT / "arc.json"
OUTPUT.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps({str(i): {"extrinsic": arc(i), "K": K} for i in range(FRAMES)}))

# %% [markdown]
# ## Follow
# From the command line: `dit-ops generate --pose out/examples/arc.json …`.

# %%
viewmats, Ks = trajectory_from_json(path)  # world-to-camera [F, 4, 4], intrinsics over the image size [F, 3, 3]
video = pipeline(PROMPT, pose=(viewmats, Ks), seed=1)[0].cpu()

# %% [markdown]
# ## Did it?
# The rooms can be rendered from any camera, so there is a truth to compare with, and a control: the render of the mirrored
# path, which a model that ignores its camera would come as close to.

# %%
truth = rooms.render(PROMPT, viewmats, Ks, (H, W))
mirror = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
wrong = rooms.render(PROMPT, invert_rigid(mirror @ invert_rigid(viewmats) @ mirror), Ks, (H, W))
print(f"PSNR to the render along the path {psnr(video, truth):.2f} dB, along its mirror image {psnr(video, wrong):.2f} dB")
write_mp4(OUTPUT / "followed.mp4", torch.cat([truth, video, wrong], -1), settings.fps)
print(f"{OUTPUT / 'followed.mp4'}: the render, the model, the render of the mirrored path")
