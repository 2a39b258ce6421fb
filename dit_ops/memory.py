"""What generation takes of a GPU's memory, before one is rented: bytes of weights, caches, a step and the decoder.

Calculated from the models' shapes, nothing is allocated (meta tensors). Weights and caches are exact; a step and the
decoder are the tensors alive at once, without the workspace of kernels and without what the allocator keeps in reserve.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dit_ops.backbones._common import token_grid
from dit_ops.conditions._hunyuan_video15_decoder import HunyuanVideo15Decoder
from dit_ops.conditions._streaming import StreamDecoder, decode_chunks
from dit_ops.conditions._wan_decoder import WanDecoder
from dit_ops.float8 import to_float8
from dit_ops.offload import allocations, block_modules, power_of_two, tensors_of, unit_bytes
from dit_ops.registry import backbone_class
from dit_ops.training.flops import forward_flops
from dit_ops.training.parallelize import kept_in_fp32
from dit_ops.training.plan import BF16, MODELS

WINDOW, CHUNK = 20, 4  # latent frames that a chunk sees, and of a chunk; 480×832 pixels
BUS = 25e9  # bytes per second from pinned memory over PCIe 4.0 x16, of 31.5e9 on paper: an assumption
FLOPS = 400e12  # per second in bf16, 40 % of an H100's peak: an assumption
BEGIN, END = "<!-- dit_ops.memory -->", "<!-- end -->"  # around the table in docs/low_memory.md


@dataclass(frozen=True)
class Around:
    """What stands beside a backbone: text tokens, the text encoder, and the decoder's latents [Cz, h, w]."""

    text: int
    encoder: Callable[[], nn.Module]
    latent: tuple[int, int, int]
    vae: str  # the diffusers class


def umt5() -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **sizes))


def qwen() -> nn.Module:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(vocab_size=152064, **sizes, **heads))


WAN = Around(512, umt5, (16, 60, 104), "AutoencoderKLWan")
AROUND = {
    "Wan 2.1 1.3B": WAN,
    "Wan 2.1 14B": WAN,
    "HunyuanVideo 1.5": Around(1000, qwen, (32, 30, 52), "AutoencoderKLHunyuanVideo15"),
}


def bf16_backbone(name: str) -> Any:
    """A published model with a camera branch as it is loaded in bf16, on the meta device."""
    diffusers_class, config = MODELS[name]
    with torch.device("meta"):
        backbone = backbone_class(diffusers_class).from_config(config, camera=True).eval().requires_grad_(False)
    return as_loaded(backbone)


def as_loaded(backbone: Any) -> Any:
    """In bf16, but for the parameters that diffusers keeps in fp32."""
    kept = kept_in_fp32(backbone)
    for name, p in backbone.named_parameters():
        if not any(part in kept for part in name.split(".")):
            p.data = p.data.bfloat16()
    return backbone


def nbytes(module: nn.Module) -> int:
    """Of all parameters and buffers."""
    return total(tensors_of([module]))


def total(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def offloaded_bytes(backbone: Any) -> tuple[int, int, int]:
    """With offload_blocks: weights on the device, pinned host memory, and what a forward copies."""
    units = [tensors_of(modules) for modules in block_modules(backbone)]
    sizes = [unit_bytes(unit) for unit in units]
    rest = nbytes(backbone) - sum(map(total, units))
    host = sum(power_of_two(sum(sizes[first:last])) for first, last in allocations(sizes))
    return rest + 2 * max(sizes), host, sum(sizes)


def cache_bytes(backbone: Any, tokens: int, text: int, *, rotated: bool) -> int:
    """Keys and values of the window's tokens and of the text, of one guidance pass; with rotated = False also the buffer that
    the layers share. A text stream (HunyuanVideo) has its keys before the frames', cross-attention (Wan) beside them.
    """
    layers, C = len(backbone.blocks), backbone.transformer.proj_out.in_features
    joint = hasattr(backbone.transformer, "transformer_blocks")
    one = 2 * BF16 * C * (tokens + (text if joint else 0))  # keys and values of a layer and a path
    beside = 0 if joint else 2 * BF16 * C * text * layers
    return beside + (2 * layers * one if rotated else layers * one + 2 * one)


def step_bytes(backbone: Any, tokens: int) -> int:
    """Tensors alive at once in a block, tokens being those of a chunk: after attention ten vectors per token (both paths'
    queries and outputs among them), in the MLP five and two hidden ones."""
    C = backbone.transformer.proj_out.in_features
    layers = [m for m in backbone.blocks[0].modules() if isinstance(m, nn.Linear)]
    hidden = max(m.in_features for m in layers if m.out_features == C)
    return BF16 * tokens * max(10 * C, 5 * C + 2 * hidden)


@torch.no_grad()
def step_flops(backbone: Any, around: Around) -> int:
    """Of a forward of one chunk that sees a full window, the text's keys in the cache."""
    config = backbone.config
    width = config.text_dim if "text_dim" in config else config.text_embed_dim
    latents = torch.empty(1, CHUNK, *around.latent, device="meta")
    states = torch.empty(1, around.text, width, device="meta")
    given = {"viewmats": torch.empty(1, CHUNK, 4, 4), "Ks": torch.empty(1, CHUNK, 3, 3)}
    cache = SimpleNamespace(window_frames=WINDOW)
    time = torch.empty(1, device="meta")
    return forward_flops(backbone, latents, time, states, cache=cache, start_frame=WINDOW - CHUNK, **given)


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the `with` block: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += self._sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Decoding:
    """Bytes on the device while a stream is decoded: whole frames; tiles; tiles, the waiting ones' past in host memory."""

    whole: int
    tiled: int
    tiled_offloaded: int


@lru_cache
def published_vae(diffusers_class: str, latent: tuple[int, int, int]) -> tuple[int, Decoding]:
    """Bytes of a VAE's weights in fp32, and of decoding."""
    import diffusers

    with torch.device("meta"):
        vae = getattr(diffusers, diffusers_class)().eval().requires_grad_(False)
    return nbytes(vae), decoding_bytes(vae, latent)


def decoding_bytes(vae: Any, latent: tuple[int, int, int]) -> Decoding:
    """Of chunks of latents [Cz, h, w]; vae: on the meta device, its tiling is turned on.

    Every tile of a stream has a past of its own: one tile is run, and the others' pasts follow from their areas.
    """
    C, h, w = latent
    whole, _, pixels = stream_bytes(vae, C, h, w)
    vae.enable_tiling()
    down, across = new_decoder(vae).axes(h, w)
    tile, past, _ = stream_bytes(vae, C, down.tile, across.tile)
    heights = [min(down.tile, h - y) for y in range(0, h, down.stride)]
    widths = [min(across.tile, w - x) for x in range(0, w, across.stride)]
    others = past * (sum(heights) * sum(widths) / (down.tile * across.tile) - 1)
    put_together = 2 * pixels  # beside the tiles that they are made of
    return Decoding(whole, int(tile + others) + put_together, tile + put_together)


def new_decoder(vae: Any) -> StreamDecoder:
    return WanDecoder(vae) if type(vae).__name__ == "AutoencoderKLWan" else HunyuanVideo15Decoder(vae, context=WINDOW)


@torch.no_grad()
def stream_bytes(vae: Any, C: int, h: int, w: int) -> tuple[int, int, int]:
    """Most bytes alive while two chunks of [Cz, h, w] are decoded, those of the past that stays, and of a chunk's pixels."""
    chunks = [torch.empty(1, CHUNK, C, h, w, device="meta") for _ in range(2)]
    decoder, pixels = new_decoder(vae), 0
    with Alive() as alive:
        for video in decode_chunks(chunks, lambda chunk: chunk.transpose(1, 2), lambda: decoder):
            pixels = video.nbytes
    past = [t for tile in decoder.past.values() for t in tree_iter(tile) if isinstance(t, Tensor)]
    return alive.most, total(past), pixels


def table() -> str:
    """Markdown: gigabytes of every published model, item by item, with none and with all of the options."""
    columns = [column(name) for name in AROUND]
    rows = [("", *AROUND), ("---",) * (1 + len(AROUND))]
    rows += [(item, *(c[item] for c in columns)) for item in columns[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def column(name: str) -> dict[str, str]:
    """The rows of a model."""
    around, backbone = AROUND[name], bf16_backbone(name)
    tokens = WINDOW * math.prod(token_grid(*around.latent[1:], backbone.patch))
    plain, (device, host, copied) = nbytes(backbone), offloaded_bytes(backbone)
    caches = [cache_bytes(backbone, tokens, around.text, rotated=rotated) for rotated in (True, False)]
    step, seconds = step_bytes(backbone, tokens * CHUNK // WINDOW), step_flops(backbone, around) / FLOPS
    to_float8(backbone)
    small, (device8, host8, copied8) = nbytes(backbone), offloaded_bytes(backbone)
    with torch.device("meta"):
        encoder = nbytes(around.encoder().bfloat16())
    vae, decoding = published_vae(around.vae, around.latent)
    everything = device8 + vae + max(encoder, caches[1] + step + decoding.tiled_offloaded)
    values = {
        "weights in bf16": (plain,),
        "weights with `--float8`": (small,),
        "weights with `--offload`: on the GPU, in host memory": (device, host),
        "weights with `--offload --float8`: on the GPU, in host memory": (device8, host8),
        "text encoder in bf16; with `--offload` on the GPU only while it encodes": (encoder,),
        "cache": (caches[0],),
        "cache with `--compact-cache`": (caches[1],),
        "a step": (step,),
        "VAE weights in fp32": (vae,),
        "decoding a chunk": (decoding.whole,),
        "decoding with `--vae-tiling`": (decoding.tiled,),
        "decoding with `--vae-tiling --offload`": (decoding.tiled_offloaded,),
        "**in all, without options**": (plain + encoder + caches[0] + step + vae + decoding.whole,),
        "**in all, with every option**": (everything,),
    }
    gigabytes = {item: ", ".join(f"{v / 1e9:.2f}" for v in parts) for item, parts in values.items()}
    times = {
        "seconds to copy all blocks at 25 GB/s: bf16, float8": f"{copied / BUS:.2f}, {copied8 / BUS:.2f}",
        "seconds to compute a step at 400 TFLOP/s": f"{seconds:.2f}",
    }
    return gigabytes | times


def with_table(page: str) -> str:
    """docs/low_memory.md with a fresh table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"
