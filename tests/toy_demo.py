"""Random models where `make demo` leaves trained ones."""

from pathlib import Path

import torch
from toy_rooms import random_rooms

from dit_ops.pipelines import loading

STAGES = {
    "bidirectional": "bidirectional",
    "teacher_forcing": "autoregressive",
    "causal_ode": "few_step",
    "consistency": "few_step",
    "dmd": "few_step",
}


def demo_folder(folder: Path) -> Path:
    """A working directory for commands and examples that name `out/demo/<stage>/model`; every stage has the same weights."""
    torch.manual_seed(0)
    pipeline = random_rooms()
    settings = pipeline.settings.override({"num_steps": 2})
    for stage, mode in STAGES.items():
        loading.save(folder / "out/demo" / stage / "model", mode, pipeline.backbone, pipeline.condition, settings)
    return folder
