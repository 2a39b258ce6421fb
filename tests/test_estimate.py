"""The cost estimate of the full-size configs: its counts of forwards against the stages' own, and the page made with it."""

from pathlib import Path

import pytest
import torch
from toy_backbones import NEGATIVE, tiny_batch, tiny_wan
from toy_ranks import ROLES
from toy_stage import run_config

from dit_ops.draws import Draws
from dit_ops.training import estimate
from dit_ops.training.config import stage_class
from dit_ops.training.flops import forward_flops
from dit_ops.training.ode_sampling import sample_trajectories

CONFIGS = Path(__file__).parent.parent / "configs"
FRAMES = 5  # blocks of 2, 2 and 1


def test_the_page_holds_what_the_estimate_says():
    page = CONFIGS / "README.md"
    assert page.read_text() == estimate.with_table(page.read_text(), CONFIGS), (
        "write it again: page.write_text(estimate.with_table(page.read_text(), CONFIGS))"
    )


@pytest.fixture(scope="module")
def batch() -> dict:
    """16 tokens per frame and one of text."""
    batch = tiny_batch(1, FRAMES)
    latents = batch["latents"].repeat(1, 1, 1, 2, 2)
    text = {"encoder_hidden_states": batch["condition"]["encoder_hidden_states"][:, :1]}
    return batch | {"latents": latents, "condition": text, "trajectory": torch.randn(1, 6, *latents.shape[1:])}


def counted(backbones: dict) -> list[int]:
    """One entry that grows by the FLOPs of every forward; with gradient times 3, as a backward will come."""
    total = [0]

    def count(module, args, kwargs) -> None:
        training = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        total[0] += forward_flops(module, *args, **kwargs) * (3 if training else 1)

    for backbone in backbones.values():
        backbone.register_forward_pre_hook(count, with_kwargs=True)
    return total


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("bidirectional", {}),
        ("teacher_forcing", {}),
        ("causal_ode", {}),
        ("consistency", {}),
        ("ode_sampling", {"num_steps": 4}),
        ("dmd", {"generator_every": 3}),
        ("dmd", {"generator_every": 3, "exclusive": True, "context": "last"}),
    ],
)
def test_forwards_are_those_that_the_stage_runs(stage, options, batch):
    """Exact, but for the text's keys in a stream: the estimate has them at every level of the first block."""
    config = run_config(Path("data"), "out", stage=stage, options=options)
    video = {key: batch[key] for key in ("latents", "viewmats", "Ks")} | batch["condition"]
    costs = estimate.costs_of(tiny_wan(2), video, 2)
    backbones = {role: tiny_wan(blocks) for role, blocks in ROLES.get(stage, {"generator": 2}).items()}
    negative = {"encoder_hidden_states": NEGATIVE["encoder_hidden_states"][:1]}
    if stage == "ode_sampling":
        total = counted(backbones)
        given = {key: batch[key] for key in ("viewmats", "Ks")}
        noise = torch.randn_like(batch["latents"])
        sample_trajectories(
            backbones["generator"], config.options, noise, batch["latents"], batch["condition"], negative, **given
        )
        assert total[0] == pytest.approx(estimate.step_flops(config, costs), rel=0.01)
        return
    made = stage_class(stage)(config.options, backbones, negative)
    if stage == "consistency":
        made.ema = {"generator": tiny_wan(2).requires_grad_(False)}
        backbones["ema"] = made.ema["generator"]
    total = counted(backbones)
    if stage != "dmd":
        made.loss("generator", batch, Draws(0))
        assert total[0] == estimate.step_flops(config, costs)
        return
    levels = len(config.options.denoising_steps)
    for k in range(levels):
        made.exit_step = lambda draws, k=k: k
        for step in range(config.options.generator_every):
            for role in made.updates(step):
                made.loss(role, batch, Draws(0))
    mean = total[0] / levels / config.options.generator_every
    assert mean == pytest.approx(estimate.step_flops(config, costs), rel=0.01)


def test_more_gpus_keep_the_global_batch_and_need_less_memory():
    given = estimate.load_config(CONFIGS / "wan-1.3b/dmd.yaml")
    sizes = estimate.plan.model_sizes("Wan 2.1 1.3B")
    alone, eight = estimate.on(given, 1), estimate.on(given, 8)
    assert (alone.grad_accumulation, eight.grad_accumulation, eight.parallel.fsdp) == (32, 4, "full")
    bytes_of = [estimate.memory(c, sizes, 31200, n) for c, n in ((alone, 1), (eight, 8), (estimate.on(given, 32), 32))]
    assert bytes_of == sorted(bytes_of, reverse=True)
    # two trained networks with moments, an average and a frozen score: 4 · (2·4 + 2) bytes a parameter
    state = 40 * (sizes.sharded + sizes.whole)
    cache = 2 * 4 * 1536 * 30 * 31200
    assert bytes_of[0] == state + cache + estimate.plan.working_bytes(sizes, 31200, 1)
