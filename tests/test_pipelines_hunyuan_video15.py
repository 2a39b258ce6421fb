"""HunyuanVideo 1.5 through the pipelines: stock directories give diffusers' own videos; image to video; causal streaming."""

import json

import PIL.Image
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from toy_hunyuan_directory import save
from toy_hunyuan_video15 import tiny

from dit_ops.actions import action_labels
from dit_ops.camera import DEFAULT_INTRINSICS, intrinsics_matrix, parse_trajectory
from dit_ops.cli import main
from dit_ops.conditions.linear import LinearCondition
from dit_ops.draws import Draws
from dit_ops.pipelines import loading
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings
from dit_ops.video import read_mp4

PROMPT = 'a red room with a sign saying "open"'
POSE = "w*2,l*2"
SMALL = Settings(num_steps=2, height=24, width=32, denoising_steps=(1000, 500), shift=7, fps=8)


def picture(height: int, width: int) -> tuple[PIL.Image.Image, torch.Tensor]:
    image = PIL.Image.effect_noise((width, height), 60).convert("RGB")
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return image, levels.permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_stock_directory_gives_diffusers_own_video(tmp_path, image):
    save(tmp_path, image=image)
    stock = (HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline).from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "vae", *(["image_encoder"] if image else [])):
        getattr(stock, name).eval()
    pipeline = loading.load(tmp_path, device="cpu")
    assert (pipeline.settings.guidance, pipeline.settings.shift, pipeline.settings.fps) == (3.0, 7.0, 24)
    given, known = {"height": 32, "width": 48}, None
    if image:
        stock.video_processor.calculate_default_height_width = lambda **_: (32, 48)  # it chooses the size itself: a small one
        chosen, known = picture(32, 48)
        given = {"image": chosen}
    noise = torch.stack([Draws(5).at(f).normal("noise", (4, 2, 3)) for f in range(3)], 1)[None]
    expected = stock(
        prompt=PROMPT, negative_prompt="a box", num_frames=9, num_inference_steps=3, latents=noise, output_type="pt", **given
    ).frames
    video = pipeline(PROMPT, seed=5, frames=3, num_steps=3, negative_prompt="a box", height=32, width=48, image=known)
    torch.testing.assert_close((video + 1) / 2, expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    return LinearCondition.fit(torch.rand(2, 3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, 8, 4)


def model(**options):
    return tiny(config={"in_channels": 9, "text_embed_dim": 64, "text_embed_2_dim": 8}, **options)


def test_an_image_reaches_all_chunks_and_guidance_passes(condition):
    """The image changes the video, and batched guidance equals two passes."""
    backbone = model(block_frames=2).eval()
    pipeline = AutoregressivePipeline(backbone, condition, SMALL.override({"guidance": 2.0}))
    image = torch.rand(3, 24, 32) * 2 - 1
    two = pipeline(PROMPT, pose=POSE, image=image)
    torch.testing.assert_close(pipeline(PROMPT, pose=POSE, image=image, batched_guidance=True), two, atol=2e-5, rtol=0)
    assert (pipeline(PROMPT, pose=POSE) - two).abs().max() > 1e-3
    with pytest.raises(
        ValueError, match=r"image must be \[3, 24, 32\] in \[-1, 1\], or one of 1 prompts each, got \[3, 8, 8\]"
    ):
        pipeline(PROMPT, pose=POSE, image=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="frames must be given for an image"):
        pipeline(PROMPT, pose=iter([POSE]), image=image)
    pieces = pipeline(PROMPT, pose=iter(["w*1", "w*1,l*2"]), image=image, frames=5)
    assert torch.equal(pieces, two)


def test_few_step_streaming_equals_teacher_forcing(condition):
    """Three chunks: the cache, with the image in the first of them, gives what [clean ‖ noisy] without a cache gives."""
    backbone = model(block_frames=2).eval()
    image = torch.rand(3, 24, 32) * 2 - 1
    pipeline = FewStepPipeline(backbone, condition, SMALL.override({"denoising_steps": (1000,)}))
    chunks = list(pipeline.stream(PROMPT, pose=POSE, image=image))
    assert [chunk.shape[1] for chunk in chunks] == [2, 2, 1]
    viewmats = parse_trajectory(POSE)[None]
    Ks = intrinsics_matrix(*DEFAULT_INTRINSICS).expand(1, 5, 3, 3)
    given = condition.encode_text([PROMPT]) | condition.encode_image(image[None], 5)
    noise = torch.stack([Draws(0).at(f).normal("noise", (4, 3, 4)) for f in range(5)])[None]
    clean = torch.zeros_like(noise)
    for first in (0, 2, 4):
        block = slice(first, first + 2)
        with torch.no_grad():
            flow = backbone(noise, torch.full((1,), 1000.0), **given, clean_latents=clean, viewmats=viewmats, Ks=Ks)
        clean[:, block] = (noise - flow)[:, block]
    torch.testing.assert_close(torch.cat(chunks, 1), condition.decode_to_pixel(clean), atol=2e-5, rtol=0)


def test_a_model_directory_of_ours(condition, tmp_path):
    backbone = model(block_frames=2)
    loading.save(tmp_path / "model", "few_step", backbone, condition, SMALL)
    loaded = loading.load(tmp_path / "model", device="cpu")
    assert torch.equal(loaded(PROMPT, pose=POSE), FewStepPipeline(backbone.eval(), condition, SMALL)(PROMPT, pose=POSE))


def test_actions_follow_the_trajectory_and_stay_out_of_the_context(condition):
    """Labels of the pose in every noisy chunk, none in the rerun of a clean one, as teacher forcing was trained."""
    backbone = model(block_frames=2, action=True).eval()
    calls, predict = [], backbone.predict
    keep = lambda action=None, **_: calls.append(None if action is None else action[0].tolist())
    backbone.predict = lambda **given: keep(**given) or predict(**given)
    FewStepPipeline(backbone, condition, SMALL.override({"denoising_steps": (1000,)}))(PROMPT, pose="w*2,d*2")
    assert action_labels(parse_trajectory("w*2,d*2")).tolist() == [0, 9, 9, 27, 27]
    assert calls == [[0, 9], None, [9, 27], None, [27]]


def test_an_image_file_through_the_command_line(condition, tmp_path, capsys):
    loading.save(tmp_path / "model", "few_step", model(block_frames=2), condition, SMALL)
    picture(48, 64)[0].save(tmp_path / "first.png")
    argv = ["generate", "--model", str(tmp_path / "model"), "--prompt", PROMPT, "--pose", "w*2", "--device", "cpu"]
    for output, image in (("plain.mp4", []), ("known.mp4", ["--image", str(tmp_path / "first.png")])):
        assert main([*argv, "--output", str(tmp_path / output), *image]) == 0
    assert "image" not in json.loads((tmp_path / "plain.json").read_text())["request"]
    assert json.loads((tmp_path / "known.json").read_text())["request"]["image"].endswith("first.png")
    plain, known = (read_mp4(tmp_path / name)[0] for name in ("plain.mp4", "known.mp4"))
    assert known.shape == (3, 3, 24, 32) and (plain - known).abs().mean() > 0.01
    (tmp_path / "first.png").write_text("no picture")
    assert main([*argv, "--output", str(tmp_path / "bad.mp4"), "--image", str(tmp_path / "first.png")]) == 2
    assert "is not a picture that can be read" in capsys.readouterr().err and not (tmp_path / "bad.mp4").exists()
