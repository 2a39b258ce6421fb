"""A tiny random HunyuanVideo 1.5 and its inputs, for the tests of the backbone."""

import torch

from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.camera import intrinsics_matrix, parse_trajectory

TINY = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    text_embed_dim=12,
    text_embed_2_dim=10,
    image_embed_dim=8,
    rope_axes_dim=(4, 6, 6),
)
CONDITIONED = dict(in_channels=9)  # 4 latent channels, 4 of the image, 1 of the mask


def tiny(camera: bool = True, block_frames: int | None = 2, config: dict | None = None, **options) -> HunyuanVideo15Backbone:
    """Random everywhere: norm weights, biases and our branches differ from their initial ones and zeros."""
    model = HunyuanVideo15Backbone.from_config(TINY | (config or {}), camera=camera, block_frames=block_frames, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 3))
            if "norm" in name and name.endswith("weight") and p.dim() == 1:
                p.add_(1)
    return model


def conditions(B: int = 2, *, byt5: bool = True, image: bool = True) -> dict:
    """Texts of different lengths with padding in between and behind; the second sample has no glyphs."""
    given = {
        "encoder_hidden_states": torch.randn(B, 7, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0]])[:B],
    }
    if byt5:
        given["encoder_hidden_states_2"] = torch.randn(B, 3, 10)
        given["encoder_attention_mask_2"] = torch.tensor([[1, 1, 0], [0, 0, 0]])[:B]
    if image:
        given["image_embeds"] = torch.randn(B, 2, 8)
    return given


def video(B: int = 2, F: int = 5, h: int = 3, w: int = 4, camera: bool = True) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Noisy latents, clean latents, and cameras as keyword arguments."""
    latents, clean = torch.randn(2, B, F, 4, h, w)
    pose = parse_trajectory(f"l*{F // 2},w*{F - 1 - F // 2}")
    cameras = {"viewmats": pose.expand(B, F, 4, 4), "Ks": intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)}
    return latents, clean, cameras if camera else {}


def one(given: dict, i: int) -> dict:
    """The conditions or cameras of one sample."""
    return {name: value[i : i + 1] for name, value in given.items()}


def stream(model, latents, timestep, given, cameras, chunks, *, clean=None, action=None, **cache_options):
    """Runs chunk after chunk at `timestep`, then again at 0 on the clean latents and without action, as generation does."""
    B, F, _, h, w = latents.shape
    cache, start, flows = model.new_cache(B, h, w, **cache_options), 0, []
    for frames in chunks:
        part = slice(start, start + frames)
        options = given | {k: v[:, part] for k, v in cameras.items()} | {"cache": cache, "start_frame": start}
        with torch.no_grad():
            labels = None if action is None else action[:, part]
            flows.append(model(latents[:, part], timestep[:, part], **options, action=labels))
            model((latents if clean is None else clean)[:, part], torch.zeros_like(timestep[:, part]), **options)
        start += frames
    return torch.cat(flows, 1)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
