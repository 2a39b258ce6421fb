"""What a call of a pipeline may not be given: one sentence that names the argument, from Python as from the command line."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from toy_rooms import random_rooms

EYE, K = torch.eye(4).expand(3, 4, 4), torch.eye(3).expand(3, 3, 3)


@pytest.fixture(scope="module")
def pipeline():
    return random_rooms()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (3, {}, "prompts must be a string, or one per video, got 3"),
        (None, {}, "prompts must be a string, or one per video, got None"),
        ({"a": 1}, {}, "prompts must be a string"),
        ([], {}, "prompts must hold at least one prompt"),
        ("a", {"seed": "12"}, "seed must be a whole number, or one per prompt, got '12'"),
        ("a", {"seed": 1.5}, "seed must be a whole number, or one per prompt, got 1.5"),
        ("a", {"seed": [1, 2]}, r"seed must be one number or one per prompt \(1\), got 2"),
        ("a", {"image": "start.png"}, "image must be a tensor .*read_image reads a file.*got str"),
        ("a", {"video": "known.mp4"}, "video must be a tensor .*read_video reads a file.*got str"),
        ("a", {"pose": 3}, "pose must be a pose string, .* got int"),
        ("a", {"pose": {"w": 3}}, "pose must be a pose string, .* got dict"),
        ("a", {"pose": EYE}, "pose must be a pose string, .* got Tensor"),
        ("a", {"pose": (EYE, K, K)}, "pose must be a pose string, .* got Tensor, Tensor, Tensor"),
        ("a", {"pose": (2 * EYE, K)}, "pose: the camera of frame 0 must be a rotation"),
        ("a", {"pose": (EYE, -K)}, "pose: the camera of frame 0 .*positive focal lengths"),
        ("a", {"pose": (EYE * torch.tensor([1, 1, float("nan")])[:, None, None], K)}, "pose: the camera of frame 2"),
        ("a", {"pose": (EYE, K * torch.tensor([1, float("inf"), 1])[:, None, None])}, "pose: the camera of frame 1"),
        (
            "a",
            {"pose": "w*2", "video": torch.zeros(3, 3, 64, 64)},
            "so must the pose: more than the 3 latent .* got 3",
        ),
    ],
)
def test_a_mistake_is_one_sentence(pipeline, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(prompts, **({"pose": "w*2"} | options))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("window_frames", "8", "a whole number or None"),
        ("block_frames", 2.0, "a whole number or None"),
        ("num_steps", "4", "a whole number"),
        ("height", 64.0, "a whole number"),
    ],
)
def test_a_size_is_a_whole_number(pipeline, name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} must be {wanted}, got {value!r}"):
        pipeline.stream("a red room", pose="w*2", **{name: value})


def test_a_mistake_is_told_before_the_first_chunk_is_asked_for(pipeline):
    with pytest.raises(ValueError, match="segment 1"):
        pipeline.stream("a red room", pose="x*2")


def test_what_is_meant_is_taken(pipeline):
    """Numpy's integers, any iterable of prompts and seeds, poses with rounding errors."""

    def prompts() -> Iterator[str]:
        yield from ("a red room", "a blue room")

    expected = pipeline(["a red room", "a blue room"], pose="w*2", seed=[3, 4])
    for given, seed in ((prompts(), np.int64(3)), (("a red room", "a blue room"), range(3, 5))):
        assert pipeline(given, pose="w*2", seed=seed).equal(expected)
    assert pipeline("a", pose=(EYE + 1e-4, K)).shape[1] == 3
