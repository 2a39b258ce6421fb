"""AutoencoderKLWan's decoder, a latent frame at a time, with feature caches that belong to the stream."""

from torch import Tensor

from dit_ops.conditions._streaming import Axis, Past, StreamDecoder


class WanDecoder(StreamDecoder):
    """`vae.decode` of the frames so far: in tiles the same bits, without them to rounding.

    Without tiles diffusers gives the first convolution, 1 × 1 × 1, all frames at once.
    Wan 2.1 in fp32 at 480 × 832: 7.8 GB at most, of which 3.8 GB are the past. In 15 tiles, which overlap, 6.9 GB and 6.3 GB:
    most of it waits, and with on_host the device needs 1.3 GB.
    """

    def axes(self, h: int, w: int) -> tuple[Axis, Axis]:
        vae, ratio, patch = self.vae, self.vae.spatial_compression_ratio, self.vae.config.patch_size or 1
        tiles = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        if not vae.use_tiling or (h <= tiles[0] // ratio and w <= tiles[1] // ratio):
            return Axis(h, h), Axis(w, w)
        strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        down, across = (
            Axis(tile // ratio, stride // ratio, stride // patch, tile // patch - stride // patch)
            for tile, stride in zip(tiles, strides, strict=True)
        )
        return down, across

    def decode_frame(self, z: Tensor, past: Past, first: bool) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(z), feat_cache=past, feat_idx=[0], first_chunk=first)

    def __call__(self, z: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        return unpatchify(super().__call__(z), patch_size=self.vae.config.patch_size or 1)
