"""AutoencoderKLHunyuanVideo15's decoder with a memory: the stock one is causal but keeps none, so it takes all frames at once.

Each causal convolution remembers the last two frames of its input, and the attention its keys and values. So every frame is
decoded once, one at a time, and the stock attention's mask [F·h·w, F·h·w] is not needed.
"""

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dit_ops.conditions._streaming import Axis, Past, StreamDecoder


class HunyuanVideo15Decoder(StreamDecoder):
    """`vae.decode` of the frames so far, to rounding, its tiles included.

    context: latent frames of the past that the attention sees; None: all, as in the stock decoder. With random weights and
        32 frames the pixels' error is 7 % of their deviation with 1 frame, 2 % with 8, 0.5 % with 20: convolutions lose nothing
    In fp32 at 480 × 832: 10.9 GB at most, of which 5.5 GB are the past, 13 MB of it for each frame that the attention sees. In
    15 tiles, which overlap, 10.1 GB and 9.2 GB: most of it waits, and with on_host the device needs 1.8 GB.
    """

    def __init__(self, vae: Any, *, context: int | None = None, on_host: bool = False) -> None:
        super().__init__(vae, on_host=on_host)
        self.context = context

    def axes(self, h: int, w: int) -> tuple[Axis, Axis]:
        vae, share = self.vae, self.vae.tile_overlap_factor
        latents = (vae.tile_latent_min_height, vae.tile_latent_min_width)
        if not vae.use_tiling or (h <= latents[0] and w <= latents[1]):
            return Axis(h, h), Axis(w, w)
        pixels = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        down, across = (
            Axis(tile, int(tile * (1 - share)), size - int(size * share), int(size * share))
            for tile, size in zip(latents, pixels, strict=True)
        )
        return down, across

    def decode_frame(self, z: Tensor, past: Past, first: bool) -> Tensor:
        decoder = self.vae.decoder
        x = causal_conv(decoder.conv_in, z, past) + z.repeat_interleave(decoder.repeat, dim=1)
        x = resnet(decoder.mid_block.resnets[0], x, past)
        for layer, following in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            x = resnet(following, attention(layer, x, past, self.context), past)
        for block in decoder.up_blocks:
            for layer in block.resnets:
                x = resnet(layer, x, past)
            for layer in block.upsamplers or ():
                x = upsample(layer, x, past, first)
        return causal_conv(decoder.conv_out, decoder.conv_act(decoder.norm_out(x)), past)


def causal_conv(layer: Any, x: Tensor, past: Past) -> Tensor:
    """[B, C, F, h, w] -> [B, C', F, h, w]; before the first frame there is a still picture, beyond the edges, too."""
    left, right, top, bottom, before, _ = layer.time_causal_padding
    known = past[layer] if past[layer] is not None else x[:, :, :1].expand(-1, -1, before, -1, -1)
    x = torch.cat([known, x], dim=2)
    past[layer] = x[:, :, x.shape[2] - before :].clone()
    return layer.conv(nnf.pad(x, (left, right, top, bottom, 0, 0), mode=layer.pad_mode))


def resnet(layer: Any, x: Tensor, past: Past) -> Tensor:
    y = causal_conv(layer.conv1, layer.nonlinearity(layer.norm1(x)), past)
    y = causal_conv(layer.conv2, layer.nonlinearity(layer.norm2(y)), past)
    return y + (x if layer.conv_shortcut is None else layer.conv_shortcut(x))


def attention(layer: Any, x: Tensor, past: Past, context: int | None) -> Tensor:
    """One frame [B, C, 1, h, w] looks at itself and at the past."""
    y = layer.norm(x)
    q, k, v = (project(y).flatten(2).transpose(1, 2) for project in (layer.to_q, layer.to_k, layer.to_v))  # [B, h·w, C]
    kv = torch.stack([k, v])
    if past[layer] is not None:
        kv = torch.cat([past[layer], kv], dim=2)
    past[layer] = kv if context is None else kv[:, :, -context * q.shape[1] :]
    o = nnf.scaled_dot_product_attention(q[:, None], kv[0][:, None], kv[1][:, None])[:, 0]
    return layer.proj_out(o.transpose(1, 2).view_as(x)) + x


def upsample(layer: Any, x: Tensor, past: Past, first: bool) -> Tensor:
    """Channels to 2 × 2 pixels and, where time is doubled, to two frames each; the video's first frame stays one."""
    y = causal_conv(layer.conv, x, past)
    if not layer.add_temporal_upsample:
        return unpack(y, 1) + unpack(x.repeat_interleave(layer.repeats, dim=1), 1)
    if first:
        y = unpack(y, 1)
        return y[:, : y.shape[1] // 2] + unpack(x, 1).repeat_interleave(layer.repeats // 2, dim=1)
    return unpack(y, 2) + unpack(x, 2).repeat_interleave(layer.repeats, dim=1)


def unpack(x: Tensor, frames: int) -> Tensor:
    """[B, frames · 4 · C, F, h, w] -> [B, C, F · frames, 2 h, 2 w]."""
    x = x.unflatten(1, (frames, 2, 2, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)  # [B, C, F, frames, h, 2, w, 2]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
