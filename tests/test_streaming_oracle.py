"""Random streams against an oracle that has no cache (tests/toy_oracle.py): steps, requests, rollouts, and trajectories."""

import random
from collections.abc import Iterator
from types import SimpleNamespace as Case
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from toy_oracle import KEYS, NAMES, Blocks, H, W, agree, apart, cut, flow_of, model_of, pose_string, random_inputs, spoiled
from toy_tape import Tapes, recorded

from dit_ops.actions import action_labels
from dit_ops.camera import DEFAULT_INTRINSICS, intrinsics_matrix, parse_trajectory
from dit_ops.conditions.arguments import image_condition
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings
from dit_ops.training.ode_sampling import ODESamplingConfig, sample_trajectories
from dit_ops.training.rollout import inference_with_trajectory

PROMPTS = ["a red room", "the quick brown fox", "x"]
STEPS = (1000, 700, 300)


def case_of(seed: int) -> tuple[Case, random.Random]:
    """Every model in turn, with rings that a block fills or wraps around, and without a window."""
    r = random.Random(seed)
    case = Case(seed=seed, name=NAMES[seed % len(NAMES)], B=r.randint(1, 3), block=r.randint(1, 3), window=None, sink=0)
    if r.random() < 0.8:
        case.sink = r.randint(0, 3)
        case.window = case.sink + r.randint(case.block, 5)
    return case, r


@pytest.mark.parametrize("seed", range(30))
def test_a_step_is_attention_over_the_clean_frames_that_it_sees(seed):
    """Blocks of any length, run noisy, with gradient, and clean; also in a cache that another video was in."""
    case, r = case_of(seed)
    blocks = [(0, r.randint(1, case.block))]
    while blocks[-1][1] < 10:
        first = blocks[-1][1]
        most = 4 if case.window is None else case.window - case.sink + max(0, case.sink - first)
        blocks.append((first, first + r.randint(1, most)))
    model = model_of(case.name)
    rotated, room = r.random() < 0.5, {"text_tokens": 14} if "hunyuan" in case.name and r.random() < 0.5 else {}
    cache = model.new_cache(case.B, H, W, window_frames=case.window, sink_frames=case.sink, rotated=rotated, **room)
    with spoiled(model):
        for video in range(r.randint(1, 2)):
            cache.reset()
            noisy, clean, whole, frames = random_inputs(case.name, case.B, blocks[-1][1], seed + 100 * video)
            for i, (first, last) in enumerate(blocks):
                args = whole | cut(frames, first, last) | {"cache": cache, "start_frame": first}
                run = lambda x, t, **more: model(x, torch.full((case.B,), t).double(), **args, **more)  # noqa: B023
                x = noisy[:, first:last]
                expected = flow_of(model, x, 700.0, blocks[: i + 1], clean, whole | cut(frames, 0, last), case)
                with torch.no_grad():
                    agree(run(x, 700.0), expected)
                if r.random() < 0.5:
                    agree(run(x.clone().requires_grad_(), 700.0), expected)
                args.pop("action", None)
                with torch.no_grad():
                    run(clean[:, first:last], 0.0, keys_only=r.random() < 0.7)


# whole requests


class Plain:
    """A condition side whose pixels are latents: text by prompt, of different lengths where the model has a mask."""

    spatial_stride = temporal_stride = 1

    def __init__(self, model: Any) -> None:
        self.text, self.masked, self.latent_channels = None, hasattr(model, "action"), model.latent_channels
        self.text_dim = 12 if self.masked else model.config.text_dim

    def latent_frames(self, pixel_frames: int) -> int:
        return pixel_frames

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        states = [Draws(0).normal(prompt, (7, self.text_dim)) for prompt in prompts]
        mask = torch.stack([torch.arange(7) <= len(prompt) % 7 for prompt in prompts])
        return {"encoder_hidden_states": torch.stack(states)} | ({"encoder_attention_mask": mask} if self.masked else {})

    def encode_image(self, image: Tensor, frames: int) -> dict[str, Tensor]:
        return {"condition_latents": image_condition(self.encode_to_latent(image[:, None]), frames)}

    def encode_to_latent(self, pixel: Tensor) -> Tensor:
        mixed = (pixel.roll(i, 2) + i * pixel for i in range(-(-self.latent_channels // 3)))
        return torch.cat(list(mixed), 2)[:, :, : self.latent_channels].float()

    def decode_stream(self, chunks: Any, *, context: int | None = None) -> Iterator[Tensor]:
        yield from (chunk.clone() for chunk in chunks)


def request_of(seed: int) -> Case:
    case, r = case_of(seed)
    case.frames, case.known, case.steps = r.randint(4, 12), r.choice([0, 0, 1, 2, 3]), STEPS[: r.randint(1, 3)]
    case.few, case.batched, case.compact, case.tape, case.overlap, case.image = (r.random() < 0.5 for _ in range(6))
    case.guidance = 1.0 if case.few else r.choice([1.0, 2.5])
    case.keys = [r.choices(KEYS, k=case.frames - 1) for _ in range(case.B)] if "camera" in case.name else None
    case.cuts = sorted(r.sample(range(case.frames), 3))
    case.change = r.randint(1, case.frames - 1)
    return case


def blocks_of(case: Case) -> Blocks:
    """The known frames in blocks, then the others."""
    starts = [*range(0, case.known, case.block), *range(case.known, case.frames, case.block)]
    return [(f, min(f + case.block, case.known if f < case.known else case.frames)) for f in starts]


def expected_latents(case: Case, video: Tensor | None, image: Tensor | None) -> Tensor:
    """The whole request with the oracle's flows and the samplers' formulas."""
    model, seeds = model_of(case.name), [case.seed + b for b in range(case.B)]
    codec, frames = Plain(model), {}
    if case.keys is not None:
        viewmats = torch.stack([parse_trajectory(pose_string(keys)) for keys in case.keys])
        frames = {"viewmats": viewmats, "Ks": intrinsics_matrix(*DEFAULT_INTRINSICS).expand(case.B, case.frames, 3, 3)}
        frames |= {"action": action_labels(viewmats)} if "action" in case.name else {}
    if image is not None:
        frames |= {name: value.double() for name, value in codec.encode_image(image, case.frames).items()}
    prompts = [PROMPTS[: case.B], *([[""] * case.B] if case.guidance != 1 else [])]
    texts = [{k: v if v.dtype == torch.bool else v.double() for k, v in codec.encode_text(p).items()} for p in prompts]
    noise = lambda name, *counters: torch.stack(
        [torch.stack([Draws(s).at(*c).normal(name, (codec.latent_channels, H, W)) for c in counters]) for s in seeds]
    )
    clean = noise("noise", *[(f,) for f in range(case.frames)])
    if video is not None:
        clean[:, : case.known] = codec.encode_to_latent(video)
    schedule, blocks = FlowSchedule(3.0), blocks_of(case)
    sigmas = (schedule.few_step(case.steps) / 1000).tolist() if case.few else schedule.sampling(len(case.steps)).tolist()[:-1]
    for i, (first, last) in enumerate(blocks):
        if first < case.known:
            continue
        x = clean[:, first:last]
        for j, (s, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            args = cut(frames, 0, last)
            flow, *uncond = (flow_of(model, x, 1000 * s, blocks[: i + 1], clean, args | text, case) for text in texts)
            if uncond:
                flow = uncond[0] + case.guidance * (flow - uncond[0])
            if case.few:
                fresh = noise("renoise", *[(f, j) for f in range(first, last)]) if after else 0
                x = (1 - after) * (x - s * flow) + after * fresh
            else:
                x = x + (after - s) * flow
        clean[:, first:last] = x
    return clean


@pytest.mark.parametrize("seed", range(30))
def test_a_request_is_that_of_the_oracle_however_it_is_run(seed):
    case = request_of(seed)
    options = {"num_steps": len(case.steps), "denoising_steps": case.steps, "guidance": case.guidance, "shift": 3.0}
    options |= {"block_frames": case.block, "window_frames": case.window, "sink_frames": case.sink, "height": H, "width": W}
    options |= {"compact_cache": case.compact, "batched_guidance": case.batched}
    cls = FewStepPipeline if case.few else AutoregressivePipeline
    models = [model_of(case.name), model_of(case.name, torch.float32)]
    pipelines = {model.dtype: cls(model, Plain(model), Settings(**options)) for model in models}
    pixel = torch.rand(case.B, 1 + case.known, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    video = pixel[:, 1:] if case.known else None
    image = pixel[:, 0] if case.image and case.name not in ("wan", "wan, camera") else None
    if "TI2V" in case.name and image is not None and video is not None:
        video[:, 0] = image  # the same frame is known twice
    prompts, poses = PROMPTS[: case.B], None if case.keys is None else [pose_string(keys) for keys in case.keys]

    def run(dtype: torch.dtype = torch.float32, **changed: Any) -> Iterator[Tensor]:
        request = {"prompts": prompts, "pose": poses, "seed": seed, "video": video, "image": image, "frames": case.frames}
        return pipelines[dtype].stream(**(request | changed))

    whole = lambda chunks: torch.cat(list(chunks), 1)
    draw = Draws.normal
    wide = mock.patch.object(Draws, "normal", lambda *args, **given: draw(*args, **given).double())
    with wide, spoiled(pipelines[torch.float64].backbone):
        exact = whole(run(torch.float64))
        # known frames of TI2V follow from a difference that its backbone takes in fp32
        agree(exact, expected_latents(case, video, image), 1e-6 if "TI2V" in case.name else 1e-9)

    with spoiled(pipelines[torch.float32].backbone):
        launched = whole(run())
        agree(launched, exact, 1e-2)
        with recorded(pytest.MonkeyPatch, Tapes() if case.tape else None):
            other = run(prompts=[p + "!" for p in prompts], pose=poses and poses[::-1], seed=seed + 50)
            chunks = run(pose=poses and pieces(case), overlap=case.overlap)
            beside = whole(chunk for chunk in chunks if next(other, None) is not None)
        assert torch.equal(beside, launched), "beside another request, poses in pieces"

        b = seed % case.B
        sample = {"prompts": prompts[b], "pose": poses and poses[b], "seed": seed + b}
        sample |= {"video": None if video is None else video[b], "image": None if image is None else image[b]}
        agree(whole(run(**sample)), launched[b, None], 1e-3)
        assert (whole(run(prompts=[p + "?" for p in prompts])) - launched)[:, -1].abs().max() > 1e-3
        if case.keys is not None:
            turned = [pose_string([*keys[: case.change - 1], "j+dn+d", *keys[case.change :]]) for keys in case.keys]
            difference = (whole(run(pose=turned)) - launched).abs().amax((0, 2, 3, 4))
            start = next(first for first, last in blocks_of(case) if last > case.change)
            assert not difference[:start].any() and difference[max(start, case.known) :].any()


def pieces(case: Case) -> Iterator[list[str]]:
    """The poses of a request in pieces, empty ones too, and then others that its frames do not reach."""
    at = 0
    for end in [*case.cuts, case.frames - 1]:
        yield [pose_string(keys[at:end]) for keys in case.keys]
        at = end
    yield ["w*9"] * case.B


# training


def training_case(seed: int) -> Case:
    case, r = case_of(seed)
    case.frames, case.known, case.steps = r.randint(3, 8), 0, STEPS[: r.randint(1, 3)]
    case.exit, case.context = r.randrange(len(case.steps)), r.choice(["exit", "last"])
    return case


@pytest.mark.parametrize("seed", range(15))
def test_a_rollout_sees_its_own_clean_blocks(seed):
    """Values are the oracle's; reruns for keys alone give the bits of full ones, in values and in gradients."""
    case = training_case(seed)
    model = model_of(case.name)
    noise, _, whole, frames = random_inputs(case.name, case.B, case.frames, seed)
    condition, cameras = apart(whole | frames)
    draws, weight = Draws(seed), torch.randn_like(noise)

    def rollout() -> tuple[Tensor, ...]:
        options = {"window_frames": case.window, "sink_frames": case.sink, "context": case.context, "exit_step": case.exit}
        pred, *_ = inference_with_trajectory(model, noise, condition, timesteps=case.steps, draws=draws, **options, **cameras)
        parameters = list(model.parameters())
        return pred.detach(), *torch.autograd.grad((pred * weight).sum(), parameters, materialize_grads=True, allow_unused=True)

    forward = type(model).forward
    full = lambda self, *args, keys_only=False, **given: forward(self, *args, **given)
    with mock.patch.object(model, "block_frames", case.block), spoiled(model):
        model.requires_grad_(True)
        got = rollout()
        with mock.patch.object(type(model), "forward", full):
            assert all(map(torch.equal, got, rollout()))
        model.requires_grad_(False)
    clean, expected = torch.zeros_like(noise), []
    for i, (first, last) in enumerate(blocks_of(case)):
        x = noise[:, first:last]
        for j, t in enumerate(case.steps[: case.exit + 1 if case.context == "exit" else None]):
            args = whole | cut(frames, 0, last)
            x0 = x - t / 1000 * flow_of(model, x, float(t), blocks_of(case)[: i + 1], clean, args, case)
            expected += [x0] if j == case.exit else []
            if t != case.steps[-1]:
                s, fresh = case.steps[j + 1] / 1000, draws.at(first, j).normal("renoise", tuple(x.shape), dtype=x.dtype)
                x = (1 - s) * x0 + s * fresh
        clean[:, first:last] = x0
    agree(got[0], torch.cat(expected, 1), 1e-6 if "TI2V" in case.name else 1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_trajectories_of_a_guided_model_see_the_true_past(seed):
    case, guidance = training_case(seed), (2.5, 1.0)[seed // 5]
    case.window, case.sink = None, 0
    model = model_of(case.name)
    noise, clean, whole, frames = random_inputs(case.name, case.B, case.frames, seed)
    condition, cameras = apart(whole | frames)
    negative = {"encoder_hidden_states": torch.randn_like(whole["encoder_hidden_states"][0])}
    config = ODESamplingConfig(num_steps=2, shift=2.0, guidance=guidance, denoising_steps=(1000, 500))
    with mock.patch.object(model, "block_frames", case.block):
        got = sample_trajectories(model, config, noise, clean, condition, negative, **cameras)
    texts = [whole, whole | {name: value.expand_as(whole[name]) for name, value in negative.items()}]
    sigmas, expected = FlowSchedule(2.0).sampling(2).tolist(), torch.empty_like(got)
    expected[:, -1] = clean
    for i, (first, last) in enumerate(blocks_of(case)):
        x = noise[:, first:last]
        for j in range(2):
            expected[:, j, first:last] = x
            t, blocks, args = 1000 * sigmas[j], blocks_of(case)[: i + 1], cut(frames, 0, last)
            flow, uncond = (flow_of(model, x, t, blocks, clean, args | text, case) for text in texts)
            x = x + (sigmas[j + 1] - sigmas[j]) * (uncond + guidance * (flow - uncond))
        expected[:, -2, first:last] = x
    agree(got, expected, 1e-6)  # timesteps in fp64
