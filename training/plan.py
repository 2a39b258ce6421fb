"""What a layout costs a rank, before a GPU is rented: bytes of state, of activations and on the wire, from the model's shapes.

State and wire are exact (tests count the code's collectives); activations are an estimate: what stays of one block between its
forward and its backward, beside the inputs of the others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_ops.registry import backbone_class
from dit_ops.training.parallelize import block_units, fp32_modules, replicated

FP32, BF16 = 4, 2
WAN = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.1 1.3B": ("WanTransformer3DModel", WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan 2.1 14B": ("WanTransformer3DModel", WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {}),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, as they are sharded: blocks (with camera), the rest of the model, what is replicated in fp32."""

    channels: int
    hidden: int  # of the feed-forward layer
    out: int  # values per token that leave the model
    blocks: tuple[int, ...]
    root: int
    fp32_unit: int  # sharded, but gathered in fp32
    whole: int  # replicated

    @property
    def sharded(self) -> int:
        return sum(self.blocks) + self.root + self.fp32_unit

    @property
    def gathered(self) -> int:
        """Bytes of all units as the forward gathers them."""
        return BF16 * (sum(self.blocks) + self.root) + FP32 * self.fp32_unit


def sizes_of(backbone: Any) -> Sizes:
    """Of a backbone that is not sharded yet, on any device."""
    whole = {id(p): p.numel() for p in replicated(backbone).values()}
    count = lambda modules: sum(p.numel() for m in modules if m is not None for p in m.parameters() if id(p) not in whole)
    units = block_units(backbone)
    blocks = tuple(count(unit) for unit in units)
    own = count(fp32_modules(backbone))
    head = backbone.transformer.proj_out
    inside = [m for m in units[0][0].modules() if isinstance(m, nn.Linear)]
    hidden = max(m.in_features for m in inside if m.out_features == head.in_features)
    root = count([backbone]) - sum(blocks) - own
    return Sizes(head.in_features, hidden, head.out_features, blocks, root, own, sum(whole.values()))


def model_sizes(name: str) -> Sizes:
    """Of a published model with a camera branch; nothing is allocated."""
    diffusers_class, config = MODELS[name]
    with torch.device("meta"):
        backbone = backbone_class(diffusers_class).from_config(config)
        backbone.add_camera()
    return sizes_of(backbone)


def state_bytes(sizes: Sizes, shards: int, *, ema: bool = True) -> int:
    """Per rank: fp32 parameters, gradients, two moments and the average, of its shard and of what is replicated."""
    each = FP32 * (5 if ema else 4)
    return each * (-(-sizes.sharded // shards) + sizes.whole)


def working_bytes(sizes: Sizes, tokens: int, sequence: int, *, whole_gradients: bool = False) -> int:
    """Per rank, an estimate: gathered weights of two blocks and the root, one block's gradient, and activations with full
    checkpointing: bf16 inputs of all blocks, and about 20 token vectors and two feed-forward vectors of the one at work."""
    largest = max(sizes.blocks)
    weights = BF16 * (2 * largest + sizes.root) + FP32 * sizes.fp32_unit + (BF16 + FP32) * largest
    local = -(-tokens // sequence)
    activations = BF16 * local * ((len(sizes.blocks) + 20) * sizes.channels + 2 * sizes.hidden)
    return weights + activations + (FP32 * sizes.sharded if whole_gradients else 0)


def gather_bytes(sizes: Sizes, shards: int) -> int:
    """Received by a rank in one micro batch: every unit in the forward and again in the backward."""
    return 2 * sizes.gathered * (shards - 1) // shards


def reduce_bytes(sizes: Sizes, shards: int, ranks: int) -> int:
    """Sent by a rank in one update: fp32 reduce-scatter; all-reduce of shards over replicas and of what is replicated."""
    replicas = ranks // shards
    scatter = FP32 * sizes.sharded * (shards - 1) // shards
    between = 2 * FP32 * (sizes.sharded // shards) * (replicas - 1) // replicas
    return scatter + between + 2 * FP32 * sizes.whole * (ranks - 1) // ranks


def exchange_bytes(sizes: Sizes, tokens: int, sequence: int, *, passes: int = 3) -> int:
    """Sent by a rank in one micro batch through the all-to-alls of all blocks: raw q, k, v there, both paths' outputs back.

    `5 · (tokens / P) · C · (P − 1) / P` values in the forward; passes: forward, backward, and the forward of the recomputation
    """
    per_block = 5 * tokens * sizes.channels * (sequence - 1) // sequence**2
    return passes * BF16 * per_block * len(sizes.blocks)


BEGIN, END = "<!-- dit_ops.training.plan -->", "<!-- end -->"  # around the table in docs/distributed.md
GPUS = (1, 8, 16, 64, 256, 1024)
TOKENS = 2 * 20 * 30 * 52  # teacher forcing: two halves of 20 latent frames of 480×832 pixels


def table() -> str:
    """Markdown: every model over 1 … 1024 GPUs, fsdp full, sequence 8 from 8 GPUs on, one video of TOKENS per group."""
    head = ("model", "GPUs", "data × sequence", "state", "working", "gather", "reduce", "all-to-all")
    rows = [head, tuple("---" for _ in head)]
    for name in MODELS:
        sizes = model_sizes(name)
        for gpus in GPUS:
            sequence = min(8, gpus)
            values = (
                state_bytes(sizes, gpus),
                working_bytes(sizes, TOKENS, sequence),
                gather_bytes(sizes, gpus),
                reduce_bytes(sizes, gpus, gpus),
                exchange_bytes(sizes, TOKENS, sequence),
            )
            rows.append((name, str(gpus), f"{gpus // sequence} × {sequence}", *(f"{v / 1e9:.2f}" for v in values)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def with_table(page: str) -> str:
    """docs/distributed.md with a fresh table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"
