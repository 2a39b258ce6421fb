"""The stages of generation one by one, and known first frames: encoded, remembered, given back and continued."""

import pytest
import torch
from test_pipelines import SETTINGS, make_backbone

from dit_ops.conditions.linear import LinearCondition, PatchCodec
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import few_step, stages
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.request import State, validate

POSE = "w*2,l*2,k*4"  # nine latent frames
PROMPTS = ["a red room", "a green room with a box"]


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    """A codec that loses nothing of a latent: pixels stay inside of [−1, 1]."""
    basis = torch.linalg.qr(torch.randn(192, 16, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    return LinearCondition(PatchCodec(torch.zeros(192), basis, 0.05))


@pytest.fixture(scope="module")
def causal():
    return make_backbone()


def request(
    backbone, condition, *, prompts=PROMPTS, pose=POSE, seed=0, frames=None, image=None, video=None, **options
) -> State:
    return validate(backbone, condition, prompts, pose, seed, frames, SETTINGS.override(options), image, video)


def test_text_of_every_guidance_pass(causal, condition):
    text = condition.encode_text(PROMPTS)["encoder_hidden_states"]
    negative = condition.encode_text(["a box"])["encoder_hidden_states"].expand(2, -1, -1)
    expected = {
        (1.0, False): [text],
        (2.0, False): [text, negative],
        (2.0, True): [torch.cat([text, negative])],
    }
    for (guidance, batched), passes in expected.items():
        state = request(causal, condition, guidance=guidance, batched_guidance=batched, negative_prompt="a box")
        stages.encode_text(state, causal, condition)
        assert all(list(given) == ["encoder_hidden_states"] for given in state.conditions)
        for given, want in zip(state.conditions, passes, strict=True):
            assert torch.equal(given["encoder_hidden_states"], want)


@pytest.mark.parametrize("batched", [False, True])
def test_an_image_is_the_same_in_every_pass(batched, causal, condition):
    state = request(causal, condition, guidance=2.0, batched_guidance=batched)
    stages.encode_text(state, causal, condition)
    stages.encode_image(state, causal, condition)
    assert all("condition_latents" not in given for given in state.conditions)
    state.image = torch.rand(2, 3, 32, 48) - 0.5
    stages.encode_image(state, causal, condition)
    known = condition.encode_image(state.image, 9)["condition_latents"]
    for given in state.conditions:
        assert torch.equal(given["condition_latents"], torch.cat([known, known]) if batched else known)


def test_known_frames_are_encoded_once_for_all_prompts(causal, condition):
    state = request(causal, condition, video=torch.rand(3, 3, 32, 48) - 0.5)
    stages.encode_video(state, causal, condition)
    assert state.video.shape[0] == 1 and state.known.shape == (2, 3, 16, 4, 6)
    assert torch.equal(state.known, condition.encode_to_latent(state.video).expand(2, -1, -1, -1, -1))
    plain = request(causal, condition)
    stages.encode_video(plain, causal, condition)
    assert plain.known is None


def test_timesteps(causal, condition):
    state = request(causal, condition, num_steps=4, shift=3.0)
    stages.choose_timesteps(state, causal, condition)
    assert state.timesteps == [1000 * s for s in FlowSchedule(3.0).sampling(4).tolist()[:-1]]
    few_step.choose_few_timesteps(state, causal, condition)
    assert state.timesteps == FlowSchedule(3.0).few_step([1000, 500]).tolist()
    state = request(causal, condition, guidance=2.0)
    with pytest.raises(ValueError, match="guidance must be 1 in a few-step model"):
        few_step.choose_few_timesteps(state, causal, condition)


def test_noise_is_a_function_of_seed_frame_and_step(causal, condition):
    state = request(causal, condition, seed=[3, 8])
    noise = stages.initial_noise(state, 2, 5)
    assert noise.shape == (2, 3, 16, 4, 6)
    for b, seed in enumerate((3, 8)):
        for i, frame in enumerate((2, 3, 4)):
            assert torch.equal(noise[b, i], Draws(seed).at(frame).normal("noise", (16, 4, 6)))
    assert torch.equal(noise, torch.cat([stages.initial_noise(state, 2, 3), stages.initial_noise(state, 3, 5)], 1))
    steps = [stages.renoise_noise(state, 4, 5, step) for step in (0, 1)]
    assert torch.equal(steps[1][1, 0], Draws(8).at(4, 1).normal("renoise", (16, 4, 6)))
    assert not torch.equal(*steps) and not torch.equal(steps[0], noise[:, 2:])


@pytest.mark.parametrize(
    ("known", "blocks"),
    [
        (0, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]),
        (1, [(0, 1), (1, 3), (3, 5), (5, 7), (7, 9)]),
        (3, [(0, 2), (2, 3), (3, 5), (5, 7), (7, 9)]),
        (4, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]),
    ],
)
def test_blocks_and_their_steps(known, blocks, causal, condition):
    video = torch.rand(known, 3, 32, 48) - 0.5 if known else None
    seen: list[tuple[int, int]] = []
    given = {"pose": POSE, "video": video, "on_step": lambda *step: seen.append(step)}
    for cls, steps in ((FewStepPipeline, 2), (AutoregressivePipeline, 3)):
        seen.clear()
        chunks = list(cls(causal, condition, SETTINGS).stream("a room", **given))
        assert [c.shape[1] for c in chunks] == [last - first for first, last in blocks]
        made = sum(first >= known for first, _ in blocks)
        assert seen == [(i + 1, made * steps + len(blocks) - 1) for i in range(made * steps + len(blocks) - 1)]
    pieces = request(causal, condition, prompts="a room", pose=iter(["w*2", "l*2,k*4"]), video=video)
    stages.encode_video(pieces, causal, condition)
    assert list(stages.causal_blocks(causal, pieces)) == blocks
    assert stages.count_steps(causal, pieces) is None


@pytest.mark.parametrize("batched", [False, True])
def test_every_pass_has_a_cache_of_its_own(batched, causal, condition):
    window = {"window_frames": 4, "sink_frames": 1, "compact_cache": True}
    for options in ({}, window):
        state = request(causal, condition, guidance=2.0, batched_guidance=batched, **options)
        stages.encode_text(state, causal, condition)
        passes = stages.causal_passes(causal, state)
        assert [of_pass.rows for of_pass in passes] == ([4] if batched else [2, 2])
        assert len({id(of_pass.cache) for of_pass in passes}) == len(passes)
        for cache in (of_pass.cache for of_pass in passes):
            assert (cache.window_frames, cache.sink_frames, cache.rotated) == ((4, 1, False) if options else (None, 0, True))


def test_only_a_stream_without_a_known_end_is_decoded_with_a_bounded_past(causal, condition, monkeypatch):
    seen = []
    decode = LinearCondition.decode_stream
    monkeypatch.setattr(
        LinearCondition, "decode_stream", lambda self, chunks, *, context: seen.append(context) or decode(self, chunks)
    )
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    for overlap in (False, True):
        for window in (None, 4):
            given = {"window_frames": window, "overlap": overlap}
            list(pipeline.stream("a room", pose="w*4", **given))
            list(pipeline.stream("a room", pose=iter(["w*4"]), **given))
            list(pipeline.stream("a room", pose=iter(["w*4"]), frames=4, **given))
    assert seen == [None, None, None, None, 4, None] * 2


PIPELINES = [
    (FewStepPipeline, {}),
    (AutoregressivePipeline, {"guidance": 2.0}),
    (AutoregressivePipeline, {"guidance": 2.0, "batched_guidance": True, "solver": "unipc"}),
]


@pytest.mark.parametrize("window", [{}, {"window_frames": 4, "sink_frames": 1}], ids=["whole past", "window"])
@pytest.mark.parametrize(("cls", "options"), PIPELINES)
def test_the_first_frames_of_a_video_are_continued_as_it_went_on(cls, options, window, causal, condition):
    """Known latents of a video's own first blocks: the blocks behind them are the video's, bit for bit."""
    pipeline = cls(causal, condition, SETTINGS.override(options | window))

    def latents(known):
        state = request(causal, condition, seed=5, **options, **window)
        for stage in pipeline.stages:
            stage(state, causal, condition)
        state.known = known
        with torch.inference_mode():
            return torch.cat(list(pipeline.denoise(state)), 1)

    whole = latents(None)
    assert torch.equal(latents(whole[:, :4]), whole)
    assert not torch.equal(latents(whole[:, :4] + 0.1)[:, 4:], whole[:, 4:])
    pixels = condition.decode_to_pixel(whole)
    assert pixels.abs().max() < 1
    again = pipeline(PROMPTS, pose=POSE, seed=5, video=pixels[:, :4])
    torch.testing.assert_close(again, pixels, atol=2e-4, rtol=0)


def test_an_image_is_a_video_of_one_frame_for_a_model_without_channels(causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    image = torch.rand(2, 3, 32, 48) - 0.5
    of_image = pipeline(PROMPTS, pose=POSE, image=image)
    assert torch.equal(of_image, pipeline(PROMPTS, pose=POSE, video=image[:, None]))
    assert torch.equal(of_image[:, :1], condition.decode_to_pixel(condition.encode_to_latent(image[:, None])))
    assert (of_image - pipeline(PROMPTS, pose=POSE)).abs().max() > 0.01
    pieces = pipeline(PROMPTS, pose=iter(["w*2", "l*2,k*3", "k*1"]), image=image)
    assert torch.equal(pieces, of_image)
    one = pipeline(PROMPTS, pose=POSE, image=image[0])
    torch.testing.assert_close(one[:1], of_image[:1], atol=2e-5, rtol=0)


def test_poses_may_end_among_the_known_frames(causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    video = torch.rand(5, 3, 32, 48) - 0.5
    chunks = list(pipeline.stream("a room", pose=iter(["w*1", "l*1"]), video=video))
    assert [c.shape[1] for c in chunks] == [2, 1]
    torch.testing.assert_close(torch.cat(chunks, 1), pipeline("a room", pose="w*1,l*4", video=video[:4])[:, :3])


@pytest.mark.parametrize(
    ("cls", "call", "message"),
    [
        (FewStepPipeline, {"video": torch.zeros(3, 8, 8)}, r"video must be \[Fp, 3, 32, 48\] .* got \[3, 8, 8\]"),
        (FewStepPipeline, {"video": torch.zeros(2, 4, 3, 32, 48)}, r"one of 1 prompts each, got \[2, 4, 3, 32, 48\]"),
        (FewStepPipeline, {"video": torch.zeros(0, 3, 32, 48)}, r"got \[0, 3, 32, 48\]"),
        (FewStepPipeline, {"video": torch.zeros(9, 3, 32, 48)}, "more than the 9 latent frames of the video, got 9"),
        (FewStepPipeline, {"video": torch.zeros(2, 3, 32, 48), "image": torch.zeros(3, 32, 48)}, "exclude each other"),
        (FewStepPipeline, {"image": torch.zeros(3, 32, 40)}, r"image must be \[3, 32, 48\] .* got \[3, 32, 40\]"),
        (BidirectionalPipeline, {"video": torch.zeros(2, 3, 32, 48)}, "makes all frames at once and continues no video"),
        (BidirectionalPipeline, {"image": torch.zeros(3, 32, 48)}, "no channels for a known frame and takes no image"),
    ],
)
def test_errors_name_the_argument(cls, call, message, causal, condition):
    with pytest.raises(ValueError, match=message):
        cls(causal, condition, SETTINGS)("a room", pose=POSE, **call)
