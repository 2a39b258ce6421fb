"""Streaming without a cache: random toy models, and their flows by teacher forcing with a mask written by hand.

The oracle is one forward of `[clean | noisy]` over all frames from the start, with absolute positions, each frame's own camera,
and a mask: a block sees the sink, the latest frames of the window, and itself. Models are fp64: a stream agrees to 1e-9 or is
wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import toy_hunyuan_video15
from torch import Tensor
from toy_wan_ti2v_directory import CONFIG as TI2V

from dit_ops.actions import action_labels
from dit_ops.backbones.hunyuan_video15_text import video_mask
from dit_ops.backbones.wan import WanBackbone
from dit_ops.backbones.wan_ti2v import WanTI2VBackbone
from dit_ops.camera import intrinsics_matrix, parse_trajectory
from dit_ops.conditions.arguments import image_condition
from dit_ops.masks import Intervals, merge

H, W = 4, 6  # latents; 6 tokens per frame
WAN = dict(num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=2)
WAN |= dict(in_channels=2, out_channels=2)
HUNYUAN = dict(patch_size=2, in_channels=9)
NAMES = ["wan", "wan, camera", "wan TI2V", "hunyuan", "hunyuan, camera, action"]
KEYS = ["w", "s", "a", "d", "j", "l", "i", "k", "u", "dn", "stay", "w+l", "a+k"]
Blocks = list[tuple[int, int]]


@lru_cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Random everywhere, with attention sharp enough that one frame more or less changes everything."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if "hunyuan" in name:
            model = toy_hunyuan_video15.tiny("camera" in name, config=HUNYUAN, action="action" in name)
        else:
            cls, config = (WanTI2VBackbone, TI2V) if "TI2V" in name else (WanBackbone, WAN)
            model = cls.from_config(config, camera="camera" in name)
            for p in model.parameters():
                torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.35)
    return model.to(dtype).eval().requires_grad_(False)


# the oracle


def visible(first: int, last: int, window: int | None, sink: int) -> list[int]:
    """Frames before `first` that a block [first, last) sees; window counts the sink and the block itself."""
    return [f for f in range(first) if window is None or f < sink or f >= last - (window - sink)]


def hand_made(blocks: Blocks, window: int | None, sink: int) -> Callable[[Any], Intervals]:
    """In place of TeacherForcing: `[text | clean | noisy]`, both halves of a block see its clean past, and its own half."""

    def mask(layout: Any) -> Intervals:
        frame = lambda f, half: layout.token_range((f, f + 1), half)
        text = (0, layout.prefix)
        rows = [(*text, (text,))] if layout.prefix else []
        for half in (0, 1):
            for a, b in blocks:
                seen = [frame(f, 0) for f in visible(a, b, window, sink)] + [frame(f, half) for f in range(a, b)]
                rows.append((*layout.token_range((a, b), half), merge([text, *seen])))
        return Intervals(tuple(rows), layout.total, layout.total)

    return mask


@torch.no_grad()
def flow_of(model: Any, x: Tensor, t: float, blocks: Blocks, clean: Tensor, args: dict, case: Any) -> Tensor:
    """Flow of the last block, x, behind the clean frames before it; args: of all frames up to its end.

    case: has the window and the sink
    """
    first, last = blocks[-1]
    mask = hand_made(blocks, case.window, case.sink)
    timestep = torch.full((len(x), last), t, dtype=torch.float32).to(x)  # as generation rounds it
    with ExitStack() as patches:
        for place in ("wan.TeacherForcing", "hunyuan_video15_text.TeacherForcing"):
            patches.enter_context(mock.patch(f"dit_ops.backbones.{place}", mask))
        patches.enter_context(mock.patch("dit_ops.backbones.hunyuan_video15_block.video_mask", video_mask.__wrapped__))
        clean = torch.cat([clean[:, :first], torch.zeros_like(x)], 1)
        return model(torch.cat([torch.zeros_like(clean[:, :first]), x], 1), timestep, clean_latents=clean, **args)[:, first:]


def agree(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got.to(expected), expected, atol=tolerance * max(1, expected.abs().max().item()), rtol=0)


@contextmanager
def spoiled(model: Any) -> Iterator[None]:
    """Before a chunk is announced, whatever its cache holds besides the frames that it sees is NaN."""

    def announce(cache: Any, first: int, frames: int, *args: Any, **given: Any) -> None:
        T, window, sink = cache._tokens_per_frame, cache.window_frames, cache.sink_frames
        if T is not None and window is not None:
            slot = lambda f: f if f < sink else sink + (f - sink) % (window - sink)
            kept = {slot(f) for f in visible(first, first + frames, window, sink)}
            for s in sorted(set(range(window)) - kept):
                for t in (t for pair in cache._buffers for t in pair or ()):
                    t[:, cache.prefix + s * T : cache.prefix + (s + 1) * T] = torch.nan
                if "P_inv" in cache._tables:
                    cache._tables["P_inv"][:, s] = torch.nan
            filled_anew = [cache._tables.get("chunk"), cache._tables.get("slots"), *(cache._turned or ())]
            for t in (t for t in filled_anew if t is not None):
                t.fill_(torch.nan)
        type(model).announce(model, cache, first, frames, *args, **given)

    with mock.patch.object(model, "announce", announce, create=True):
        yield


# inputs


def random_inputs(name: str, B: int, F: int, seed: int) -> tuple[Tensor, Tensor, dict, dict]:
    """Noisy and clean latents, arguments of the whole video, and those with an entry per frame; every sample is different."""
    model, g = model_of(name), torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    some = lambda *shape: torch.rand(shape, generator=g) < 0.6
    noisy, clean = normal(B, F, model.latent_channels, H, W), normal(B, F, model.latent_channels, H, W)
    frames: dict[str, Tensor] = {}
    if "camera" in name:
        keys = [[KEYS[i] for i in torch.randint(len(KEYS), (F - 1,), generator=g).tolist()] for _ in range(B)]
        pose = torch.stack([parse_trajectory(pose_string(path)) for path in keys]).double()
        Ks = intrinsics_matrix(0.6, 0.8).double().expand(B, F, 3, 3) * (1 + torch.rand(B, F, 1, 1, generator=g))
        frames = {"viewmats": pose, "Ks": Ks} | ({"action": action_labels(pose)} if "action" in name else {})
    if "wan" in name:
        if "TI2V" in name:
            frames["condition_latents"] = image_condition(clean[:, :1], F)
        return noisy, clean, {"encoder_hidden_states": normal(B, 4, model.config.text_dim)}, frames
    mask = some(B, 7)
    mask[:, 3] = True
    whole = {"encoder_hidden_states": normal(B, 7, 12), "encoder_attention_mask": mask}
    whole |= {"encoder_hidden_states_2": normal(B, 3, 10), "encoder_attention_mask_2": some(B, 3)} if seed % 2 else {}
    whole |= {"image_embeds": normal(B, 2, 8) * some(B, 1, 1)} if seed % 3 else {}
    return noisy, clean, whole, frames | {"condition_latents": normal(B, F, 5, H, W)}


def cut(frames: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: value[:, first:last] for name, value in frames.items()}


def apart(args: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Condition, cameras."""
    cameras = {name: args.pop(name) for name in ("viewmats", "Ks") if name in args}
    return args, cameras


def pose_string(keys: list[str]) -> str:
    return ",".join(f"{key}*1" for key in keys) or "stay*0"
