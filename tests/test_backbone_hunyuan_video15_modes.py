"""The HunyuanVideo 1.5 backbone between its modes: streaming, teacher forcing, bidirectional, with every branch."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_hunyuan_video15 import CONDITIONED, close, conditions, one, stream, tiny, video

from dit_ops import attention
from dit_ops.actions import action_labels
from dit_ops.backbones import hunyuan_video15_block
from dit_ops.backbones._block import make_shard_unit
from dit_ops.backbones.hunyuan_video15_text import video_mask
from dit_ops.layout import VideoLayout


def noise_levels(chunks, B=2):
    return torch.cat([torch.full((B, n), 100.0 + 150 * i) for i, n in enumerate(chunks)], 1)


# streaming and teacher forcing


@pytest.mark.parametrize("camera, rotated", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("chunks", [[2, 2, 2], [1, 1, 1], [4, 3]], ids=str)
def test_streaming_equals_teacher_forcing(chunks, camera, rotated):
    """Three chunks, two samples with texts of different lengths."""
    model, F = tiny(camera, block_frames=chunks[0]), sum(chunks)
    (latents, clean, cameras), given, t = video(F=F, camera=camera), conditions(), noise_levels(chunks)
    with torch.no_grad():
        forced = model(latents, t, **given, clean_latents=clean, **cameras)
    close(stream(model, latents, t, given, cameras, chunks, clean=clean, rotated=rotated), forced)


def test_streaming_equals_teacher_forcing_with_actions_and_condition_latents():
    """The rerun of a clean chunk goes without action, as the clean half of teacher forcing does."""
    model, chunks = tiny(config=CONDITIONED, action=True), [2, 2, 2]
    (latents, clean, cameras), given, t = video(F=6), conditions(), noise_levels([2, 2, 2])
    action, condition = action_labels(cameras["viewmats"]), torch.randn(2, 6, 5, 3, 4)
    with torch.no_grad():
        forced = model(latents, t, **given, clean_latents=clean, **cameras, action=action, condition_latents=condition)
        other = model(latents, t, **given, clean_latents=clean, **cameras, action=action + 1, condition_latents=condition)
    assert (forced - other).abs().max() > 1e-2
    along = cameras | {"condition_latents": condition}
    close(stream(model, latents, t, given, along, chunks, clean=clean, action=action), forced)


def test_the_shared_prope_cache_differs_from_the_second_chunk_on():
    model, chunks = tiny(), [2, 2, 2]
    (latents, clean, cameras), given, t = video(F=6), conditions(), noise_levels([2, 2, 2])
    with torch.no_grad():
        forced = model(latents, t, **given, clean_latents=clean, **cameras)
    model.prope_cache = "shared"
    got = stream(model, latents, t, given, cameras, chunks, clean=clean)
    close(got[:, :2], forced[:, :2])
    assert all((got[:, i : i + 2] - forced[:, i : i + 2]).abs().max() > 1e-3 for i in (2, 4))
    with pytest.raises(ValueError, match="rotated must be True for a model with prope_cache = 'shared'"):
        model.new_cache(2, 3, 4, rotated=False)


def test_what_the_prope_path_sees_through_a_shared_cache(monkeypatch):
    """Of the past the RoPE path's keys and values, of its own chunk its own; also where the ring wraps inside a chunk."""
    model, seen = tiny(prope_cache="shared"), []
    (latents, _, cameras), given, S = video(F=6), conditions(), 12

    def spy(q, k, v, mask):
        if q.shape[1] == 2 * S:  # a chunk's call, not the text's; slots hold frames [5, 1, 2, 3, 4] behind the text
            frames = (t[:, -5 * S :].unflatten(1, (5, S)) for t in (k, v) if k.shape[1] > 5 * S)
            seen.append([[torch.equal(f[:, slot, :, :2], f[:, slot, :, 2:]) for slot in range(5)] for f in frames])
        return attention(q, k, v, mask)

    monkeypatch.setattr(hunyuan_video15_block, "attention", spy)
    stream(model, latents, noise_levels([2, 2, 2]), given, cameras, [2, 2, 2], window_frames=5)
    assert seen[-1] == [[False, True, True, True, False]] * 2


def test_window_and_sink():
    """As without a window until a frame leaves; afterwards not."""
    model, chunks = tiny(), [1] * 6
    (latents, _, cameras), given, t = video(F=6), conditions(), noise_levels([1] * 6)
    full = stream(model, latents, t, given, cameras, chunks)
    kept = stream(model, latents, t, given, cameras, chunks, window_frames=4, sink_frames=1)
    close(kept[:, :4], full[:, :4])
    assert all((kept[:, i] - full[:, i]).abs().max() > 1e-3 for i in (4, 5))
    close(stream(model, latents, t, given, cameras, chunks, window_frames=4, sink_frames=1, rotated=False), kept)


def test_the_text_runs_once_and_a_new_text_replaces_it():
    model, calls = tiny(), []
    model.transformer.context_embedder.proj_in.register_forward_hook(lambda *_: calls.append(1))
    (latents, _, cameras), given = video(F=6), conditions()
    stream(model, latents, noise_levels([2, 2, 2]), given, cameras, [2, 2, 2])
    assert len(calls) == 1
    cache, here, t = model.new_cache(2, 3, 4, text_tokens=12), {k: v[:, :2] for k, v in cameras.items()}, torch.ones(2) * 500
    longer = given | {"image_embeds": torch.randn(2, 4, 8)}
    with torch.no_grad():
        first = model(latents[:, :2], t, **given, **here, cache=cache)
        second = model(latents[:, :2], t, **longer, **here, cache=cache)
        exact = model.new_cache(2, 3, 4)
        close(second, model(latents[:, :2], t, **longer, **here, cache=exact))
        assert len(calls) == 4 and not torch.allclose(first, second)
        assert exact.prefix == 10  # as many as the text has
        small = model.new_cache(2, 3, 4)
        close(model(latents[:, :2], t, **given, **here, cache=small), first)
        with pytest.raises(ValueError, match="the text has 10 tokens, but the cache has room for 8 .text_tokens"):
            model(latents[:, :2], t, **longer, **here, cache=small)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rotated", [True, False])
def test_gradient_through_the_cache_is_truncated_to_the_chunk(checkpointing, rotated):
    """A rollout that trains through the cache = every chunk on its own, its past a constant; the text has its gradient."""
    model = tiny()
    (latents, clean, cameras), given = video(F=6), conditions()
    w = torch.randn_like(latents)

    def chunk(cache, first, grad, x, t):
        part = slice(first, first + 2)
        here = {k: v[:, part] for k, v in cameras.items()}
        with torch.set_grad_enabled(grad):
            return model(x[:, part], torch.full((2, 2), t), **given, **here, cache=cache, start_frame=first)

    model.gradient_checkpointing = checkpointing
    cache, loss = model.new_cache(2, 3, 4, window_frames=4, rotated=rotated), 0.0
    for first in (0, 2, 4):
        chunk(cache, first, False, latents, 900.0)
        flow = chunk(cache, first, True, latents, 500.0)
        loss = loss + (flow * w[:, first : first + 2]).sum()
        chunk(cache, first, False, clean, 0.0)  # overwrites the slots before backward runs
    loss.backward()
    together = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    assert "transformer.context_embedder.proj_in.weight" in together

    model.zero_grad()
    model.gradient_checkpointing = False
    for last in (0, 2, 4):
        cache = model.new_cache(2, 3, 4, window_frames=4)
        for first in range(0, last, 2):
            chunk(cache, first, False, clean, 0.0)
        (chunk(cache, last, True, latents, 500.0) * w[:, last : last + 2]).sum().backward()
    for name, expected in together.items():
        error = (model.get_parameter(name).grad - expected).norm() / expected.norm().clamp_min(1e-3)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


# teacher forcing


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_gradients(recompute):
    model = tiny(action=True)
    (latents, clean, cameras), given, t = video(), conditions(), 900 * torch.rand(2, 5)
    action = action_labels(cameras["viewmats"])

    def gradients():
        model.zero_grad()
        model(latents, t, **given, clean_latents=clean, **cameras, action=action).square().mean().backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing = recompute
    got = gradients()
    assert got.keys() == expected.keys() and any(k.startswith("action.") for k in got)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_perturbing_clean_block_i_never_changes_noisy_blocks_up_to_i(block_index):
    model, (latents, clean, cameras), given = tiny(), video(), conditions()
    t, changed = torch.full((2, 5), 400.0), clean.clone()
    changed[:, block_index * 2 :] += 1
    with torch.no_grad():
        a, b = (model(latents, t, **given, clean_latents=c, **cameras) for c in (clean, changed))
    until = min((block_index + 1) * 2, 5)
    assert torch.equal(a[:, :until], b[:, :until])
    assert until == 5 or not torch.allclose(a[:, until:], b[:, until:])


def test_masks_are_the_rule_written_out():
    """[padding | text | clean | noisy]: all see the sample's text, noisy block i the clean blocks before it and itself."""
    layout, lengths, T, S = VideoLayout(3, 1, 2, 2, 2, prefix=4), (3, 4), 4, 2
    masks = video_mask(layout, 12, 16, lengths)
    for mask, n in zip(masks, lengths, strict=True):
        for q, k in [(q, k) for q in range(12) for k in range(16)]:
            q_half, q_block = q // 6, q % 6 // S // 2
            if k < T:
                expected = k >= T - n
            else:
                k_half, k_block = (k - T) // 6, (k - T) % 6 // S // 2
                clean = k_half == 0 and (k_block <= q_block if q_half == 0 else k_block < q_block)
                expected = clean or (q_half == k_half == 1 and q_block == k_block)
            assert mask.dense()[q, k] == expected, (n, q, k)


# batches, the text's timestep


def test_batch_equals_single_samples_and_padding_may_hold_anything():
    model, given = tiny(), conditions()
    poisoned = {k: v.clone() for k, v in given.items()}
    for n in ("", "_2"):
        padding = given[f"encoder_attention_mask{n}"] == 0
        poisoned[f"encoder_hidden_states{n}"][padding] = float("nan")
    for F, clean in [(5, True), (3, False)]:
        (latents, forced, cameras), t = video(F=F), 900 * torch.rand(2, F)
        extra = {"clean_latents": forced} if clean else {}
        with torch.no_grad():
            both = model(latents, t, **poisoned, **cameras, **extra)
            for i in range(2):
                alone = model(latents[i : i + 1], t[i : i + 1], **one(given, i), **one(cameras, i), **one(extra, i))
                close(alone, both[i : i + 1])


def test_one_sample_of_a_batch_may_have_no_image():
    model, (latents, _, cameras), given = tiny(), video(), conditions()
    given["image_embeds"][1] = 0
    t = torch.tensor([500.0, 900.0])
    with torch.no_grad():
        both = model(latents, t, **given, **cameras)
        without = {k: v for k, v in one(given, 1).items() if k != "image_embeds"}
        close(model(latents[1:], t[1:], **without, **one(cameras, 1)), both[1:])


def test_the_same_parameters_have_a_gradient_whatever_a_batch_holds():
    """Otherwise ranks that shard a model would reduce gradients of different sizes."""
    model, (latents, _, cameras), given = tiny(), video(), conditions()
    nothing = {k: torch.zeros_like(v) if "2" in k or "image" in k else v for k, v in given.items()}
    found = []
    for held in (given, nothing, {k: v for k, v in given.items() if "mask" not in k}):
        model.zero_grad()
        model(latents, torch.tensor([500.0, 900.0]), **held, **cameras).square().mean().backward()
        found.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] == found[1] == found[2]
    assert {f"transformer.{n}.weight" for n in ("image_embedder.linear_1", "context_embedder_2.linear_1")} <= found[0]
    with torch.no_grad():
        alone = {k: v for k, v in given.items() if "2" not in k and "image" not in k}
        t = torch.tensor([500.0, 900.0])
        empty = model(latents, t, **nothing, **cameras)
        close(empty, model(latents, t, **alone, **cameras), 0)
    close(model(latents, t, **nothing, **cameras), empty)


def test_the_text_timestep():
    """Bidirectional: the video's, the highest of its frames; or always the fixed one. Causal: 0."""
    model, (latents, clean, cameras), given = tiny(), video(), conditions()
    t = torch.tensor([500.0, 900.0])
    frames = torch.tensor([[0.0, 500, 500, 500, 500], [0, 900, 900, 900, 900]])
    run = lambda t, **o: model(latents, t, **given, **cameras, **o)
    seen = []
    model.transformer.context_embedder.time_text_embed.register_forward_pre_hook(lambda _, a: seen.append(a[0].tolist()))
    with torch.no_grad():
        free = run(t)
        run(frames)
        run(t, clean_latents=clean)
        model.text_timestep = 0.0
        assert (run(t) - free).abs().max() > 1e-3
        run(t, clean_latents=clean)
    assert seen == [[500, 900], [500, 900], [0, 0], [0, 0], [0, 0]]


def on_a_rank(rank, ranks):
    """Every block is a shard unit with its camera projection outside; forward, gradients and streaming."""
    model, (latents, clean, cameras), given = sharded_case()
    for block in model.transformer.transformer_blocks:
        make_shard_unit(block)
        fully_shard(block)
    fully_shard(model)
    return run_case(model, latents, clean, cameras, given)


def sharded_case():
    torch.manual_seed(0)
    return tiny(), video(F=4), conditions()


def run_case(model, latents, clean, cameras, given):
    t = noise_levels([2, 2])
    model.gradient_checkpointing = "full"
    model(latents, t, **given, clean_latents=clean, **cameras).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return gradients | {"flow": stream(model, latents, t, given, cameras, [2, 2])}


@pytest.mark.dist
def test_sharded_over_two_ranks_is_the_single_process(run_ranks):
    model, parts, given = sharded_case()
    expected = run_case(model, *parts, given)
    for got in run_ranks(on_a_rank, 2):
        assert got.keys() == expected.keys()
        for name in expected:
            close(got[name], expected[name])


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does(device):
    model, (latents, clean, cameras), given = tiny(), video(F=6), conditions()
    t, results = noise_levels([2, 2, 2]), []
    for where in ("cpu", device):
        model.to(where)
        x, y, c, g, level = latents.to(where), clean.to(where), _to(cameras, where), _to(given, where), t.to(where)
        with torch.no_grad():
            forced = model(x, level, **g, clean_latents=y, **c)
            both = model(x, level[:, 0], **g, **c)
        streamed = stream(model, x, level, g, c, [2, 2, 2], clean=y)
        results.append([r.cpu() for r in (forced, both, streamed)])
    for got, expected in zip(results[1], results[0], strict=True):
        close(got, expected, 1e-4)


def _to(tensors, device):
    return {name: tensor.to(device) for name, tensor in tensors.items()}
