"""The calculator of memory against real tensors of small models, and the page made with it."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, AutoencoderKLWan
from torch.utils._pytree import tree_iter
from toy_hunyuan_video15 import TINY
from toy_rooms import random_rooms

from dit_ops import _library, memory, offload
from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.backbones.wan import WanBackbone
from dit_ops.conditions._streaming import decode_chunks
from dit_ops.float8 import Float8Linear, to_float8
from dit_ops.offload import DoubleBuffer
from dit_ops.pipelines import loading
from dit_ops.training import plan

PAGE = Path(__file__).parent.parent / "docs/low_memory.md"
WAN = dict(
    num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=32, freq_dim=32, num_layers=3
)


def test_the_page_holds_what_the_calculator_says():
    assert PAGE.read_text() == memory.with_table(PAGE.read_text()), (
        "write it again: PAGE.write_text(memory.with_table(PAGE.read_text()))"
    )


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    rooms = random_rooms()
    loading.save(tmp_path / "out/demo/dmd/model", "few_step", rooms.backbone, rooms.condition, rooms.settings)
    monkeypatch.chdir(tmp_path)
    stream, measure = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(stream, "stream", "exec"), {})
    assert "torch.Size([1, " in capsys.readouterr().out
    exec(compile(measure, "measure", "exec"), {})
    assert 0 < float(capsys.readouterr().out.strip().removesuffix("%")) < 10


def make(name: str, ratio: int) -> WanBackbone | HunyuanVideo15Backbone:
    """Four heads of 32 channels and three layers, in bf16 but for what diffusers keeps in fp32."""
    if name == "wan":
        model = WanBackbone.from_config(WAN | {"ffn_dim": 128 * ratio}, camera=True)
    else:
        heads = {"num_attention_heads": 4, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}
        sizes = {"mlp_ratio": float(ratio), "num_layers": 3, "in_channels": 65, "out_channels": 32}
        model = HunyuanVideo15Backbone.from_config(TINY | heads | sizes, camera=True)
    return memory.as_loaded(model.eval().requires_grad_(False))


def test_weights_are_those_of_a_loaded_model(tmp_path):
    model = WanBackbone.from_config(WAN | {"ffn_dim": 256}, camera=True)
    model.save_pretrained(tmp_path)
    loaded = WanBackbone.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = memory.as_loaded(model)
    dtypes = [{name: p.dtype for name, p in m.named_parameters()} for m in (loaded, expected)]
    assert dtypes[0] == dtypes[1] and set(dtypes[0].values()) == {torch.float32, torch.bfloat16}
    assert (
        memory.nbytes(loaded)
        == memory.nbytes(expected)
        == sum(p.nbytes for p in loaded.parameters()) + sum(b.nbytes for b in loaded.buffers())
    )


@pytest.mark.parametrize("name", ["Wan 2.1 1.3B", "HunyuanVideo 1.5"])
def test_published_models_have_their_sizes(name):
    """Parameters of the training page's calculator, in bf16 but for Wan's norms and tables; float8: a byte each, and scales."""
    sizes, backbone = plan.model_sizes(name), memory.bf16_backbone(name)
    parameters = sizes.sharded + sizes.whole
    assert 2 * parameters <= memory.nbytes(backbone) < 2.01 * parameters
    linears = [m for m in backbone.modules() if isinstance(m, torch.nn.Linear)]
    before = memory.nbytes(backbone)
    to_float8(backbone)
    rounded = [m for m in backbone.modules() if isinstance(m, Float8Linear)]
    assert len(rounded) < len(linears)
    saved = sum(m.in_features * m.out_features - 4 * m.out_features for m in rounded)
    assert memory.nbytes(backbone) == before - saved


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_offloaded_bytes_are_those_of_an_offloaded_model(name, monkeypatch):
    model, made = make(name, 6), []
    device, host, copied = memory.offloaded_bytes(model)
    monkeypatch.setattr(offload, "DoubleBuffer", lambda *args: made.append(DoubleBuffer(*args)) or made[-1])
    offload.offload_blocks(model, "cpu")
    (ring,) = made
    inside = {id(t) for unit in ring.units for t in unit}
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in inside)
    assert device == resident + sum(slot.nbytes for slot in ring.slots)
    pinned = {flat.untyped_storage().data_ptr(): flat.untyped_storage().nbytes() for flat in ring.host}
    assert host == sum(offload.power_of_two(nbytes) for nbytes in pinned.values()) and copied == sum(pinned.values())


@torch.inference_mode()
def stream(model, *, rotated: bool) -> tuple[int, int, int]:
    """Bytes of the caches, most bytes alive in a step with a full window, and tokens of a frame."""
    channels, side, text = (16, 48, 32) if isinstance(model, WanBackbone) else (32, 24, 12)
    cache = model.new_cache(1, side, side, window_frames=8, rotated=rotated)
    given = {"viewmats": torch.eye(4).expand(1, 4, 4, 4), "Ks": torch.eye(3).expand(1, 4, 3, 3), "cache": cache}
    given |= {"encoder_hidden_states": torch.randn(1, 16, text).bfloat16(), "timestep": torch.full((1,), 500.0)}
    latents = torch.randn(1, 4, channels, side, side).bfloat16()
    for first in (0, 4):
        model(latents, start_frame=first, **given)
    with memory.Alive() as alive:
        model(latents, start_frame=8, **given)
    pairs = [t for pair in (*cache._buffers, cache._turned) for t in pair or ()]
    texts = [t for t in tree_iter(cache.text) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return sum(t.nbytes for t in (*pairs, *texts)), alive.most, 24 * 24


@pytest.mark.skipif(_library.MISSING["cpu"] is not None, reason="the reference operators keep more alive than kernels do")
@pytest.mark.parametrize("rotated, ratio", [(True, 6), (False, 2)], ids=["wide MLP", "compact cache, narrow MLP"])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_caches_and_a_step_take_what_a_stream_takes(name, rotated, ratio):
    """A step also has what does not grow with the channels of its tokens: embeddings of time, cameras, latents."""
    model = make(name, ratio)
    held, most, tokens = stream(model, rotated=rotated)
    assert memory.cache_bytes(model, 8 * tokens, 16, rotated=rotated) == held
    estimate = memory.step_bytes(model, 4 * tokens)
    assert estimate <= most < 1.01 * estimate


def test_only_new_tensors_that_are_alive_count():
    old = torch.zeros(1000)
    with memory.Alive() as alive:
        view = old[:500].t().view(5, 100)
        kept = view + 1  # 2000 bytes
        for _ in range(3):
            kept = kept * 2  # 2000 more while it is made
        old.add_(1)
    assert (alive.now, alive.most) == (2000, 4000)


WAN_VAE = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[True, True], latents_mean=[0.0] * 4
)
HUNYUAN_VAE = dict(latent_channels=4, block_out_channels=(16, 16, 32), layers_per_block=1, spatial_compression_ratio=4)


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_decoding_takes_what_decoding_all_tiles_takes(kind, monkeypatch):
    """One tile was run for the estimate; here all are, of which the last ones are smaller."""
    monkeypatch.setattr(memory, "CHUNK", 2)
    with torch.device("meta"):
        if kind == "wan":
            vae = AutoencoderKLWan(**WAN_VAE, latents_std=[1.0] * 4, scale_factor_spatial=4)
        else:
            vae = AutoencoderKLHunyuanVideo15(**HUNYUAN_VAE, temporal_compression_ratio=4)
    latent = (4, 70, 100)
    estimate = memory.decoding_bytes(vae.eval(), latent)
    decoder = memory.new_decoder(vae)
    with torch.no_grad(), memory.Alive() as alive:
        chunks = [torch.empty(1, memory.CHUNK, *latent, device="meta") for _ in range(2)]
        for pixels in decode_chunks(chunks, lambda chunk: chunk.transpose(1, 2), lambda: decoder):
            put_together = 2 * pixels.nbytes
    tiles = [sum(t.nbytes for t in tree_iter(tile) if isinstance(t, torch.Tensor)) for tile in decoder.past.values()]
    assert len(tiles) > 4 and min(tiles) < max(tiles)
    assert alive.most <= estimate.tiled <= alive.most + put_together
    assert estimate.tiled - estimate.tiled_offloaded == pytest.approx(sum(tiles) - max(tiles), rel=0.01)
    assert estimate.whole > estimate.tiled_offloaded
