"""Does a model follow the camera? PSNR of its videos to the true render, and to that of the mirrored trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_ops import rooms
from dit_ops.camera import mirror_trajectory


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and trajectory with its two truths, [F, 3, H, W] in [-1, 1]."""

    prompt: str
    pose: str
    truth: Tensor
    wrong: Tensor


def psnr(video: Tensor, truth: Tensor) -> float:
    """10·log10(4 / MSE) of videos in [−1, 1], in dB; the MSE is over all frames and pixels."""
    if video.shape != truth.shape:
        raise ValueError(f"psnr: video must be {list(truth.shape)} as the truth, got {list(video.shape)}")
    error = (video.double() - truth.double()).square().mean().clamp_min(1e-12)
    return float(10 * torch.log10(4 / error))


def held_out_samples(prompts: Sequence[str], poses: Sequence[str], size: int) -> list[Sample]:
    """Every prompt along every pose string, pose by pose, with the render of the pose and of its mirror image."""
    return [
        Sample(prompt, pose, rooms.film(prompt, pose, size), rooms.film(prompt, mirror_trajectory(pose), size))
        for pose in poses
        for prompt in prompts
    ]


def generate_samples(pipeline: Any, samples: Sequence[Sample], seed: int, batch: int = 8) -> Tensor:
    """Videos [n, F, 3, H, W] of the samples on the CPU; sample i is generated with seed + i, whatever the batches are."""
    videos = []
    for i in range(0, len(samples), batch):
        part = samples[i : i + batch]
        seeds = [seed + i + j for j in range(len(part))]
        videos.append(pipeline([s.prompt for s in part], pose=[s.pose for s in part], seed=seeds).cpu())
    return torch.cat(videos)


def score(videos: Tensor, samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean PSNR to the truth and to the wrong trajectory, their difference in dB, and both figures per sample."""
    rights = [round(psnr(video, s.truth), 4) for video, s in zip(videos, samples, strict=True)]
    wrongs = [round(psnr(video, s.wrong), 4) for video, s in zip(videos, samples, strict=True)]
    right, wrong = sum(rights) / len(rights), sum(wrongs) / len(wrongs)
    each = [
        {"prompt": s.prompt, "pose": s.pose, "psnr": r, "psnr_wrong": w}
        for s, r, w in zip(samples, rights, wrongs, strict=True)
    ]
    return {"psnr": round(right, 4), "psnr_wrong": round(wrong, 4), "difference": round(right - wrong, 4), "samples": each}
