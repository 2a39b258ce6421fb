"""Decoding in chunks and in tiles: the pixels of the whole video, for any number of streams, in memory that does not grow."""

import json
import queue
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo15, AutoencoderKLWan
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dit_ops.conditions import load
from dit_ops.conditions._hunyuan_video15_decoder import HunyuanVideo15Decoder
from dit_ops.conditions._wan_decoder import WanDecoder
from dit_ops.conditions.linear import LinearCondition
from dit_ops.memory import Alive

SMALL = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
PATCHED = {"decoder_base_dim": 8, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
MOMENTS = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}


def tiles(height: int, width: int, **others: int) -> dict[str, int]:
    return {"tile_sample_min_height": height, "tile_sample_min_width": width, **others}


@dataclass(frozen=True)
class Case:
    """A small VAE, tiles that overlap both ways and are cut by the edges, and latents for them."""

    make: Any
    tiles: dict[str, int]
    latents: tuple[int, ...]
    tolerance: float = 0.0  # in tiles
    rounding: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)


WAN_TILES = tiles(32, 48, tile_sample_stride_height=24, tile_sample_stride_width=24)  # 1/24 is rounded
CASES = {
    "wan21": Case(lambda: AutoencoderKLWan(**SMALL, z_dim=16), WAN_TILES, (2, 4, 16, 5, 7)),
    "wan21_bf16": Case(
        lambda: AutoencoderKLWan(**SMALL, z_dim=16), WAN_TILES, (1, 4, 16, 5, 7), 0.0, 0.02, {"vae_dtype": torch.bfloat16}
    ),
    "wan22": Case(
        lambda: AutoencoderKLWan(**SMALL, **PATCHED, **MOMENTS, z_dim=4, is_residual=True),
        tiles(64, 96, tile_sample_stride_height=48, tile_sample_stride_width=64),
        (1, 4, 4, 5, 7),
    ),
    "hunyuan_video15": Case(
        lambda: AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(4, 8, 8, 16, 16), layers_per_block=1),
        tiles(64, 128, tile_latent_min_height=4, tile_latent_min_width=8),
        (1, 4, 4, 5, 9),
        1e-5,  # the stock decoder sums its attention over all frames, masked
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Model directories that hold a VAE only."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        vae = case.make()
        vae.save_pretrained(found[name] / "vae")
        index = {"vae": ["diffusers", type(vae).__name__]}
        (found[name] / "model_index.json").write_text(json.dumps(index))
    return found


@pytest.fixture(params=CASES)
def case(request):
    return request.param, CASES[request.param]


@pytest.fixture
def condition(case, directories):
    return load_case(case[0], directories)


def load_case(name: str, directories: dict[str, Any]) -> Any:
    return type(load(directories[name])).from_pretrained(directories[name], **CASES[name].options)


def stream(condition: Any, latents: torch.Tensor, sizes: list[int], **options: Any) -> torch.Tensor:
    return torch.cat(list(condition.decode_stream(iter(latents.split(sizes, 1)), **options)), 1)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_streamed_pixels_are_those_of_the_whole_video(case, condition, tiled):
    """However the latents are cut. Wan's tiles are decoded frame by frame in diffusers, too: the same bits.

    Without tiles, diffusers applies the first 1 × 1 × 1 convolution to all frames at once, which may round otherwise.
    """
    _, case = case
    latents = torch.randn(case.latents)
    if tiled:
        plain = condition.decode_to_pixel(latents)
        condition.enable_tiling(**case.tiles)
    whole = condition.decode_to_pixel(latents)
    if tiled:
        assert (whole - plain).abs().max() > 1e-3, "tiles are blended"
    else:
        assert whole.std() > 0.05
    once = stream(condition, latents, [4])
    torch.testing.assert_close(once, whole, rtol=0, atol=case.tolerance if tiled else case.rounding)
    for sizes in ([1, 1, 2], [3, 1]):
        chunks = list(condition.decode_stream(iter(latents.split(sizes, 1))))
        assert [chunk.shape[1] for chunk in chunks] == [4 * sizes[0] - 3, *(4 * size for size in sizes[1:])]
        assert torch.equal(torch.cat(chunks, 1), once), "the same bits for any cut"


def test_tiles_end_where_diffusers_ends_them(case, condition):
    """Tiling begins when one side is larger than a tile: sizes around that, and three tiles."""
    _, case = case
    condition.enable_tiling(**case.tiles)
    tile = case.tiles["tile_sample_min_width"] // condition.spatial_stride
    for h, w in ((4, tile), (4, tile + 1), (5, tile), (2, 2 * tile), (8, 2)):
        latents = torch.randn(1, 1, case.latents[2], h, w)
        whole = condition.decode_to_pixel(latents)
        torch.testing.assert_close(stream(condition, latents, [1]), whole, rtol=0, atol=case.tolerance)


def test_encoding_in_tiles_is_diffusers_own(case, condition):
    _, case = case
    stride = condition.spatial_stride
    pixel = torch.rand(1, 1, 3, 5 * stride, 11 * stride) * 2 - 1
    plain = condition.encode_to_latent(pixel)
    condition.enable_tiling(**case.tiles)
    latents = condition.encode_to_latent(pixel)
    assert latents.shape == plain.shape and (latents - plain).abs().max() > 1e-3
    vae = condition.component("vae")
    vae.disable_tiling()
    assert torch.equal(condition.encode_to_latent(pixel), plain)


def test_streams_do_not_disturb_each_other(case, condition, directories):
    """Two streams in turns, other sizes too, with encodings and decodings between; diffusers keeps its caches on the VAE."""
    name, case = case
    condition.enable_tiling(**case.tiles)
    B, F, C, h, w = case.latents
    first, second = torch.randn(1, F, C, h, w), torch.randn(B, F, C, 2, w)
    alone = load_case(name, directories)
    alone.enable_tiling(**case.tiles)
    expected = [stream(alone, latents, [1, 1, 2]) for latents in (first, second)]
    streams = [condition.decode_stream(iter(latents.split([1, 1, 2], 1))) for latents in (first, second)]
    pixel = torch.rand(1, 5, 3, 2 * condition.spatial_stride, 2 * condition.spatial_stride)
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(3):
        for chunks, one in zip(got, streams, strict=True):
            chunks.append(next(one))
            condition.encode_to_latent(pixel)
            condition.decode_to_pixel(first[:, :1])
    for chunks, whole in zip(got, expected, strict=True):
        assert torch.equal(torch.cat(chunks, 1), whole)


def test_a_stream_may_go_on_in_other_threads(case, directories):
    """Made here, where inference mode is on, read by two threads in turns, where it is not and gradients are."""
    name, case = case
    latents = torch.randn(1, 5, case.latents[2], 2, 3)
    expected = stream(load_case(name, directories), latents, [1] * 5)
    condition = load_case(name, directories)
    given = latents.clone().requires_grad_().split(1, 1)
    with torch.inference_mode():
        chunks = condition.decode_stream(iter(given))
        got = [next(chunks)]
    wishes: list[queue.Queue] = [queue.Queue(), queue.Queue()]
    answers: queue.Queue = queue.Queue()

    def read(wish: queue.Queue) -> None:
        while wish.get():
            answers.put((next(chunks), torch.is_grad_enabled()))

    threads = [threading.Thread(target=read, args=(wish,), daemon=True) for wish in wishes]
    for thread in threads:
        thread.start()
    for i in range(4):
        wishes[i % 2].put(True)
        chunk, enabled = answers.get(timeout=60)
        assert enabled and not chunk.requires_grad
        got.append(chunk)
    for wish, thread in zip(wishes, threads, strict=True):
        wish.put(False)
        thread.join(60)
        assert not thread.is_alive()
    assert torch.equal(torch.cat([chunk.clone() for chunk in got], 1), expected)


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_threads_that_encode_and_decode_at_once_get_their_own_results(name, directories):
    """AutoencoderKLWan has one feature cache; whole encodings and decodings take turns."""
    condition = load_case(name, directories)
    stride = condition.spatial_stride
    pixel, latents = torch.rand(1, 9, 3, 2 * stride, 2 * stride), torch.randn(1, 4, CASES[name].latents[2], 2, 2)
    work = [lambda: condition.encode_to_latent(pixel), lambda: condition.decode_to_pixel(latents)]
    expected = [job() for job in work]
    failed: list[str] = []

    def repeat(i: int) -> None:
        for _ in range(5):
            if not torch.equal(work[i % 2](), expected[i % 2]):
                failed.append(f"thread {i}")

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    errors: list[Any] = []
    hook, threading.excepthook = threading.excepthook, errors.append
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        threading.excepthook = hook
    assert not failed and not errors


def memory_per_chunk(condition: Any, shape: tuple[int, ...], chunks: int, **options: Any) -> list[tuple[int, int]]:
    """(bytes that stay, most bytes at a time) of each chunk."""
    found = []
    with Alive() as alive:
        for _chunk in condition.decode_stream((torch.randn(shape) for _ in range(chunks)), **options):
            del _chunk
            found.append((alive.now, alive.most))
            alive.most = alive.now
    return found


@pytest.mark.parametrize(
    ("name", "tiled"),
    [("wan21", False), ("wan21", True), ("wan22", False), ("hunyuan_video15", False)],
    ids=["wan21", "wan21_tiled", "wan22", "hunyuan_video15"],
)
def test_memory_is_flat_over_50_chunks(name, tiled, directories):
    condition, w = load_case(name, directories), 2
    if tiled:
        condition.enable_tiling(**CASES[name].tiles)
        w = CASES[name].tiles["tile_sample_min_width"] // condition.spatial_stride + 1
    found = memory_per_chunk(condition, (1, 1, CASES[name].latents[2], 2, w), 50, context=3)
    steady = found[5:]
    assert len(found) == 50 and len(set(steady)) == 1, "bytes that stay and peak"
    assert steady[0][1] > steady[0][0] > 0


def test_without_a_context_the_attention_of_hunyuan_video_remembers_all(directories):
    found = memory_per_chunk(load_case("hunyuan_video15", directories), (1, 1, 4, 2, 2), 8)
    stays = [now for now, _ in found]
    rows = 2 * 16 * 4 * (2 * 2)  # keys and values, 16 channels in fp32, of each latent of a frame
    assert {b - a for a, b in zip(stays[2:], stays[3:], strict=False)} == {rows}


def test_a_context_changes_the_attention_of_hunyuan_video_only(directories):
    """Pixels of frames that still see all are the same; the error of the others falls as the context grows."""
    condition = load_case("hunyuan_video15", directories)
    latents = torch.randn(1, 32, 4, 2, 2) * 2
    exact = stream(condition, latents, [32])
    error = {}
    for context in (1, 8, 20, 31):
        got = stream(condition, latents, [5, 27], context=context)
        seen = condition.pixel_frames(context + 1)
        assert torch.equal(got[:, :seen], exact[:, :seen]), "the frame itself and `context` more"
        assert context == 31 or not torch.equal(got[:, seen : seen + 4], exact[:, seen : seen + 4])
        error[context] = float((got - exact).square().mean().sqrt() / exact.std())
    assert 0.1 > error[1] > 0.03 > error[8] > 0.01 > error[20] > error[31] == 0, "what the decoder says"
    assert torch.equal(stream(condition, latents, [1, 2, 29], context=8), stream(condition, latents, [32], context=8))
    with pytest.raises(ValueError, match="context must be at least 1 latent frame or None but is 0"):
        condition.decode_stream(iter([latents]), context=0)


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_wan_needs_no_context(name, directories):
    condition = load_case(name, directories)
    latents = torch.randn(1, 4, CASES[name].latents[2], 2, 2)
    assert torch.equal(stream(condition, latents, [2, 2], context=1), stream(condition, latents, [2, 2]))


def test_the_linear_codec_has_tiles_and_no_past():
    videos = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    condition = LinearCondition.fit(videos, patch=4, channels=12)
    latents = condition.encode_to_latent(videos)
    whole = condition.decode_to_pixel(latents)
    condition.enable_tiling()
    condition.offload = True
    assert torch.equal(stream(condition, latents, [1, 3], context=1), whole)
    assert torch.equal(condition.encode_to_latent(videos), latents)


class FromHost(TorchFunctionMode):
    """Counts calls that bring a host value or tensor to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ({t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in ((args, kwargs), out))
        self.copies += "meta" in made and ("cpu" in given or func is torch.tensor)
        return out


def test_nothing_is_copied_to_the_device_per_chunk(case, condition):
    """The meta device, from which nothing can be read, stands for a GPU."""
    name, case = case
    condition.component("vae")
    condition.to("meta")
    with FromHost() as counter:
        counts = []
        for pixel in condition.decode_stream(torch.empty(1, 2, *case.latents[2:], device="meta") for _ in range(3)):
            assert pixel.device.type == "meta"
            counts.append(counter.copies)
    assert counts == [1 if name.startswith("wan") else 0] * 3, "once, the moments of the latents"


@pytest.mark.parametrize("decoder", [WanDecoder, HunyuanVideo15Decoder], ids=["wan21", "hunyuan_video15"])
def test_waiting_tiles_in_host_memory_give_the_same_bits(decoder, directories):
    name = "wan21" if decoder is WanDecoder else "hunyuan_video15"
    condition = load_case(name, directories)
    condition.enable_tiling(**CASES[name].tiles)
    vae = condition.component("vae")
    here, there = decoder(vae), decoder(vae, on_host=True)
    buffers = None
    with torch.no_grad():
        for chunk in torch.randn(1, *CASES[name].latents[1:]).transpose(1, 2).split([1, 1, 2], 2):
            assert torch.equal(there(chunk), here(chunk))
            before, buffers = buffers, {(p, k): v for p, past in there.past.items() for k, v in past.items()}
        same = [value is before[key] for key, value in buffers.items() if isinstance(value, torch.Tensor)]
    attentions = 0 if decoder is WanDecoder else len(there.past)  # whose past grows
    assert same.count(False) == attentions and len(same) > 20, "buffers are used again"


def test_waiting_tiles_leave_the_device_with_offload_and_tiling_only(directories):
    condition = load_case("wan21", directories).to("meta")
    assert not condition._on_host()
    condition.offload = True
    assert not condition._on_host()
    condition.enable_tiling()
    assert condition._on_host()
    on_cpu = load_case("wan21", directories)
    on_cpu.offload = True
    on_cpu.enable_tiling()
    assert not on_cpu._on_host()


@pytest.mark.parametrize(
    ("vae", "decoder", "shape", "expected"),
    [
        (AutoencoderKLWan, WanDecoder, (16, 60, 104), (7.8, 3.8, 6.9, 6.3, 1.3)),
        (AutoencoderKLHunyuanVideo15, HunyuanVideo15Decoder, (32, 30, 52), (10.9, 5.5, 10.1, 9.2, 1.8)),
    ],
    ids=["wan21", "hunyuan_video15"],
)
def test_memory_at_480_by_832_is_what_the_decoders_say(vae, decoder, shape, expected):
    """GB in fp32, on the meta device: at most and past, whole, then in tiles, and at most where other tiles' past is away."""
    channels, h, w = shape
    with torch.device("meta"):
        vae = vae()
    vae.use_tiling = True
    down, across = decoder(vae).axes(h, w)
    vae.use_tiling = False
    found = []
    for height, width in ((h, w), (down.tile, across.tile)):
        one = decoder(vae)
        with torch.no_grad(), Alive() as alive:
            for _ in range(3):
                one(torch.empty(1, channels, 1, height, width, device="meta"))
        past = sum(value.nbytes for value in one.past[0, 0].values() if isinstance(value, torch.Tensor))
        found.append((alive.most, past))
    (most, past), (most_of_tile, past_of_tile) = found
    rows, columns = (sum(min(a.tile, n - i) for i in range(0, n, a.stride)) for a, n in ((down, h), (across, w)))
    past_of_tiles = past * rows * columns / (h * w)
    sizes = (most, past, most_of_tile - past_of_tile + past_of_tiles, past_of_tiles, most_of_tile)
    figures = tuple(round(size / 1e9, 1) for size in sizes)
    assert figures == expected and all(str(figure) in decoder.__doc__ for figure in figures)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", [WanDecoder, HunyuanVideo15Decoder], ids=["wan21", "hunyuan_video15"])
def test_on_a_gpu_waiting_tiles_leave_the_device(decoder, directories):
    name = "wan21" if decoder is WanDecoder else "hunyuan_video15"
    condition = load_case(name, directories).to("cuda")
    condition.enable_tiling(**CASES[name].tiles)
    vae, latents = condition.component("vae"), torch.randn(1, CASES[name].latents[2], 6, 16, 30, device="cuda")
    pixels, left = [], []
    for on_host in (False, True):
        one = decoder(vae, on_host=on_host)
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            pixels.append(torch.cat([one(chunk) for chunk in latents.split([1, 2, 3], 2)], 2).cpu())
        left.append(torch.cuda.memory_allocated() - before)
    stored = [value for past in one.past.values() for value in past.values() if isinstance(value, torch.Tensor)]
    assert all(value.is_pinned() for value in stored)
    assert left[0] > left[1] == 0
    assert torch.equal(*pixels)
