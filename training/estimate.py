"""What the full-size configs cost before a GPU is rented: memory of a GPU and time of a step, calculated, not measured.

A step's work is counted in forwards of each kind; their FLOPs come from `training/flops.py`, bytes from `training/plan.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dit_ops.backbones._common import token_grid
from dit_ops.layout import VideoLayout
from dit_ops.registry import backbone_class
from dit_ops.training import plan
from dit_ops.training.config import STAGES, ParallelConfig, RunConfig, load_config
from dit_ops.training.flops import forward_flops
from dit_ops.training.meters import PEAK_FLOPS

BLOCK = 4  # latent frames of a causal block in all full-size configs
UTILISATION = 0.4  # of the peak: an assumption
PEAK = {"bf16": PEAK_FLOPS["H100"], "fp32": 67e12}  # of an H100, FLOPs per second, from its data sheet
BEGIN, END = "<!-- dit_ops.training.estimate -->", "<!-- end -->"
WAN = {"latents": (16, 60, 104), "encoder_hidden_states": (512, 4096)}
HUNYUAN = {
    "latents": (32, 30, 52),
    "encoder_hidden_states": (1000, 3584),
    "encoder_hidden_states_2": (256, 1472),
    "image_embeds": (729, 1152),
}
CONFIGS: dict[str, tuple[str, dict[str, tuple[int, ...]], tuple[int, ...]]] = {  # folder: model, shapes, numbers of GPUs
    "wan-1.3b": ("Wan 2.1 1.3B", WAN, (1, 8, 32)),
    "hunyuan-video15": ("HunyuanVideo 1.5", HUNYUAN, (8, 32, 128)),
}
FRAMES = 20


@dataclass(frozen=True)
class Costs:
    """FLOPs of one forward of one sample: bidirectional, teacher-forced, and every block of a streamed video."""

    whole: int
    forced: int
    blocks: tuple[int, ...]
    rerun: int  # of all blocks but the last, for their keys and values

    @property
    def sweep(self) -> int:
        """All blocks at one noise level."""
        return sum(self.blocks)


def costs_of(backbone: Any, video: dict[str, Any], block_frames: int) -> Costs:
    """video: latents [1, F, Cz, h, w], encoder_hidden_states and further arguments of forward, on any device."""
    latents = video["latents"]
    given = {name: value for name, value in video.items() if name != "latents"}
    backbone.block_frames = block_frames
    _, frames, _, height, width = latents.shape
    count = lambda x, **more: forward_flops(backbone, x, x[:, 0, 0, 0, 0], **given, **more)
    blocks, reruns = [], []
    with torch.no_grad():
        for first, last in VideoLayout(frames, height, width, block_frames).blocks:
            chunk: dict[str, Any] = {"cache": SimpleNamespace(window_frames=None), "start_frame": first}
            blocks.append(count(latents[:, first:last], **chunk))
            reruns.append(count(latents[:, first:last], **chunk, keys_only=True))
    return Costs(count(latents), count(latents, clean_latents=latents), tuple(blocks), sum(reruns[:-1]))


def step_flops(config: RunConfig, costs: Costs) -> float:
    """Of one micro batch sample, the mean over steps: a forward counts 1, a backward 2 and its recomputation 1."""
    train = 4 if config.activation_checkpointing == "full" else 3
    options = config.options
    if config.stage == "bidirectional":
        return train * costs.whole
    if config.stage in ("teacher_forcing", "causal_ode"):
        return train * costs.forced
    if config.stage == "consistency":  # teacher with and without text, average, student
        return (3 + train) * costs.forced
    passes = 1 if getattr(options, "guidance", 1) == 1 else 2
    if config.stage == "ode_sampling":
        return passes * (options.num_steps * costs.sweep + costs.rerun)
    assert config.stage == "dmd"
    levels = len(options.denoising_steps)
    steps = levels if options.context == "last" else (levels + 1) / 2  # the exit step is drawn from all
    rollout = steps * costs.sweep + costs.rerun
    generator = rollout + (train - 1) * costs.sweep + 3 * costs.whole  # scores: fake, real with and without text
    fake = rollout + train * costs.whole
    n = options.generator_every
    return (generator + (n - 1 if options.exclusive else n) * fake) / n


def memory(config: RunConfig, sizes: plan.Sizes, tokens: int, gpus: int) -> float:
    """Bytes of a GPU: state of all networks, one micro batch of one video at work, and the key-value cache of rollouts."""
    shards = 1 if config.parallel.fsdp == "none" else gpus
    sequence, stage = config.parallel.sequence, config.stage
    trained = {"ode_sampling": 0, "dmd": 2}.get(stage, 1)
    frozen = {"ode_sampling": 1, "consistency": 1, "dmd": 1}.get(stage, 0)
    copies = frozen + (config.ema.decay is not None)
    state = trained * plan.state_bytes(sizes, shards, ema=False)
    state += copies * plan.FP32 * (-(-sizes.sharded // shards) + sizes.whole)
    forced = stage in ("teacher_forcing", "causal_ode", "consistency")
    whole = config.grad_accumulation > 1 and shards > 1 and config.parallel.accumulate == "local"
    working = plan.working_bytes(sizes, (2 if forced else 1) * tokens, sequence, whole_gradients=whole)
    cache = 0
    if stage in ("dmd", "ode_sampling"):  # keys and values of two paths
        width = plan.FP32 if config.precision == "fp32" else plan.BF16
        rows = 2 if stage == "ode_sampling" and config.options.guidance != 1 else 1
        cache = rows * width * 4 * sizes.channels * len(sizes.blocks) * tokens // sequence
    return state + working + cache


def on(config: RunConfig, gpus: int) -> RunConfig:
    """The config on so many GPUs, with the global batch that it has alone: FSDP beyond the first, accumulation shared out."""
    if config.stage == "ode_sampling":
        return config
    sequence = config.parallel.sequence
    fsdp = "full" if gpus > 1 else config.parallel.fsdp
    parallel = ParallelConfig(sequence=sequence, fsdp=fsdp)
    return replace(config, parallel=parallel, grad_accumulation=max(1, config.grad_accumulation * sequence // gpus))


def table(configs: Path) -> str:
    """Markdown: every full-size config on its numbers of GPUs. ode_sampling is one process per GPU, a step one sample."""
    head = ("config", "GPUs", "data × sequence", "videos per step", "GB per GPU", "PFLOP per step", "seconds per step")
    rows = [head, tuple("---" for _ in head)]
    for folder, (name, shapes, numbers) in CONFIGS.items():
        sizes = plan.model_sizes(name)
        with torch.device("meta"):
            diffusers_class, model_config = plan.MODELS[name]
            backbone = backbone_class(diffusers_class).from_config(model_config, camera=True)
            video = {key: torch.empty(1, *((FRAMES,) if key == "latents" else ()), *shape) for key, shape in shapes.items()}
            video |= {"viewmats": torch.empty(1, FRAMES, 4, 4), "Ks": torch.empty(1, FRAMES, 3, 3)}
            costs = costs_of(backbone, video, BLOCK)
        _, height, width = shapes["latents"]
        H, W = token_grid(height, width, backbone.patch)
        tokens = FRAMES * H * W
        for stage in STAGES:
            given = load_config(configs / folder / f"{stage}.yaml")
            for gpus in numbers if stage != "ode_sampling" else (1,):
                config = on(given, gpus)
                data = gpus // config.parallel.sequence
                videos = data * config.grad_accumulation * config.data.batch_size
                flops = videos * step_flops(config, costs)
                row = (f"{folder}/{stage}", str(gpus), f"{data} × {config.parallel.sequence}", str(videos))
                seconds = flops / (gpus * PEAK[config.precision] * UTILISATION)
                gigabytes = memory(config, sizes, tokens, gpus) / 1e9
                rows.append((*row, f"{gigabytes:.0f}", f"{flops / 1e15:.1f}", f"{seconds:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def with_table(page: str, configs: Path) -> str:
    """configs/README.md with a fresh table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(configs)}{END}{after}"
