"""Every training stage on a tiny HunyuanVideo 1.5, with masks, glyphs and a known first frame: no stage names a model."""

import pytest
import torch
from toy_hunyuan_video15 import conditions, tiny, video

from dit_ops.conditions.arguments import image_condition, of_clean, of_frames, per_sample
from dit_ops.draws import Draws
from dit_ops.training.bidirectional import BidirectionalConfig, BidirectionalStage
from dit_ops.training.causal_ode import CausalODEConfig, CausalODEStage
from dit_ops.training.consistency import ConsistencyConfig, ConsistencyStage
from dit_ops.training.dmd import DMDConfig, DMDStage
from dit_ops.training.flow_matching import drop_text
from dit_ops.training.ode_sampling import ODESamplingConfig, sample_trajectories
from dit_ops.training.rollout import inference_with_trajectory
from dit_ops.training.teacher_forcing import TeacherForcingConfig, TeacherForcingStage

FRAMES = 5


def model(block_frames: int | None = 2, **options):
    return tiny(block_frames=block_frames, config={"in_channels": 9}, **options)


def batch_of(B: int = 2) -> dict:
    latents, _, camera = video(B, FRAMES)
    condition = conditions(B) | {"condition_latents": image_condition(latents[:, :1], FRAMES)}
    return {"latents": latents, "condition": condition, **camera}


def negative() -> dict:
    """Of the text alone: with guidance and in dropout the image stays."""
    return {name: value for name, value in per_sample(conditions(1))[0].items() if name != "image_embeds"}


def stages() -> dict:
    half = negative()
    ema = ConsistencyStage(ConsistencyConfig(), {"generator": model(), "teacher": model()}, half)
    ema.ema = {"generator": model().requires_grad_(False)}
    three = {"generator": model(), "real_score": model(None), "fake_score": model(None)}
    return {
        "bidirectional": BidirectionalStage(BidirectionalConfig(text_dropout=0.5), {"generator": model(None)}, half),
        "teacher_forcing": TeacherForcingStage(TeacherForcingConfig(text_dropout=0.5), {"generator": model()}, half),
        "causal_ode": CausalODEStage(CausalODEConfig(), {"generator": model()}, half),
        "consistency": ema,
        "dmd": DMDStage(DMDConfig(), three, half),
    }


@pytest.mark.parametrize("name", ["bidirectional", "teacher_forcing", "causal_ode", "consistency", "dmd"])
def test_a_stage_trains_every_parameter_of_its_role(name):
    stage, batch = stages()[name], batch_of()
    if name == "causal_ode":
        batch["trajectory"] = torch.randn(2, 6, *batch["latents"].shape[1:])
    loss, _ = stage.loss("generator", batch, Draws(0, (0, 0, 0)))
    loss.backward()
    assert loss.isfinite()
    unused = ("add_q_proj", "norm_added_q", "to_add_out", "ff_context")  # nothing reads the last block's text tokens
    for parameter, p in stage.roles["generator"].named_parameters():
        if not ("transformer_blocks.1." in parameter and any(part in parameter for part in unused)):
            assert p.grad is not None and p.grad.isfinite().all(), parameter
    camera = stage.roles["generator"].camera
    assert all(p.grad.abs().max() > 0 for p in camera.parameters())


def test_a_rollout_of_one_step_is_teacher_forcing_on_its_own_blocks():
    """Exit at the first step: the noisy half given the predicted clean half, text cache and image channels included."""
    generator, batch = model(), batch_of()
    camera = {"viewmats": batch["viewmats"], "Ks": batch["Ks"]}
    with torch.no_grad():
        options = {"timesteps": [1000.0, 500.0], "exit_step": 0, "draws": Draws(0)}
        pred, *_ = inference_with_trajectory(generator, batch["latents"], batch["condition"], **options, **camera)
        t = torch.full((2,), 1000.0)
        flow = generator(batch["latents"], t, **batch["condition"], clean_latents=pred, **camera)
    torch.testing.assert_close(pred, batch["latents"] - flow, atol=2e-5, rtol=0)


def test_sampled_trajectories_equal_teacher_forcing_at_every_step():
    """One Euler step with guidance: u + g·(c − u), where u has the negative text and the same image."""
    generator, batch, half = model(), batch_of(), negative()
    camera = {"viewmats": batch["viewmats"], "Ks": batch["Ks"]}
    noise, clean = torch.randn(2, *batch["latents"].shape)
    config = ODESamplingConfig(num_steps=1, guidance=3.0, denoising_steps=(1000.0,))
    states = sample_trajectories(generator, config, noise, clean, batch["condition"], half, **camera)
    uncond = batch["condition"] | {name: value.expand(2, *value.shape) for name, value in half.items()}
    with torch.no_grad():
        t = torch.full((2,), 1000.0)
        c, u = (generator(noise, t, **given, clean_latents=clean, **camera) for given in (batch["condition"], uncond))
    torch.testing.assert_close(states[:, 1], noise - (u + 3 * (c - u)), atol=5e-5, rtol=0)


def test_per_frame_conditions_are_cut_and_clean_chunks_have_no_action():
    text, known, action = torch.randn(1, 3, 4), torch.randn(1, 5, 3, 2, 2), torch.arange(5)[None]
    given = of_frames({"encoder_hidden_states": text, "condition_latents": known, "action": action}, 2, 4)
    assert given["encoder_hidden_states"] is text, "caches recognise the text by the object"
    assert torch.equal(given["condition_latents"], known[:, 2:4]) and given["action"].tolist() == [[2, 3]]
    assert of_clean(given).keys() == {"encoder_hidden_states", "condition_latents"}


def test_dropout_replaces_states_and_masks_of_the_same_samples():
    """The image is not text: it stays."""
    given, half = conditions(2), negative()
    given = {name: value.repeat(16, *[1] * (value.dim() - 1)) for name, value in given.items()}
    half["encoder_attention_mask"] = 1 - half["encoder_attention_mask"]
    got = drop_text(given, half, 0.5, Draws(1))
    dropped = (got["encoder_hidden_states"] == half["encoder_hidden_states"]).all((1, 2))
    assert 4 < dropped.sum() < 28 and torch.equal(got["image_embeds"], given["image_embeds"])
    for name, value in half.items():
        assert torch.equal(got[name][dropped], value.expand_as(given[name])[dropped].to(got[name].dtype)), name
        assert torch.equal(got[name][~dropped], given[name][~dropped]), name
