"""The Wan backbone against the reference system's recorded numbers, against diffusers, and against itself between modes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from dit_ops import _library as lib
from dit_ops import use_backend
from dit_ops.backbones.wan import WanBackbone
from dit_ops.backbones.wan_original import rename
from dit_ops.camera import intrinsics_matrix, parse_trajectory
from dit_ops.registry import load_backbone

GOLDEN = Path(__file__).with_name("golden")
TINY = dict(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=64,
    text_dim=12,
    freq_dim=32,
    in_channels=4,
    out_channels=4,
)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "cases.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    cases = load_file(GOLDEN / "cases.safetensors")
    for name, value in cases.items():  # recorded as [B, Cz, F, h, w]
        if name.split(".")[0] in ("bi", "tf", "cache", "window", "evict") and value.dim() == 5:
            cases[name] = value.transpose(1, 2)
        if name.endswith(".context"):  # the condition side pads the text to text_len
            cases[name] = torch.nn.functional.pad(value, (0, 0, 0, config["text_len"] - value.shape[1]))
    return config, cases


def golden_model(config, block_frames=2):
    return WanBackbone.from_original(GOLDEN / "wan_original_format.safetensors", config, block_frames=block_frames)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def tiny(camera=True, block_frames=2, **config):
    """A random model with a camera branch that matters."""
    model = WanBackbone.from_config(TINY | config, camera=camera, block_frames=block_frames)
    if camera:
        for layer in model.camera:
            torch.nn.init.normal_(layer.weight, std=0.2)
            torch.nn.init.normal_(layer.bias, std=0.2)
    return model


def inputs(B=2, F=5, h=4, w=6, T=7, camera=True):
    latents, clean = torch.randn(2, B, F, 4, h, w)
    pose = parse_trajectory(f"l*{F - 1}" if F > 1 else "l*0")
    cameras = dict(viewmats=pose.expand(B, F, 4, 4), Ks=intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)) if camera else {}
    return latents, clean, torch.randn(B, T, 12), cameras


def stream(model, latents, text, cameras, chunks, timestep, *, clean=None, **cache_options):
    """Runs chunk after chunk at `timestep`, then again at 0 on the clean latents, as generation does."""
    B, F, _, h, w = latents.shape
    cache, start, flows = model.new_cache(B, h, w, **cache_options), 0, []
    for frames in chunks:
        part = slice(start, start + frames)
        here = {k: v[:, part] for k, v in cameras.items()}
        options = dict(cache=cache, start_frame=start, **here)
        with torch.no_grad():
            flows.append(model(latents[:, part], timestep[:, part], text, **options))
            again = model((latents if clean is None else clean)[:, part], torch.zeros(B, frames), text, **options)
        start += frames
    return torch.cat(flows, 1), again


# against the reference system


def test_golden_bidirectional(golden):
    config, c = golden
    flow = golden_model(config)(c["bi.latents"], c["bi.timestep"], c["bi.context"], viewmats=c["bi.viewmats"], Ks=c["bi.Ks"])
    close(flow, c["bi.flow"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_teacher_forcing_and_every_gradient(golden, checkpointing):
    config, c = golden
    model = golden_model(config)
    model.gradient_checkpointing = checkpointing
    flow = model(
        c["tf.latents"],
        c["tf.timestep"],
        c["tf.context"],
        clean_latents=c["tf.clean"],
        viewmats=c["tf.viewmats"],
        Ks=c["tf.Ks"],
    )
    close(flow, c["tf.flow"])
    (flow * c["tf.cotangent"]).mean().backward()
    recorded = {rename(k.removeprefix("tf.grad.")): v for k, v in c.items() if k.startswith("tf.grad.")}
    own = {k: p.grad for k, p in model.transformer.named_parameters()}
    own |= {f"camera:blocks.{k}": p.grad for k, p in model.camera.named_parameters()}
    assert recorded and recorded.keys() <= own.keys()
    for name, expected in recorded.items():
        error = (own[name].reshape(expected.shape) - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
@pytest.mark.parametrize(
    "case, block, frames, options",
    [
        ("cache", 2, 6, {}),
        ("window", 1, 4, dict(window_frames=4, sink_frames=1)),
        ("evict", 1, 7, dict(window_frames=4, sink_frames=1)),
    ],
)
def test_golden_streaming(golden, case, block, frames, options, rotated):
    config, c = golden
    model = golden_model(config, block)
    B, _, _, h, w = c[f"{case}.latents"].shape
    cache = model.new_cache(B, h, w, rotated=rotated, **options)
    for first in range(0, frames, block):
        part = slice(first, first + block)
        latents = c[f"{case}.latents"][:, part]
        for t in (750.0, 0.0):
            with torch.no_grad():
                flow = model(
                    latents,
                    torch.full((B, block), t),
                    c[f"{case}.context"],
                    viewmats=c[f"{case}.viewmats"][:, part],
                    Ks=c[f"{case}.Ks"][:, part],
                    cache=cache,
                    start_frame=first,
                )
            close(flow, c[f"{case}.flow_t{t:.0f}"][:, part])


def test_golden_through_the_reference_backend(golden):
    config, c = golden
    with use_backend("reference"):
        flow = golden_model(config)(
            c["bi.latents"], c["bi.timestep"], c["bi.context"], viewmats=c["bi.viewmats"], Ks=c["bi.Ks"]
        )
    close(flow, c["bi.flow"])


# against diffusers

I2V = dict(in_channels=9, image_dim=10, added_kv_proj_dim=48)


@pytest.mark.parametrize("config", [{}, dict(cross_attn_norm=False), I2V], ids=["t2v", "no cross norm", "i2v"])
def test_equals_diffusers(config):
    model = tiny(camera=False, **config)
    T = 512 if config is I2V else 7  # diffusers takes the last 512 rows as text and the rest as image
    latents, _, text, _ = inputs(T=T)
    t, kwargs, stock = torch.tensor([833.0, 250.0]), {}, {}
    x = latents
    if config is I2V:
        kwargs = dict(encoder_hidden_states_image=torch.randn(2, 6, 10), condition_latents=torch.randn(2, 5, 5, 4, 6))
        stock = dict(encoder_hidden_states_image=kwargs["encoder_hidden_states_image"])
        x = torch.cat([latents, kwargs["condition_latents"]], 2)
    with torch.no_grad():
        expected = model.transformer(x.transpose(1, 2), t, text, return_dict=False, **stock)[0].transpose(1, 2)
        close(model(latents, t, text, **kwargs), expected, 2e-5)


def test_bf16_is_as_far_from_fp32_as_diffusers_is():
    model = tiny(camera=False, num_attention_heads=4)
    latents, _, text, _ = inputs()
    t = torch.tensor([833.0, 250.0])
    with torch.no_grad():
        exact = model(latents, t, text)
        half = WanBackbone.from_config(dict(model.config), block_frames=2)
        half.load_state_dict(model.state_dict())
        keep = model.transformer._keep_in_fp32_modules
        for name, p in half.transformer.named_parameters():
            p.data = p.data if any(k in name.split(".") for k in keep) else p.data.bfloat16()
        x, c = latents.bfloat16(), text.bfloat16()
        own = half(x, t, c)
        stock = half.transformer(x.transpose(1, 2), t, c, return_dict=False)[0].transpose(1, 2)
    assert own.dtype == torch.bfloat16
    assert (own.float() - exact).norm() <= 1.2 * (stock.float() - exact).norm()


def test_round_trip_with_diffusers_is_silent_and_bitwise(tmp_path, caplog):
    model = tiny()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    for name, value in stock.state_dict().items():
        assert torch.equal(value, model.transformer.state_dict()[name]), name
    again = load_backbone(tmp_path)
    assert isinstance(again, WanBackbone) and again.block_frames == 2
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = (p.joinpath("diffusion_pytorch_model.safetensors").read_bytes() for p in (tmp_path, tmp_path / "stock"))
    assert ours == theirs
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= json.loads(
        (tmp_path / "stock/config.json").read_text()
    ).keys() - {"_name_or_path"}


def test_a_stock_checkpoint_loads_without_camera_and_gains_one_that_changes_nothing(tmp_path):
    WanTransformer3DModel.from_config(TINY).save_pretrained(tmp_path)
    model = WanBackbone.from_pretrained(tmp_path)
    latents, _, text, cameras = inputs()
    with torch.no_grad():
        before = model(latents, torch.tensor([500.0, 1.0]), text)
        model.add_camera()
        assert torch.equal(before, model(latents, torch.tensor([500.0, 1.0]), text, **cameras))


# between the modes


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("block, F", [(1, 3), (2, 6), (2, 5), (4, 7), (4, 8)])
def test_streaming_equals_teacher_forcing(block, F, camera):
    model = tiny(camera, block)
    latents, clean, text, cameras = inputs(F=F, camera=camera)
    chunks = [min(block, F - f) for f in range(0, F, block)]
    t = torch.cat([torch.full((2, n), 100.0 + 150 * i) for i, n in enumerate(chunks)], 1)
    with torch.no_grad():
        forced = model(latents, t, text, clean_latents=clean, **cameras)
    flow, _ = stream(model, latents, text, cameras, chunks, t, clean=clean)
    close(flow, forced)


def test_window_and_sink_equal_a_dense_mask_after_many_evictions():
    """The last chunk of a windowed stream = one bidirectional-in-block pass in which only sink and window frames exist."""
    model = tiny(block_frames=1, num_layers=1)  # one layer: the keys of a frame depend on that frame alone
    latents, _, text, cameras = inputs(F=9)
    t = torch.zeros(2, 9)
    flow, _ = stream(model, latents, text, cameras, [1] * 9, t, window_frames=4, sink_frames=1)
    q_frame, seen = 8, [0, 6, 7, 8]
    full, _ = stream(model, latents, text, cameras, [1] * 9, t)
    assert not torch.allclose(flow[:, q_frame], full[:, q_frame])
    cache = model.new_cache(2, 4, 6)
    with torch.no_grad():
        for i, f in enumerate(seen):  # the same frames alone, at their own positions
            cache.reset() if i == 0 else None
            cache.end_frame = f  # pretend that the frames in between were evicted
            cache.ring.slot = lambda frame, order=tuple(seen): order.index(frame)
            cache.ring.filled = lambda last, order=tuple(seen): order.index(last - 1) + 1
            here = {k: v[:, f : f + 1] for k, v in cameras.items()}
            out = model(latents[:, f : f + 1], t[:, :1], text, cache=cache, start_frame=f, **here)
    close(flow[:, q_frame], out[:, 0])


@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("window, sink", [(None, 0), (4, 0), (5, 1), (6, 3)])
def test_an_unrotated_cache_gives_the_same_flow(window, sink, camera):
    """First block shorter, evictions, and chunks of 3 that wrap around rings of 4."""
    model = tiny(camera)
    latents, clean, text, cameras = inputs(F=13, camera=camera)
    t = 900 * torch.rand(2, 13)
    run = lambda rotated: stream(
        model,
        latents,
        text,
        cameras,
        [1, 3, 3, 3, 3],
        t,
        clean=clean,
        window_frames=window,
        sink_frames=sink,
        rotated=rotated,
    )
    for got, want in zip(run(False), run(True), strict=True):
        close(got, want)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_a_batch_of_two_prompts_streams_as_two_runs_do(rotated):
    model = tiny()
    latents, _, text, cameras = inputs(F=6)
    options = {"window_frames": 4, "sink_frames": 1, "rotated": rotated}
    t = 900 * torch.rand(2, 6)
    flow, again = stream(model, latents, text, cameras, [1, 2, 3], t, **options)
    for b in range(2):
        one = slice(b, b + 1)
        here = {k: v[one] for k, v in cameras.items()}
        alone = stream(model, latents[one], text[one], here, [1, 2, 3], t[one], **options)
        for got, want in zip(alone, (flow, again), strict=True):
            close(got, want[one])


def test_two_models_with_a_cache_each_do_not_meet():
    """As two experts of one rollout: each has keys of its own, of the text as well."""
    models = tiny(), tiny()
    latents, _, text, cameras = inputs(F=4)
    t = torch.full((2, 4), 500.0)
    alone = [stream(model, latents, text, cameras, [2, 2], t)[0] for model in models]
    caches, flows = [model.new_cache(2, 4, 6) for model in models], ([], [])
    with torch.no_grad():
        for first in (0, 2):
            here = {k: v[:, first : first + 2] for k, v in cameras.items()}
            options = {"start_frame": first, **here}
            for time in (500.0, 0.0):
                for model, cache, out in zip(models, caches, flows, strict=True):
                    out.append(model(latents[:, first : first + 2], torch.full((2, 2), time), text, cache=cache, **options))
    for out, want in zip(flows, alone, strict=True):
        assert torch.equal(torch.cat(out[::2], 1), want)


class Watch(TorchDispatchMode):
    """Names of the operators that run, and those that write into one of `tensors`."""

    def __init__(self, tensors=()):
        super().__init__()
        self.names, self.writes = [], []
        self.storages = {t.untyped_storage().data_ptr() for t in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        schema = func._schema.arguments
        written = [a for a, argument in zip(args, schema, strict=False) if argument.is_write and isinstance(a, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.storages for t in written):
            self.writes.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(bool(lib.MISSING["cpu"]), reason="the compiled CPU operators write in place")
@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_a_step_over_a_full_cache_copies_allocates_and_waits_for_nothing(rotated, camera):
    """The kernel writes into the slots: no copy of keys and values, no new buffer or shape, no number back to the host."""
    model = tiny(camera)
    latents, _, text, cameras = inputs(F=16, camera=camera)
    cache, steady = model.new_cache(2, 4, 6, window_frames=6, sink_frames=2, rotated=rotated), []
    for first in range(0, 16, 2):
        here = {k: v[:, first : first + 2] for k, v in cameras.items()}
        buffers = [t for pair in (*cache._buffers, cache._turned) if pair for t in pair if t is not None]
        with torch.no_grad(), Watch() as before:
            model.announce(cache, first, 2, 4, 6, **here)
        with torch.no_grad(), Watch(buffers) as watch:
            model.predict(latents[:, first : first + 2], torch.full((2, 2), 500.0), text, cache=cache, **here)
        cache.commit()
        pointers = [t.data_ptr() for t in buffers]
        shapes = [tuple(t.shape for t in cache.visible(layer)) for layer in range(2)]
        waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}
        assert not waits & {*before.names, *watch.names}
        if first >= 6:
            once = ["dit_ops::qk_norm_rope_into"] * (1 if rotated else 2)
            assert watch.writes == once * 2  # two layers
            kernels = [name for name in watch.names if name != "aten::slice.Tensor"]
            steady.append((pointers, cache.nbytes, shapes, kernels))
    assert len(steady) == 5 and all(step == steady[0] for step in steady)


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
def test_a_streaming_step_is_captured_in_a_cuda_graph(rotated, device):
    """One step of a chunk of a full ring, replayed for later chunks of its phase: their flows, and their keys in the cache."""
    model = tiny(num_attention_heads=2, attention_head_dim=32).to(device)
    latents, _, text, cameras = inputs(F=14)
    latents, text = latents.to(device), text.to(device)
    cameras = {k: v.to(device) for k, v in cameras.items()}
    chunk = lambda first: {k: v[:, first : first + 2] for k, v in cameras.items()}
    t, x, seen = torch.full((2, 2), 500.0, device=device), latents[:, :2].clone(), {k: v.clone() for k, v in chunk(0).items()}
    step = lambda: model.predict(x, t, text, cache=caches[0], **seen)

    def announce(first):
        model.announce(caches[0], first, 2, 4, 6, **chunk(first))
        x.copy_(latents[:, first : first + 2])
        for name, value in chunk(first).items():
            seen[name].copy_(value)

    caches = [model.new_cache(2, 4, 6, window_frames=4, sink_frames=1, rotated=rotated) for _ in range(2)]
    graphs, flows, side = {}, {}, torch.cuda.Stream()
    with torch.no_grad():
        for first in range(0, 14, 2):
            want = model(latents[:, first : first + 2], t, text, cache=caches[1], start_frame=first, **chunk(first))
            announce(first)
            phase = caches[0].phase
            if first < 4:
                step()
            elif phase in graphs:
                graphs[phase].replay()
                torch.testing.assert_close(flows[phase], want)
            else:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    step()
                torch.cuda.current_stream().wait_stream(side)
                graphs[phase] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[phase]):
                    flows[phase] = step()
            caches[0].commit()
            for layer in range(2):
                for got, expected in zip(caches[0].visible(layer), caches[1].visible(layer), strict=True):
                    torch.testing.assert_close(got, expected)
    assert len(graphs) == 3  # a ring of 3 slots, chunks of 2


@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_perturbing_clean_block_i_never_changes_noisy_blocks_up_to_i(block_index):
    model, block = tiny(), 2
    latents, clean, text, cameras = inputs()
    t = torch.full((2, 5), 400.0)
    changed = clean.clone()
    changed[:, block_index * block :] += 1
    with torch.no_grad():
        a, b = (model(latents, t, text, clean_latents=c, **cameras) for c in (clean, changed))
    until = min((block_index + 1) * block, 5)
    assert torch.equal(a[:, :until], b[:, :until])
    assert until == 5 or not torch.allclose(a[:, until:], b[:, until:])


def test_batch_equals_single_samples_and_shapes_may_change_between_calls():
    model = tiny()
    for F, h, w in [(5, 4, 6), (3, 8, 2)]:
        latents, clean, text, cameras = inputs(F=F, h=h, w=w)
        t = 900 * torch.rand(2, F)
        with torch.no_grad():
            both = model(latents, t, text, clean_latents=clean, **cameras)
            for i in range(2):
                here = {k: v[i : i + 1] for k, v in cameras.items()}
                close(
                    model(latents[i : i + 1], t[i : i + 1], text[i : i + 1], clean_latents=clean[i : i + 1], **here),
                    both[i : i + 1],
                )


def test_output_depends_on_relative_cameras_only():
    model = tiny()
    latents, _, text, cameras = inputs()
    world = parse_trajectory("w*3,l*9")[-1]
    moved = cameras | {"viewmats": cameras["viewmats"] @ world}
    other = cameras | {"viewmats": cameras["viewmats"].flip(1)}
    with torch.no_grad():
        a, b, c = (model(latents, torch.tensor([500.0, 900]), text, **k) for k in (cameras, moved, other))
    close(a, b, 2e-5)
    assert not torch.allclose(a, c, atol=1e-3)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "unrotated"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_through_the_cache_is_truncated_to_the_chunk(checkpointing, rotated):
    """A rollout that trains through the cache = every chunk on its own, its past a constant."""
    model = tiny()
    model.gradient_checkpointing = checkpointing
    latents, clean, text, cameras = inputs(F=6)
    w = torch.randn_like(latents)

    def chunk(cache, first, grad, x, t):
        part = slice(first, first + 2)
        with torch.set_grad_enabled(grad):
            here = {k: v[:, part] for k, v in cameras.items()}
            return model(x[:, part], torch.full((2, 2), t), text, cache=cache, start_frame=first, **here)

    cache, loss = model.new_cache(2, 4, 6, window_frames=4, rotated=rotated), 0.0
    for first in (0, 2, 4):
        chunk(cache, first, False, latents, 900.0)
        flow = chunk(cache, first, True, latents, 500.0)
        loss = loss + (flow * w[:, first : first + 2]).sum()
        chunk(cache, first, False, clean, 0.0)  # overwrites the slots before backward runs
    loss.backward()
    together = {k: p.grad.clone() for k, p in model.named_parameters()}

    model.zero_grad()
    for last in (0, 2, 4):
        cache = model.new_cache(2, 4, 6, window_frames=4)
        for first in range(0, last, 2):
            chunk(cache, first, False, clean, 0.0)
        (chunk(cache, last, True, latents, 500.0) * w[:, last : last + 2]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert all(g.abs().sum() > 0 for k, g in together.items() if "to_k" not in k or "bias" not in k)


def test_a_chunk_that_ran_only_with_gradient_is_not_in_the_cache():
    model = tiny()
    latents, _, text, cameras = inputs(F=4)
    first, second = ({k: v[:, part] for k, v in cameras.items()} for part in (slice(0, 2), slice(2, 4)))
    cache = model.new_cache(2, 4, 6)
    flow = model(latents[:, :2], torch.full((2, 2), 500.0), text, cache=cache, **first)
    assert flow.requires_grad and cache.end_frame == 0
    with pytest.raises(ValueError, match=r"start_frame must be 0 \(the next frame\)"):
        model(latents[:, 2:], torch.full((2, 2), 500.0), text, cache=cache, start_frame=2, **second)


def test_text_keys_are_computed_once_per_text():
    model, calls = tiny(), []
    model.transformer.condition_embedder.text_embedder.register_forward_hook(lambda *_: calls.append(1))
    latents, _, text, cameras = inputs(F=6)
    stream(model, latents, text, cameras, [2, 2, 2], torch.full((2, 6), 500.0))
    assert len(calls) == 1
    cache = model.new_cache(2, 4, 6)
    here = {k: v[:, :2] for k, v in cameras.items()}
    with torch.no_grad():
        a = model(latents[:, :2], torch.full((2, 2), 500.0), text, cache=cache, **here)
        b = model(latents[:, :2], torch.full((2, 2), 500.0), -text, cache=cache, **here)
    assert not torch.allclose(a, b)


def test_image_keys_are_computed_again_for_another_image():
    model = tiny(camera=False, **I2V)
    latents, _, text, _ = inputs(F=2)
    condition, images = torch.randn(2, 2, 5, 4, 6), torch.randn(2, 2, 6, 10)
    caches = [model.new_cache(2, 4, 6) for _ in range(2)]
    run = lambda image, cache: model(
        latents,
        torch.full((2, 2), 500.0),
        text,
        encoder_hidden_states_image=image,
        condition_latents=condition,
        cache=cache,
    )
    with torch.no_grad():
        first, second = (run(image, caches[0]) for image in images)
        assert torch.equal(second, run(images[1], caches[1]))
    assert not torch.allclose(first, second)


# loading


def original_names(state, camera):
    """The inverse of the renaming, for models of our own making."""
    with safe_open(GOLDEN / "wan_original_format.safetensors", "pt") as file:
        names = list(file.keys())
    back = {rename(k): k for k in names}
    out = {back[k]: v for k, v in state.items()}
    return out | {back[f"camera:blocks.{k}"]: v for k, v in camera.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_minwm_checkpoints(golden, tmp_path, prefix):
    config, c = golden
    model = golden_model(config)
    names = original_names(model.transformer.state_dict(), model.camera.state_dict())
    plain = {prefix + k: torch.zeros_like(v) for k, v in names.items()}
    averaged = {prefix + k: v for k, v in names.items()}
    torch.save({"generator": plain, "generator_ema": averaged}, tmp_path / "model.pt")
    args = (c["bi.latents"], c["bi.timestep"], c["bi.context"])
    cameras = dict(viewmats=c["bi.viewmats"], Ks=c["bi.Ks"])
    for ema, expected in [(None, c["bi.flow"]), (True, c["bi.flow"]), (False, torch.zeros_like(c["bi.flow"]))]:
        with torch.no_grad():
            close(WanBackbone.from_original(tmp_path / "model.pt", config, ema=ema)(*args, **cameras), expected)
    torch.save({"generator": plain}, tmp_path / "no_ema.pt")
    with pytest.raises(ValueError, match="no 'generator_ema'"):
        WanBackbone.from_original(tmp_path / "no_ema.pt", config, ema=True)


class Payload:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_original_files_are_strict_and_never_run_code(golden, tmp_path):
    config, _ = golden
    weights = load_file(GOLDEN / "wan_original_format.safetensors")
    del weights["blocks.1.ffn.0.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['blocks.1.ffn.net.0.proj.bias'\], unexpected \['extra'\]"):
        WanBackbone.from_original(weights, config)
    torch.save({"generator": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a plain torch weight file"):
        WanBackbone.from_original(tmp_path / "evil.pt", config)
    with pytest.raises(ValueError, match="the original Wan config needs"):
        WanBackbone.from_original(weights, {"dim": 128})


def test_from_pretrained_is_strict(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights.pop("blocks.0.attn1.to_q.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="blocks.0.attn1.to_q.bias"):
        WanBackbone.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    camera = load_file(tmp_path / "camera.safetensors")
    save_file({k: v for k, v in camera.items() if k != "1.bias"}, tmp_path / "camera.safetensors")
    with pytest.raises(ValueError, match=r"camera branch does not fit, at \['1.bias'\]"):
        WanBackbone.from_pretrained(tmp_path)
    (tmp_path / "camera.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="announces a camera branch"):
        WanBackbone.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_backbone(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "OtherModel"}')
    with pytest.raises(ValueError, match="no backbone for 'OtherModel'; known are WanTransformer3DModel"):
        load_backbone(tmp_path)


def test_published_shapes_have_the_published_sizes():
    """1.3B, 14B and I2V 14B on the meta device: 1.419 B and 14.29 B parameters, 825 tensors for 1.3B."""
    small = dict(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    large = dict(num_attention_heads=40, num_layers=40, ffn_dim=13824)
    image = large | dict(in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=5120)
    for config, billions in [(small, 1.419), (large, 14.29), (image, 16.395)]:
        with torch.device("meta"):
            model = WanBackbone.from_config(config | dict(attention_head_dim=128))
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e9 - billions) < 0.005, count
        if config is small:
            assert len(model.state_dict()) == 825


# errors


def test_bad_input_is_named():
    model = tiny()
    latents, clean, text, cameras = inputs()
    t = torch.zeros(2)
    for args, kwargs, message in [
        ((latents[0], t, text), {}, r"latents must be \[B, F, Cz, h, w\], got \[5, 4, 4, 6\]"),
        ((latents, t, text[:, :, :5]), cameras, r"encoder_hidden_states must be .*\[2, T, 12\], got \[2, 7, 5\]"),
        ((latents, t, text), {}, "has a camera branch and needs viewmats and Ks"),
        ((latents, t, text), {"Ks": cameras["Ks"]}, "viewmats and Ks come together"),
        (
            (latents, t, text),
            cameras | {"viewmats": cameras["viewmats"][:, :3]},
            r"viewmats must be .*\[2, 5, 4, 4\], got \[2, 3, 4, 4\]",
        ),
        ((latents[..., :5], t, text), cameras, "multiples of the patch 2×2, got 4×5"),
        ((latents, t, text), cameras | {"clean_latents": clean[:, :4]}, "clean_latents must be"),
        ((latents, t, text), cameras | {"clean_latents": clean, "cache": model.new_cache(2, 4, 6)}, "exclude each other"),
        ((latents[:, :, :3], t, text), cameras, "must have 4 channels, got 3"),
        ((latents, torch.zeros(2, 3), text), cameras | {"clean_latents": clean}, r"F = 5, got \[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*args, **kwargs)
    with pytest.raises(ValueError, match="no camera branch"):
        tiny(camera=False)(latents, t, text, **cameras)
    with pytest.raises(ValueError, match=r"unknown keys \['num_layer'\]"):
        WanBackbone.from_config({"num_layer": 2})
