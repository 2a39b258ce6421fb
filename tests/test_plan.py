"""The calculator of memory and wire bytes against a small run's own tensors and collectives, and the page made with it."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_backbones import tiny_batch, tiny_wan
from toy_hunyuan_video15 import tiny, video
from toy_ranks import Collectives
from toy_stage import run_config, write_dataset

from dit_ops import use_backend
from dit_ops.training import flops, plan
from dit_ops.training.config import stage_class
from dit_ops.training.data import LatentDataset
from dit_ops.training.engine import Engine
from dit_ops.training.gradients import local
from dit_ops.training.parallelize import replicated

PAGE = Path(__file__).parent.parent / "docs/distributed.md"


def test_the_page_holds_what_the_calculator_says():
    assert PAGE.read_text() == plan.with_table(PAGE.read_text()), (
        "write it again: PAGE.write_text(plan.with_table(PAGE.read_text()))"
    )


def test_published_models_have_their_published_sizes():
    """1.42, 14.3 and 8.33 billion parameters, and C² + C more per layer for the camera."""
    for name, parameters, layers in (
        ("Wan 2.1 1.3B", 1.419e9, 30),
        ("Wan 2.1 14B", 14.29e9, 40),
        ("HunyuanVideo 1.5", 8.33e9, 54),
    ):
        sizes = plan.model_sizes(name)
        camera = layers * (sizes.channels**2 + sizes.channels)
        assert sizes.sharded + sizes.whole - camera == pytest.approx(parameters, rel=1e-3)
        assert len(sizes.blocks) == layers


def _count(rank: int, ranks: int, data: str, output: str) -> dict:
    values = {"precision": "bf16", "parallel": {"fsdp": "full"}, "data": {"path": data, "batch_size": 1}, "ema": {"decay": 0.5}}
    config = run_config(Path(data), output, **values)
    dataset = LatentDataset(data)
    stage = stage_class("bidirectional")(config.options, {"generator": tiny_wan(None)}, dataset.negative)
    engine = Engine(config, stage, dataset, Path(output), progress=False)
    generator, seen = stage.roles["generator"], {}
    first = generator.transformer.blocks[0]

    def look(*_) -> None:
        modules = {"to_q": first.attn1.to_q.weight, "table": first.scale_shift_table, "norm2": first.norm2.weight}
        seen.update({name: (str(p.dtype), p.numel()) for name, p in modules.items()})

    first.attn1.to_out[0].register_forward_hook(look)
    time = generator.transformer.condition_embedder.time_embedder
    time.register_forward_hook(lambda module, args, output: seen.update(time=(str(output.dtype), output.shape[-1])))
    engine._update("generator", 0)
    with Collectives() as count:
        engine._update("generator", 0)
    state = engine.state()
    tensors = [*state["model"]["generator"].values(), *state["ema"]["generator"].values()]
    tensors += [v for p in state["optimizer"]["generator"].values() for k, v in p.items() if k != "step"]
    held = sum(local(t).nbytes for t in tensors)
    return {"bytes": count.bytes, "held": held, "seen": seen, "whole": sorted(replicated(generator))}


@pytest.mark.dist
def test_state_and_wire_bytes_are_those_of_a_run(tmp_path, run_ranks):
    data = write_dataset(tmp_path / "data")
    sizes = plan.sizes_of(tiny_wan(None))
    first, second = run_ranks(_count, 2, str(data), str(tmp_path / "run"))
    gradients = 4 * (sizes.sharded // 2 + sizes.whole)
    assert first["held"] + gradients == second["held"] + gradients == plan.state_bytes(sizes, 2)
    assert first["bytes"]["allgather"] // 2 == plan.gather_bytes(sizes, 2)
    norm = 4
    scattered, reduced = first["bytes"]["reduce_scatter"] // 2, first["bytes"]["allreduce"] - norm
    assert scattered + reduced == plan.reduce_bytes(sizes, 2, 2)
    assert first["seen"] == {
        "to_q": ("torch.bfloat16", 24 * 24),
        "table": ("torch.float32", 6 * 24),
        "norm2": ("torch.float32", 24),
        "time": ("torch.float32", 24),
    }


def test_hybrid_sharding_sends_shards_between_replicas():
    sizes = plan.Sizes(8, 16, 4, (1000, 1000), 496, 0, 0)
    assert plan.reduce_bytes(sizes, 8, 32) == 4 * 2496 * 7 // 8 + 2 * 4 * 312 * 3 // 4
    assert plan.exchange_bytes(sizes, 96, 4, passes=1) == 2 * 2 * 5 * (96 // 4) * 8 * 3 // 4
    assert plan.exchange_bytes(sizes, 96, 1) == plan.gather_bytes(sizes, 1) == 0


@pytest.mark.parametrize("mode", ["bidirectional", "teacher_forcing"])
def test_flops_are_those_that_torch_counts(mode):
    """Every linear layer against torch's own count of what ran; attention by the pairs of the mask, counted by hand."""
    model, batch = tiny_wan(2), tiny_batch(2, 4)
    given = {key: batch[key] for key in ("viewmats", "Ks")} | batch["condition"]
    if mode == "teacher_forcing":
        given["clean_latents"] = batch["latents"]
    call = (batch["latents"], torch.full((2, 4), 500.0))
    with use_backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*call, **given)
    counted = counter.get_flop_counts()["Global"]
    linear = counted[torch.ops.aten.addmm] + counted.get(torch.ops.aten.mm, 0)
    halves = 2 if mode == "teacher_forcing" else 1
    pairs = 16 * 16 if halves == 1 else 8 * 8 + 8 * 16 + 8 * 8 + 8 * 16  # clean blocks, then noisy ones
    samples, layers, paths, text, C = 2, 2, 2, 3, 24
    attention = samples * layers * 4 * C * (paths * pairs + halves * 16 * text)
    assert flops.forward_flops(model, *call, **given) == linear + attention


@pytest.mark.parametrize("mode", ["bidirectional", "teacher_forcing"])
def test_flops_of_hunyuan_video_are_those_that_torch_counts(mode):
    """Without padding; attention by hand: pairs of both paths, of the text, and of the refiner."""
    model = tiny(block_frames=2)
    latents, clean, cameras = video(2, 4)
    states = {"encoder_hidden_states": torch.randn(2, 7, 12), "encoder_hidden_states_2": torch.randn(2, 3, 10)}
    given = states | {"image_embeds": torch.randn(2, 2, 8)} | cameras
    if mode == "teacher_forcing":
        given["clean_latents"] = clean
    call = (latents, torch.full((2, 4), 500.0))
    with use_backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*call, **given)
    counted = counter.get_flop_counts()["Global"]
    linear = counted[torch.ops.aten.addmm] + counted.get(torch.ops.aten.mm, 0)
    L, T, C = 4 * 3 * 4, 7 + 3 + 2, model.transformer.transformer_blocks[0].attn.to_q.out_features
    layers, refiners = len(model.transformer.transformer_blocks), 1
    half = L // 2
    pairs = L * L if mode == "bidirectional" else 2 * (half * half + half * L)
    queries = L if mode == "bidirectional" else 2 * L
    text = T * (T + L if mode == "bidirectional" else T)
    attention = 4 * C * (layers * 2 * (pairs + queries * T) + (layers - 1) * text + refiners * 7 * 7)
    assert flops.forward_flops(model, *call, **given) == linear + 2 * attention


@pytest.mark.parametrize("name", ["wan", "hunyuan_video15"])
def test_flops_of_a_rerun_for_keys_are_those_that_torch_counts(name):
    """The second chunk of 2 frames: linear layers against torch's count; attention in one layer of two, text included."""
    if name == "wan":
        model, batch = tiny_wan(2), tiny_batch(2, 4)
        latents, given = batch["latents"], batch["condition"]
        frames, (S, T, C) = {key: batch[key] for key in ("viewmats", "Ks")}, (4, 3, 24)
        attention = 4 * C * (2 * 2 * S * 4 * S + 2 * S * T)
    else:
        model, (latents, _, frames) = tiny(block_frames=2), video(2, 4)
        given, (S, T, C) = {"encoder_hidden_states": torch.randn(2, 7, 12)}, (12, 7, 32)
        attention = 4 * C * 2 * 2 * S * (4 * S + T)
    t, cache = torch.zeros(2), model.new_cache(2, *latents.shape[3:])
    with use_backend("reference"), torch.no_grad():
        model(latents[:, :2], t, **given, **{k: v[:, :2] for k, v in frames.items()}, cache=cache)
        call = given | {k: v[:, 2:] for k, v in frames.items()} | {"cache": cache, "start_frame": 2, "keys_only": True}
        expected = flops.forward_flops(model, latents[:, 2:], t, **call)
        with FlopCounterMode(display=False) as counter:
            model(latents[:, 2:], t, **call)
    counted = counter.get_flop_counts()["Global"]
    assert expected == counted[torch.ops.aten.addmm] + counted.get(torch.ops.aten.mm, 0) + 2 * attention
