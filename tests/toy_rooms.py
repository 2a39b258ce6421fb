"""A random model of the kind that the demo trains: same classes, fewer layers."""

import torch

from dit_ops.backbones.wan import WanBackbone
from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings


def random_rooms(fps: float = 8) -> FewStepPipeline:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 64, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2}
    config = {"patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16, **sizes}
    backbone = WanBackbone.from_config(config, camera=True, block_frames=2).eval().requires_grad_(False)
    condition = LinearCondition.fit(torch.rand(2, 3, 3, 64, 64) * 2 - 1)
    return FewStepPipeline(backbone, condition, Settings(height=64, width=64, fps=fps, frames=8))
