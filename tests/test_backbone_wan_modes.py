"""Wan's modes against each other: teacher forcing, streaming with every cache, and what each of them depends on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_tape import READS
from toy_wan import I2V, close, inputs, tiny

from dit_ops import _library as lib
from dit_ops.camera import parse_trajectory


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
        assert not READS & {*before.names, *watch.names}
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
