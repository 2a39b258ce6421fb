"""For tests of the training loop: a two-role stage on toy data, a backbone that records its calls, and runs of a tiny Wan."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from toy_backbones import LATENT, NEGATIVE, TEXT, tiny_batch

from dit_ops.conditions.arguments import per_sample
from dit_ops.draws import Draws
from dit_ops.training.config import RunConfig, parse_config
from dit_ops.training.data import DatasetWriter
from dit_ops.training.engine import Engine

MODEL = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": LATENT[0],
    "out_channels": LATENT[0],
    "text_dim": TEXT[1],
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
}


class ToyData:
    """9 samples; their latents are a pure function of the index."""

    def __init__(self, n: int = 9):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        return {"id": str(i), "prompt": "", "pose": "", "latents": Draws(1).at(i).normal("latents", (2, 4))}


class ToyStage:
    """Roles a (every second step) and b (always) regress latents; losses use Draws and every global generator."""

    def __init__(self, *, noise: float = 1.0):
        self.noise = noise
        with torch.random.fork_rng():
            torch.manual_seed(3)
            make = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 4))
            self.roles = {"generator": make(), "fake_score": make(), "real_score": make().requires_grad_(False)}
        self.seen: list[tuple[int, str, list[str]]] = []
        self.step = 0

    def updates(self, step: int) -> list[str]:
        self.step = step
        return ["generator", "fake_score"] if step % 2 == 0 else ["fake_score"]

    def loss(self, role: str, batch: dict, draws: Draws) -> tuple[Tensor, dict[str, float | Tensor]]:
        self.seen.append((self.step, role, batch["id"]))
        x = batch["latents"].flatten(0, 1)
        third_party = torch.randn(()) + random.random() + float(np.random.rand())
        y = self.roles[role](x + self.noise * (draws.normal("noise", tuple(x.shape)) + third_party))
        return (y - x).square().mean(), {"output": y.mean()}


def toy_config(output, **values) -> RunConfig:
    defaults = {
        "stage": "bidirectional",  # names a registered stage; the engine is given a ToyStage
        "output": str(output),
        "steps": 11,
        "data": {"path": "toy", "batch_size": 2},
        "optim": {"lr": 1e-2, "betas": [0.9, 0.99]},
        "ema": {"decay": 0.9, "start_step": 2},
        "clip_norm": 1.0,
        "checkpoint": {"every": 4, "keep": 2},
        "log_every": 3,
        "tensorboard": False,
    }
    return parse_config(defaults | values)


def toy_engine(output, stage: ToyStage | None = None, **values) -> Engine:
    config = toy_config(output, **values)
    return Engine(config, stage or ToyStage(), ToyData(), config.output, progress=False)


class Recorder(nn.Module):
    """Predicts a constant flow and keeps what it was called with."""

    block_frames: int | None = None

    def __init__(self, flow: float = 0.0):
        super().__init__()
        self.flow = nn.Parameter(torch.tensor(flow))
        self.calls: list[dict] = []

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given) -> Tensor:
        self.calls.append({"latents": latents, "timestep": timestep, "text": encoder_hidden_states, **given})
        return self.flow.expand_as(latents)


def write_dataset(directory: Path, condition=None) -> Path:
    """Six random samples of 4 frames, 4×4 latents."""
    samples = tiny_batch(6, 4)
    with DatasetWriter(directory, fps=8, negative=NEGATIVE) as writer:
        for i in range(6):
            sample = {key: value[i] for key, value in samples.items() if key != "condition"}
            sample["condition"] = per_sample(samples["condition"])[i]
            writer.add(f"s{i}", **sample, prompt=f"room {i}", pose="w*3", height=32, width=32, split="train")
        if condition is not None:
            condition.save_pretrained(directory / "condition")
    return directory


def run_config(dataset: Path, output: Path | str, **values) -> RunConfig:
    """A short run of a tiny Wan."""
    defaults = {
        "stage": "bidirectional",
        "output": str(output),
        "steps": 6,
        "data": {"path": str(dataset), "batch_size": 2, "split": "train"},
        "model": {"config": MODEL},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.99]},
        "ema": {"decay": 0.5},
        "checkpoint": {"every": 2},
        "tensorboard": False,
        "sampler": {"guidance": 2.0, "num_steps": 3},
        "device": "cpu",
    }
    return parse_config(defaults | values)


def weights(model: Path) -> dict[str, bytes]:
    """The files of a model directory's transformer."""
    return {path.name: path.read_bytes() for path in sorted((model / "transformer").iterdir())}
