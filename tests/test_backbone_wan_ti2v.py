"""Wan 2.2 TI2V: a timestep per token and known first frames, against diffusers, between modes, and through the stages."""

import copy

import PIL.Image
import pytest
import torch
import torch.distributed as dist
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from toy_wan_ti2v_directory import CONFIG, randomise, save

import dit_ops
from dit_ops.backbones.wan import WanBackbone
from dit_ops.backbones.wan_ti2v import WanTI2VBackbone
from dit_ops.camera import intrinsics_matrix, parse_trajectory
from dit_ops.conditions import load as load_condition
from dit_ops.conditions.arguments import image_condition, of_frames
from dit_ops.draws import Draws
from dit_ops.parallel import SequenceParallel
from dit_ops.pipelines import loading
from dit_ops.registry import backbone_class, load_backbone
from dit_ops.training.bidirectional import BidirectionalConfig, BidirectionalStage
from dit_ops.training.rollout import inference_with_trajectory

B, F, H, W = 2, 5, 4, 6  # latents; 6 tokens per frame


def model(**options) -> WanTI2VBackbone:
    torch.manual_seed(1)
    backbone = WanTI2VBackbone.from_config(CONFIG, **options)
    randomise(backbone)
    return backbone.eval()


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def video(camera: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x, clean = torch.randn(2, B, F, 48, H, W)
    given = {"encoder_hidden_states": torch.randn(B, 512, CONFIG["text_dim"])}
    if camera:
        given |= {"viewmats": parse_trajectory(f"l*{F - 1}").expand(B, F, 4, 4)}
        given |= {"Ks": intrinsics_matrix(0.6, 0.8).expand(B, F, 3, 3)}
    return x, clean, given | {"condition_latents": image_condition(clean[:, :1], F)}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_equal_to_diffusers_with_a_timestep_per_token(known, fused):
    """Stock is given timesteps [B, L], 0 in the tokens of the known frame, and that frame in place of the noisy one."""
    backbone = model()
    stock = copy.deepcopy(backbone.transformer)
    stock = dit_ops.fuse(stock) if fused else stock
    x, clean, given = video()
    if not known:
        del given["condition_latents"]
    t, mask = torch.tensor([700.0, 30.0]), torch.ones(F)
    mask[0] = 0 if known else 1
    tokens = (t[:, None] * mask).repeat_interleave(H * W // 4, dim=1)
    mixed = torch.where(mask.view(-1, 1, 1, 1) > 0, x, clean)
    with torch.no_grad():
        flow = backbone(x, t, **given)
        expected = stock(mixed.transpose(1, 2), tokens, given["encoder_hidden_states"]).sample.transpose(1, 2)
    close(flow[:, int(known) :], expected[:, int(known) :])
    if known:
        assert (flow[:, 1:] - backbone(x, t, encoder_hidden_states=given["encoder_hidden_states"])[:, 1:]).abs().max() > 1e-2
        close((x - (t / 1000).view(-1, 1, 1, 1, 1) * flow)[:, :1], clean[:, :1])


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_stock_directory_gives_diffusers_own_video(tmp_path, image):
    save(tmp_path, image=image)
    stock = (WanImageToVideoPipeline if image else WanPipeline).from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    stock.vae.eval(), stock.text_encoder.eval()
    pipeline = loading.load(tmp_path, device="cpu")
    settings = pipeline.settings
    assert type(pipeline.backbone) is WanTI2VBackbone and (settings.frames, settings.height, settings.fps) == (31, 704, 24)
    given, first = {}, None
    if image:
        given["image"] = PIL.Image.effect_noise((64, 32), 60).convert("RGB")
        levels = torch.frombuffer(bytearray(given["image"].tobytes()), dtype=torch.uint8).view(32, 64, 3)
        first = levels.permute(2, 0, 1) / 127.5 - 1
    noise = torch.stack([Draws(5).at(f).normal("noise", (48, 2, 4)) for f in range(3)], 1)[None]
    prompts = {"prompt": "a red room", "negative_prompt": "a blue ball"}
    options = {"num_frames": 9, "num_inference_steps": 3, "latents": noise, "height": 32, "width": 64}
    expected = stock(**prompts, **options, **given, guidance_scale=3.0, output_type="pt").frames
    size = {"frames": 3, "num_steps": 3, "height": 32, "width": 64}
    got = pipeline("a red room", seed=5, guidance=3.0, negative_prompt="a blue ball", image=first, **size)
    close((got + 1) / 2, expected)


@pytest.mark.parametrize("camera", [False, True])
def test_streaming_equals_teacher_forcing(camera):
    """Three chunks, the first of which holds the known frame, in its noisy pass and in the clean rerun."""
    backbone = model(camera=camera, block_frames=2)
    x, clean, given = video(camera)
    t = torch.full((B, F), 600.0)
    text = given.pop("encoder_hidden_states")
    with torch.no_grad():
        expected = backbone(x, t, text, clean_latents=clean, **given)
        cache, flows = backbone.new_cache(B, H, W), []
        for first in (0, 2, 4):
            last = min(first + 2, F)
            here = of_frames({k: v for k, v in given.items() if k == "condition_latents"}, first, last)
            here |= {k: given[k][:, first:last] for k in ("viewmats", "Ks") if camera}
            here |= {"cache": cache, "start_frame": first}
            flows.append(backbone(x[:, first:last], t[:, first:last], text, **here))
            backbone(clean[:, first:last], torch.zeros(B, last - first), text, **here)
        unknown = backbone(x, t, text, clean_latents=clean, **{k: v for k, v in given.items() if k != "condition_latents"})
    close(torch.cat(flows, 1), expected, 1e-5)
    assert (unknown - expected)[:, 1:].abs().max() > 1e-2


def test_a_clean_half_with_noise_keeps_the_known_frame_clean():
    backbone = model(block_frames=1)
    x, clean, given = video()
    noisy = clean + torch.randn_like(clean)
    t, late = torch.full((B,), 600.0), torch.full((B, F), 100.0)
    with torch.no_grad():
        got = backbone(x, t, **given, clean_latents=noisy, clean_timestep=late)
        noisy[:, 0], late[:, 0] = clean[:, 0], 0
        close(got, backbone(x, t, **given, clean_latents=noisy, clean_timestep=late), 0)


def test_training_learns_nothing_from_the_known_frame():
    backbone = model()
    _, clean, given = video()
    text = given["encoder_hidden_states"]
    batch = {"latents": clean, "condition": given}
    stage = BidirectionalStage(BidirectionalConfig(weighted=False), {"generator": backbone}, {"encoder_hidden_states": text[0]})
    errors = []
    backbone.register_forward_hook(lambda module, args, kwargs, out: errors.append(out), with_kwargs=True)
    loss, _ = stage.loss("generator", batch, Draws(0))
    loss.backward()
    (flow,) = errors
    target = Draws(0).normal("noise", tuple(clean.shape)) - clean
    close(flow[:, 0], target[:, 0], 1e-4)
    close(loss, (flow - target)[:, 1:].square().sum() / target.numel(), 1e-4)
    assert backbone.transformer.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def rollout(backbone: WanTI2VBackbone) -> torch.Tensor:
    """Two steps per block over three blocks, in fp64."""
    torch.manual_seed(2)
    noise, clean, given = video()
    condition = {name: value.double() for name, value in given.items()}
    options = {"timesteps": [1000.0, 800.0], "exit_step": 1, "draws": Draws(0)}
    x, *_ = inference_with_trajectory(backbone.double(), noise.double(), condition, **options)
    return torch.cat([x, clean.double()])


def test_a_rollout_keeps_the_known_frame_and_later_frames_follow_it():
    backbone = model(block_frames=2)
    x, clean = rollout(backbone).split(B)
    close(x[:, 0], clean[:, 0], 1e-6)
    x[:, 1:].square().mean().backward()
    assert backbone.transformer.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def _split(rank: int, ranks: int) -> dict:
    backbone = model(block_frames=2)
    backbone.sequence_parallel = SequenceParallel(dist.group.WORLD)
    x = rollout(backbone)
    x.square().mean().backward()
    return {"x": x.detach()}


@pytest.mark.dist
def test_two_ranks_that_share_a_video_equal_one(run_ranks):
    expected = rollout(model(block_frames=2)).detach()
    for found in run_ranks(_split, 2):
        close(found["x"], expected, 1e-9)


def test_the_condition_side_makes_what_the_backbone_takes(tmp_path):
    save(tmp_path / "model")
    condition = load_condition(tmp_path / "model")
    assert (condition.latent_channels, condition.spatial_stride, condition.temporal_stride) == (48, 16, 4)
    videos = torch.rand(1, 5, 3, 32, 64) * 2 - 1
    made = condition.get_condition(["a red room"], videos, image=True)
    assert made["latents"].shape == (1, 2, 48, 2, 4) and condition.decode_to_pixel(made["latents"]).shape == videos.shape
    known = made["condition_latents"]
    close(known[:, :1, :-1], condition.encode_to_latent(videos[:, :1]))
    assert known[:, 0, -1].eq(1).all() and not known[:, 1:].any()
    with torch.no_grad():
        flow = load_backbone(tmp_path / "model")(timestep=torch.tensor([500.0]), **made)
    assert flow.shape == made["latents"].shape
    condition.save_pretrained(tmp_path / "again")
    again = load_condition(tmp_path / "again").encode_image(videos[:, 0], 2)
    assert again.keys() == {"condition_latents"} and torch.equal(again["condition_latents"], known)


def test_the_channels_of_a_config_tell_the_two_models_apart(tmp_path):
    assert backbone_class("WanTransformer3DModel", CONFIG) is WanTI2VBackbone
    assert backbone_class("WanTransformer3DModel", CONFIG | {"in_channels": 16}) is WanBackbone
    own = model(camera=True, block_frames=2)
    own.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert type(loaded) is WanTI2VBackbone and loaded.block_frames == 2
    stock = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, own.transformer.state_dict()[name]) for name, value in stock.items())


def test_a_condition_of_another_shape_is_refused():
    x, _, given = video()
    given["condition_latents"] = given["condition_latents"][:, :2]
    with pytest.raises(ValueError, match=r"condition_latents must be .* = \[2, 5, 49, 4, 6\], got \[2, 2, 49, 4, 6\]"):
        model()(x, torch.zeros(B), **given)
