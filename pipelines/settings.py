"""What a call of a pipeline may set; a model directory keeps its own defaults in model_index.json."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from dit_ops.camera import DEFAULT_INTRINSICS

SOLVERS = ("euler", "unipc")


@dataclass(frozen=True)
class Settings:
    """Sampler options. Sizes of the video are latent frames and pixels.

    num_steps         network steps per block of a multi-step sampler
    guidance          classifier-free guidance `uncond + guidance · (cond − uncond)`; 1 = off
    batched_guidance  both passes as one batch of 2B, with one cache, instead of one after the other with a cache each
    shift             of the flow schedule
    solver            "euler", or "unipc" (diffusers' UniPC of order 2)
    denoising_steps   few-step sampler: timesteps before the shift
    block_frames      latent frames per causal block; None = what the backbone was trained with
    window_frames, sink_frames   of the KV cache; None = every frame is visible
    compact_cache     keys and values are stored before positions and cameras turn them: half the memory, more work per step
    frames            latent frames, if neither the call nor a pose string says
    intrinsics        fx/W, fy/H, cx/W, cy/H of pose strings: those of the training data
    """

    num_steps: int = 50
    guidance: float = 1.0
    batched_guidance: bool = False
    shift: float = 5.0
    solver: str = "euler"
    denoising_steps: tuple[float, ...] = (1000, 750, 500, 250)
    block_frames: int | None = None
    window_frames: int | None = None
    sink_frames: int = 0
    compact_cache: bool = False
    negative_prompt: str = ""
    frames: int = 20
    height: int = 480
    width: int = 832
    fps: float = 16.0
    intrinsics: tuple[float, float, float, float] = DEFAULT_INTRINSICS

    def __post_init__(self):
        for name in ("num_steps", "frames", "height", "width", "block_frames", "window_frames", "sink_frames"):
            value, optional = getattr(self, name), name in ("block_frames", "window_frames")
            if not isinstance(value, int) and not (optional and value is None):
                raise ValueError(f"{name} must be a whole number{' or None' if optional else ''}, got {value!r}")
        for name in ("num_steps", "frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if self.block_frames is not None and self.block_frames < 1:
            raise ValueError(f"block_frames must be at least 1 or None, got {self.block_frames}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        object.__setattr__(self, "denoising_steps", tuple(self.denoising_steps))
        object.__setattr__(self, "intrinsics", tuple(self.intrinsics))
        if len(self.intrinsics) != 4:
            raise ValueError(f"intrinsics must be the four numbers fx/W, fy/H, cx/W, cy/H, got {list(self.intrinsics)}")

    def override(self, options: dict[str, Any]) -> "Settings":
        """A copy with some fields replaced; a value of None keeps the default; an unknown name is an error."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1) or [", ".join(names)]
                raise ValueError(f"unknown sampler option {name!r}; did you mean {near[0]}?")
        return dataclasses.replace(self, **{name: value for name, value in options.items() if value is not None})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
