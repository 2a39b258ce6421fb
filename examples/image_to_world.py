# %% [markdown]
# # Image to world
# A picture becomes the first frame of a world, and a video is continued where it ends. The model of `make demo` knows
# rooms, so the picture is the render of one; `read_image` takes any other file, too.
#
#     python examples/image_to_world.py

# %%
from pathlib import Path

import torch
from PIL import Image

from dit_ops import rooms
from dit_ops.camera import intrinsics_matrix
from dit_ops.pipelines import files, loading
from dit_ops.video import to_uint8, write_mp4

MODEL = Path("out/demo/dmd/model")
PROMPT = "a blue room with a yellow box and a red pillar"
OUTPUT = Path("out/examples")

pipeline = loading.load(MODEL)
settings = pipeline.settings
OUTPUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A picture
# It is scaled to cover the model's size and cropped at the centre. This one is twice as wide and has as much more to see: what
# is left has the focal lengths that the model knows. A picture with others would seem to jump when the model goes on.

# %%
fx, fy, cx, cy = settings.intrinsics
K = intrinsics_matrix(fx / 2, fy, cx, cy)
frame = rooms.render(PROMPT, torch.eye(4)[None], K, (settings.height, 2 * settings.width))
Image.fromarray(to_uint8(frame)[0].numpy()).save(OUTPUT / "start.png")
image = files.read_image(OUTPUT / "start.png", settings.height, settings.width)  # [3, H, W] in [−1, 1]

# %% [markdown]
# ## A world behind it
# The pose covers all frames, and the first one is the picture as the codec gives it back. A causal model takes it as a clean
# first block; one that was trained with an image condition (Wan I2V, HunyuanVideo 1.5 I2V) takes it through its channels. The
# call is the same.

# %%
video = pipeline(PROMPT, pose="d*3,j*4", image=image, seed=2)[0]
kept = (video[0].cpu() - image).abs().mean()
print(f"first frame: differs from the picture by {kept:.3f} on average, of a range of 2")

# %% [markdown]
# ## And on
# Known frames are continued the same way: `video=` holds them, the pose is that of all frames. Here the model goes on
# behind its own video. The cache keeps eight frames, and the first one for good: models that saw the start of every video in
# training lose their way without it.

# %%
longer = pipeline(PROMPT, pose="d*3,j*4,l*4,w*4", video=video, seed=3, window_frames=8, sink_frames=1)[0]
assert longer.shape[0] == video.shape[0] + 8
write_mp4(OUTPUT / "continued.mp4", longer, settings.fps)
print(f"{len(video)} known frames, {len(longer)} in {OUTPUT / 'continued.mp4'}")

# %% [markdown]
# ## Four worlds from one picture
# A batch has one seed, one pose string each; the picture serves all of them.

# %%
poses = ["w*7", "a*7", "j*7", "i*7"]
worlds = pipeline([PROMPT] * 4, pose=poses, image=image, seed=[10, 11, 12, 13])  # [4, F, 3, H, W]
write_mp4(OUTPUT / "worlds.mp4", torch.cat(list(worlds), -1), settings.fps)
print("side by side:", ", ".join(poses))
