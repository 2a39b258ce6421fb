"""Recorded steps on a GPU: the bits of launches, also beside the decoder; no wait, no allocation, few launches."""

import gc

import pytest
import torch
from test_graphs import POSE, PROMPT, SETTINGS
from test_pipelines import randomise
from toy_tape import recorded

from dit_ops.backbones.wan import WanBackbone
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.request import validate

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def large() -> FewStepPipeline:
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 512,
        "num_layers": 3,
    }
    config = {"patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16, **sizes}
    backbone = WanBackbone.from_config(config, camera=True, block_frames=2)
    randomise(backbone, std=0.05)
    backbone = backbone.to("cuda", torch.bfloat16).eval().requires_grad_(False)
    condition = LinearCondition.fit(torch.rand(2, 3, 3, 128, 192) * 2 - 1).to("cuda")
    settings = SETTINGS.override({"height": 128, "width": 192, "window_frames": 4, "sink_frames": 1})
    return FewStepPipeline(backbone, condition, settings)


@pytest.mark.parametrize("compact", [False, True], ids=["rotated", "compact"])
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"guidance": 2.0, "batched_guidance": True, "solver": "unipc"}])
def test_graphs_give_the_bits_of_launches(options, compact, large, monkeypatch):
    cls = AutoregressivePipeline if options else FewStepPipeline
    pipeline = cls(large.backbone, large.condition, large.settings.override(options | {"compact_cache": compact}))
    video = torch.rand(3, 3, 128, 192) * 2 - 1
    with recorded(monkeypatch, None):
        launched = pipeline(PROMPT, pose=POSE, seed=3, video=video, overlap=False)
    assert launched.isfinite().all() and launched.std() > 0.01
    graphs = []
    capture = torch.cuda.CUDAGraph.capture_begin
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda self, *a, **k: graphs.append(self) or capture(self, *a, **k)
    )
    for overlap in (False, True):
        chunks = []
        for chunk in pipeline.stream(PROMPT, pose=POSE, seed=3, video=video, overlap=overlap):
            torch.cuda.synchronize()  # as a caller does who takes the time
            chunks.append(chunk)
        assert torch.equal(torch.cat(chunks, 1), launched), f"overlap {overlap}"
    assert len(graphs) >= 2 * 6 * (2 if options == {"guidance": 2.0} else 1)


def steady(pipeline, chunks: int):
    """The latents of a stream whose graphs are all recorded."""
    state = validate(pipeline.backbone, pipeline.condition, PROMPT, iter(["w*1", "l*1"] * 100), 0, None, pipeline.settings)
    for stage in pipeline.stages:
        stage(state, pipeline.backbone, pipeline.condition)
    stream = pipeline.denoise(state)
    for _ in range(chunks):
        next(stream)
    torch.cuda.synchronize()
    return stream


@pytest.mark.parametrize("compact", [False, True], ids=["rotated", "compact"])
def test_a_steady_step_waits_for_nothing_and_allocates_nothing(compact, large):
    pipeline = FewStepPipeline(large.backbone, large.condition, large.settings.override({"compact_cache": compact}))
    with torch.inference_mode():
        stream = steady(pipeline, 20)
        before = torch.cuda.memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = torch.cuda.memory_stats()
    for name in ("num_device_alloc", "num_device_free", "allocated_bytes.all.current", "allocation.all.current"):
        assert after[name] == before[name], name


def test_a_steady_step_is_one_graph_and_few_launches(large):
    with torch.inference_mode():
        stream = steady(large, 20)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as trace:
            next(stream)
            torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    steps = len(SETTINGS.denoising_steps) + 1
    assert sum(name.startswith("cudaGraphLaunch") for name in names) == steps
    launches = sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)
    assert launches <= 25 * steps  # inputs, the sampler, and once per chunk the cameras and the tables


def test_two_videos_that_are_made_in_turns_have_the_bits_of_one_alone(large):
    alone = [large(PROMPT, pose=POSE, seed=seed, overlap=True) for seed in (3, 4)]
    in_turns = zip(*(large.stream(PROMPT, pose=POSE, seed=seed, overlap=seed == 3) for seed in (3, 4)), strict=True)
    for chunks, video in zip(zip(*in_turns, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(chunks, 1), video)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_ended_leaves_no_memory_behind(overlap, large):
    sizes = []
    for _ in range(3):
        list(large.stream(PROMPT, pose=iter(["w*1"] * 40), overlap=overlap))
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert sizes[1] == sizes[2]
