"""Poses that are decided while a video streams: the same bits as all at once, read when they are needed, in constant memory."""

import itertools

import pytest
import torch
from live_tensors import live_tensors

from dit_ops.backbones.wan import WanBackbone
from dit_ops.camera import DEFAULT_INTRINSICS, intrinsics_matrix, parse_trajectory
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.pipelines.cameras import CameraPath
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings

SETTINGS = Settings(num_steps=2, height=32, width=48, denoising_steps=(1000, 500), fps=8, frames=5)
POSE = "w*3,w+l*2,stay*1,k*2"  # nine latent frames
CUTS = {
    "one piece": ["w*3,w+l*2,stay*1,k*2"],
    "steps": ["w*1"] * 3 + ["w+l*1"] * 2 + ["stay*1"] + ["k*1"] * 2,
    "blocks": ["w*1", "w*2", "w+l*2", "stay*1,k*1", "k*1"],
    "uneven": ["w*2", "w*1,w+l*1", "w*0", "w+l*1,stay*1,k*2"],
}


@pytest.fixture(scope="module")
def causal() -> WanBackbone:
    """The sizes of the rooms model, with weights for which attention, camera and text matter."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 64, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
    config = {"patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16, **sizes}
    backbone = WanBackbone.from_config(config, camera=True, block_frames=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in backbone.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1) * 0.5)
    return backbone.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    return LinearCondition.fit(torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)


PIPELINES = [(FewStepPipeline, {}), (AutoregressivePipeline, {"guidance": 2.0})]


@pytest.mark.parametrize("window", [{}, {"window_frames": 4, "sink_frames": 1}], ids=["whole past", "window"])
@pytest.mark.parametrize(("cls", "options"), PIPELINES)
def test_every_cut_gives_the_bits_of_the_whole_pose_string(cls, options, window, causal, condition):
    pipeline = cls(causal, condition, SETTINGS)
    options = options | window
    whole = pipeline("a red room", pose=POSE, seed=4, **options)
    for name, pieces in CUTS.items():
        assert torch.equal(pipeline("a red room", pose=iter(pieces), seed=4, **options), whole), name
    shorter = pipeline("a red room", pose=iter(CUTS["steps"]), seed=4, frames=6, **options)
    assert torch.equal(shorter, whole[:, :6])


@pytest.mark.parametrize(("cls", "options"), PIPELINES)
def test_every_prompt_has_its_own_poses(cls, options, causal, condition):
    pipeline = cls(causal, condition, SETTINGS)
    prompts = ["a red room", "a green room with a box"]
    whole = pipeline(prompts, pose=[POSE, "s*8"], **options)
    pieces = iter([("w*3", "s*3"), ("w+l*2,stay*1", "s*1,s*2"), ["k*2", "s*2"]])
    assert torch.equal(pipeline(prompts, pose=pieces, **options), whole)
    assert torch.equal(pipeline(prompts, pose=iter([POSE]), **options), pipeline(prompts, pose=POSE, **options))


def test_poses_are_asked_for_when_their_block_is(causal, condition):
    asked, seen = [], []

    def steer():
        for key in ["w", "w", "w", "l"]:
            asked.append(len(seen))
            yield f"{key}*1"

    for chunk in FewStepPipeline(causal, condition, SETTINGS).stream("a red room", pose=steer()):
        seen.append(chunk)
    assert [c.shape[1] for c in seen] == [2, 2, 1]
    assert asked == [0, 1, 1, 2]  # chunks seen at each step: the identity and one, two, and one


def test_the_rerun_waits_for_the_next_block_and_the_last_is_left_out(causal, condition):
    steps = []
    stream = FewStepPipeline(causal, condition, SETTINGS).stream(
        "a red room", pose=iter(["w*1", "w*1"]), on_step=lambda done, total: steps.append((done, total))
    )
    next(stream)
    assert steps == [(1, 0), (2, 0)]  # of the two denoising steps; nobody knows how many will follow
    list(stream)
    assert len(steps) == 2 + 1 + 2


def test_memory_is_flat_over_200_chunks(causal, condition):
    keys = itertools.cycle(["w*1", "l*1", "stay*1", "k+d*1", "s*1"])
    pipeline = FewStepPipeline(causal, condition, SETTINGS.override({"denoising_steps": (1000,)}))
    stream = pipeline.stream("a red room", pose=keys, window_frames=4, sink_frames=1)
    for _ in range(5):
        next(stream)
    start = live_tensors()
    for chunk in itertools.islice(stream, 200):
        assert chunk.isfinite().all()
    del chunk
    assert live_tensors() == start
    stream.close()
    assert live_tensors()[1] < start[1]


def test_a_path_forgets_the_cameras_of_old_frames():
    steps = ["w*1", "l*1", "k*2", "a+j*1"]
    viewmats = parse_trajectory(",".join(steps))[None]
    whole = CameraPath(viewmats, intrinsics_matrix(*DEFAULT_INTRINSICS).expand(1, 6, 3, 3), torch.device("cpu"))
    path = CameraPath.from_pieces(iter(steps), 1, DEFAULT_INTRINSICS, torch.device("cpu"))
    assert path.ready(3) == 3 and path.frames == 3
    assert torch.equal(path.of(2, 3)[0], viewmats[:, 2:3]) and path.viewmats.shape[1] == 1
    assert path.ready(4) == 4 and path.frames == 5  # a piece is read as a whole
    for a, b in zip(path.of(3, 5), whole.of(3, 5), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(path.actions_of(3, 5), whole.actions_of(3, 5)) and whole.actions[0, 0] == 0
    assert path.ready(100) == path.frames == 6
    assert torch.equal(path.of(5, 6)[0], viewmats[:, 5:]) and path.ready(7) == 6
    assert torch.equal(path.actions_of(5, 6), whole.actions_of(5, 6))


@pytest.mark.parametrize(
    ("cls", "call", "message"),
    [
        (FewStepPipeline, {"pose": iter(["x*1"])}, "segment 1"),
        (FewStepPipeline, {"pose": iter([["w*1", "w*1"]])}, r"one per prompt \(1\), got 2"),
        (FewStepPipeline, {"pose": iter([["w*1", "w*2"]]), "prompts": ["a", "b"]}, "equal counts, got 'w\\*1', 'w\\*2'"),
        (FewStepPipeline, {"pose": iter(["w*1"]), "frames": 0}, "frames must be at least 1, got 0"),
        (BidirectionalPipeline, {"pose": iter(["w*1"])}, "makes all frames at once"),
        (BidirectionalPipeline, {"pose": iter(["w*1"]), "frames": 2}, "makes all frames at once"),
    ],
)
def test_errors_name_the_argument(cls, call, message, causal, condition):
    with pytest.raises(ValueError, match=message):
        cls(causal, condition, SETTINGS)(**({"prompts": "a red room"} | call))
