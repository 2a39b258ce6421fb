"""Generation against loops without a cache and against diffusers' own pipeline; streams, seeds, batches, files, errors."""

import json

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_ops.backbones.wan import WanBackbone
from dit_ops.camera import DEFAULT_INTRINSICS, intrinsics_matrix, parse_trajectory
from dit_ops.conditions.linear import LinearCondition
from dit_ops.draws import Draws
from dit_ops.flow import FlowSchedule
from dit_ops.pipelines import loading, stages
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.bidirectional import BidirectionalPipeline
from dit_ops.pipelines.few_step import FewStepPipeline
from dit_ops.pipelines.settings import Settings
from dit_ops.pipelines.solvers import UniPC
from dit_ops.video import read_mp4

CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
SETTINGS = Settings(num_steps=3, height=32, width=48, denoising_steps=(1000, 500), fps=8, frames=5)
POSE = "w*2,l*2"  # five latent frames
PROMPT = "a red room with a blue ball"


def randomise(module: torch.nn.Module, std: float = 0.2) -> None:
    """Weights for which attention, camera and text matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p.dim() == 1) * 0.5)


def make_backbone(camera: bool = True, block_frames: int | None = 2) -> WanBackbone:
    backbone = WanBackbone.from_config(CONFIG, camera=camera, block_frames=block_frames)
    randomise(backbone)
    return backbone.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    videos = torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return LinearCondition.fit(videos)


@pytest.fixture(scope="module")
def causal() -> WanBackbone:
    return make_backbone()


@pytest.fixture(scope="module")
def full() -> WanBackbone:
    return make_backbone(block_frames=None)


def teacher_forced(backbone, condition, step_levels, update, pose=POSE, seed=0):
    """Block by block without a cache: `update(i, x, flow)` turns the noisy half's flow of this block into its next state."""
    viewmats = parse_trajectory(pose)[None]
    frames = viewmats.shape[1]
    camera = {"viewmats": viewmats, "Ks": intrinsics_matrix(*DEFAULT_INTRINSICS).expand(1, frames, 3, 3)}
    text = condition.encode_text([PROMPT])["encoder_hidden_states"]
    negative = condition.encode_text([""])["encoder_hidden_states"]
    noise = torch.stack([Draws(seed).at(f).normal("noise", (16, 4, 6)) for f in range(frames)])[None]
    clean = torch.zeros_like(noise)
    for first in range(0, frames, 2):
        block = slice(first, min(first + 2, frames))
        x = noise.clone()
        for i, t in enumerate(step_levels):
            flows = []
            for states in (text, negative):
                flow = backbone(x, torch.full((1,), t), states, clean_latents=clean, **camera)
                flows.append(flow[:, block])
            x[:, block] = update(i, x[:, block], flows, block)
        clean[:, block] = x[:, block]
    return condition.decode_to_pixel(clean)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_few_step_equals_the_loop_without_a_cache(causal, condition):
    levels = FlowSchedule(5.0).few_step([1000, 500]).tolist()
    sigmas = [t / 1000 for t in levels]

    def update(i, x, flows, block):
        x0 = x - sigmas[i] * flows[0]
        if i == 1:
            return x0
        fresh = torch.stack([Draws(0).at(f, i).normal("renoise", (16, 4, 6)) for f in range(block.start, block.stop)])[None]
        return (1 - sigmas[1]) * x0 + sigmas[1] * fresh

    expected = teacher_forced(causal, condition, levels, update)
    close(FewStepPipeline(causal, condition, SETTINGS)(PROMPT, pose=POSE), expected)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_autoregressive_equals_the_loop_without_a_cache(causal, condition, solver):
    settings = SETTINGS.override({"solver": solver, "guidance": 2.5})
    sigmas = FlowSchedule(5.0).sampling(3).tolist()
    block_solver = UniPC(settings)

    def update(i, x, flows, block):
        nonlocal block_solver
        if solver == "euler":
            return x + (sigmas[i + 1] - sigmas[i]) * (flows[1] + 2.5 * (flows[0] - flows[1]))
        block_solver = UniPC(settings) if i == 0 else block_solver  # no history from the block before
        return block_solver.step(i, x.clone(), *flows)  # it keeps its argument

    levels = [1000 * s for s in sigmas[:-1]] if solver == "euler" else block_solver.timesteps
    expected = teacher_forced(causal, condition, levels, update)
    pipeline = AutoregressivePipeline(causal, condition, settings)
    for batched in (False, True):
        close(pipeline(PROMPT, pose=POSE, batched_guidance=batched), expected)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_multistep_block_of_all_frames_is_the_bidirectional_model(full, condition, solver):
    options = {"pose": POSE, "guidance": 3.0, "solver": solver, "num_steps": 4}
    bidirectional = BidirectionalPipeline(full, condition, SETTINGS)(PROMPT, **options)
    close(AutoregressivePipeline(full, condition, SETTINGS)(PROMPT, block_frames=5, **options), bidirectional)


@pytest.fixture(scope="module")
def stock_pipeline() -> WanPipeline:
    """diffusers' own pipeline of tiny random components."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *PROMPT.split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    text = {"vocab_size": len(vocabulary), "d_model": 64, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    transformer = WanTransformer3DModel.from_config(CONFIG)
    randomise(transformer)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**text, feed_forward_proj="gated-gelu")).eval(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def test_a_stock_diffusers_directory_gives_diffusers_own_video(tmp_path, stock_pipeline):
    stock_pipeline.set_progress_bar_config(disable=True)
    stock_pipeline.save_pretrained(tmp_path)
    pipeline = loading.load(tmp_path, device="cpu")
    assert type(pipeline) is BidirectionalPipeline
    assert (pipeline.settings.solver, pipeline.settings.shift, pipeline.settings.guidance) == ("unipc", 3.0, 5.0)
    noise = torch.stack([Draws(7).at(f).normal("noise", (16, 4, 6)) for f in range(3)], dim=1)[None]
    with torch.inference_mode():
        expected = stock_pipeline(
            prompt=PROMPT,
            negative_prompt="",
            latents=noise,
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=4,
            output_type="pt",
        ).frames
    (video,) = pipeline.stream(PROMPT, seed=7, frames=3, height=32, width=48, num_steps=4)
    assert video.shape == (1, 9, 3, 32, 48)
    close((video + 1) / 2, expected)


def test_chunks_come_block_by_block_and_do_not_depend_on_the_length(causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    chunks = list(pipeline.stream(PROMPT, pose=POSE))
    assert [c.shape for c in chunks] == [(1, 2, 3, 32, 48), (1, 2, 3, 32, 48), (1, 1, 3, 32, 48)]
    longer = pipeline(PROMPT, pose="w*2,l*4")
    assert torch.equal(torch.cat(chunks[:2], dim=1), longer[:, :4])
    assert not torch.equal(chunks[2], longer[:, 4:5])  # a last block of one frame is another block than one of two


@pytest.mark.parametrize("cls", [BidirectionalPipeline, AutoregressivePipeline, FewStepPipeline])
def test_seeds(cls, causal, condition):
    pipeline = cls(causal, condition, SETTINGS)
    video = pipeline(PROMPT, pose=POSE, seed=3)
    assert video.isfinite().all() and video.abs().max() <= 1
    assert torch.equal(video, pipeline(PROMPT, pose=POSE, seed=3))
    assert (video - pipeline(PROMPT, pose=POSE, seed=4)).abs().max() > 0.01


@pytest.mark.parametrize("cls", [BidirectionalPipeline, AutoregressivePipeline, FewStepPipeline])
def test_a_batch_equals_single_requests(cls, causal, condition):
    pipeline = cls(causal, condition, SETTINGS)
    options = {} if cls is FewStepPipeline else {"guidance": 2.0}
    prompts, poses = ["a red room", "a green room with a box"], [POSE, "s*4"]
    batch = pipeline(prompts, pose=poses, seed=5, **options)
    for b in range(2):
        close(batch[b : b + 1], pipeline(prompts[b], pose=poses[b], seed=5 + b, **options))
    close(pipeline(prompts, pose=poses, seed=[6, 6], **options)[1:], batch[1:])


def test_the_camera_matters_and_its_intrinsics_default_to_the_model(causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    video = pipeline(PROMPT, pose=POSE)
    assert (video - pipeline(PROMPT, pose="s*2,j*2")).abs().max() > 0.01
    viewmats = parse_trajectory(POSE)
    explicit = pipeline(PROMPT, pose=(viewmats, intrinsics_matrix(*DEFAULT_INTRINSICS).expand(5, 3, 3)))
    assert torch.equal(video, explicit)
    wide = Settings().override(SETTINGS.as_dict() | {"intrinsics": (0.3, 0.4, 0.5, 0.5)})
    trained = FewStepPipeline(causal, condition, wide)(PROMPT, pose=POSE)
    assert torch.equal(trained, pipeline(PROMPT, pose=(viewmats, intrinsics_matrix(0.3, 0.4).expand(5, 3, 3))))
    assert not torch.equal(trained, video)


def test_window_and_sink_reach_the_cache(causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    whole = pipeline(PROMPT, pose="w*7")
    assert torch.equal(whole, pipeline(PROMPT, pose="w*7", window_frames=8))
    windowed = pipeline(PROMPT, pose="w*7", window_frames=4)
    assert torch.equal(whole[:, :4], windowed[:, :4]) and not torch.equal(whole[:, 4:6], windowed[:, 4:6])
    sunk = pipeline(PROMPT, pose="w*7", window_frames=4, sink_frames=1)
    assert torch.equal(whole[:, :4], sunk[:, :4]) and not torch.equal(windowed[:, 4:6], sunk[:, 4:6])


@pytest.mark.parametrize(("cls", "steps"), [(BidirectionalPipeline, 3), (AutoregressivePipeline, 11), (FewStepPipeline, 8)])
def test_progress_counts_every_network_step(cls, steps, causal, condition):
    seen = []
    cls(causal, condition, SETTINGS)(PROMPT, pose=POSE, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_training_goes_on_after_a_validation_video(condition):
    # a head size of its own: its rope tables are first made inside the pipeline's inference mode
    backbone = WanBackbone.from_config(CONFIG | {"attention_head_dim": 40}, camera=True, block_frames=2)
    FewStepPipeline(backbone, condition, SETTINGS)(PROMPT, pose=POSE)
    viewmats = parse_trajectory(POSE)[None]
    Ks = intrinsics_matrix(*DEFAULT_INTRINSICS).expand(1, 5, 3, 3)
    x = torch.randn(1, 5, 16, 4, 6)
    backbone(x, torch.full((1,), 500.0), torch.randn(1, 4, 64), viewmats=viewmats, Ks=Ks).square().mean().backward()
    assert backbone.transformer.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0


def test_videos_are_written_as_they_come(tmp_path, causal, condition):
    pipeline = FewStepPipeline(causal, condition, SETTINGS)
    paths = [tmp_path / "one.mp4", tmp_path / "two.mp4"]
    assert stages.write_videos(pipeline.stream(["a room", "a hall"], pose=POSE), paths, fps=8) == 5
    frames, fps = read_mp4(paths[1])
    assert frames.shape == (5, 3, 32, 48) and fps == 8
    with pytest.raises(ValueError, match="one file per prompt"):
        stages.write_videos(pipeline.stream(["a room", "a hall"], pose=POSE), paths[:1], fps=8)


def test_model_directory_round_trip(tmp_path, causal, condition):
    settings = SETTINGS.override({"window_frames": 4, "intrinsics": [0.6, 0.7, 0.5, 0.5]})
    loading.save(tmp_path / "model", "few_step", causal, condition, settings)
    loaded = loading.load(tmp_path / "model", device="cpu")
    assert type(loaded) is FewStepPipeline and loaded.settings == settings
    video = FewStepPipeline(causal, condition, settings)(PROMPT, pose=POSE)
    assert torch.equal(loaded(PROMPT, pose=POSE), video)
    assert type(loading.load(tmp_path / "model", device="cpu", mode="autoregressive")) is AutoregressivePipeline
    half = loading.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be a torch.dtype, such as torch.bfloat16, got 'bfloat16'"):
        loading.load(tmp_path / "model", device="cpu", dtype="bfloat16")
    assert (half(PROMPT, pose=POSE) - video).abs().mean() < 0.1


def test_a_directory_without_condition_needs_one(tmp_path, causal, condition):
    loading.save(tmp_path / "model", "few_step", causal, condition, SETTINGS)
    path = tmp_path / "model" / "model_index.json"
    index = json.loads(path.read_text())
    del index["condition"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="condition must be given"):
        loading.load(tmp_path / "model", device="cpu")
    for given in (condition, tmp_path / "model" / "condition"):
        assert loading.load(tmp_path / "model", device="cpu", condition=given).condition.latent_channels == 16


def test_a_new_pipeline_class_is_found_by_name(tmp_path, causal, condition, monkeypatch):
    loading.save(tmp_path / "model", "few_step", causal, condition, SETTINGS)
    path = tmp_path / "model" / "model_index.json"
    path.write_text(path.read_text().replace("FewStepPipeline", "OwnPipeline"))
    with pytest.raises(ValueError, match="unknown pipeline class 'OwnPipeline'; known: BidirectionalPipeline, Auto"):
        loading.load(tmp_path / "model")
    monkeypatch.setattr(loading, "PIPELINES", dict(loading.PIPELINES))
    loading.register("OwnPipeline", "dit_ops.pipelines.autoregressive:AutoregressivePipeline")
    assert type(loading.load(tmp_path / "model", device="cpu")) is AutoregressivePipeline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "two experts"),
        ({"boundary_ratio": 0.9}, "two experts"),
    ],
)
def test_wan_22_with_two_experts_is_refused(tmp_path, change, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | change))
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"pose": None}, "pose is needed"),
        ({"pose": POSE, "frames": 6}, r"gives 5 latent frames .*, but 6 are wanted"),
        ({"pose": [POSE, "w*2"], "prompts": ["a", "b"]}, r"gives 3 latent frames .*, but 5 are wanted"),
        ({"pose": [POSE, POSE]}, r"one per prompt \(1\), got 2"),
        ({"pose": []}, "at least one pose string"),
        ({"pose": "w*2,x*2"}, "segment 2"),
        ({"pose": (torch.eye(4).expand(5, 4, 4), torch.eye(3))}, r"Ks \[B, F, 3, 3\]"),
        ({"pose": (torch.eye(4).expand(3, 4, 4), torch.eye(3).expand(3, 3, 3)), "frames": 5}, "has 3 poses, but 5"),
        ({"prompts": []}, "at least one prompt"),
        ({"seed": [1, 2]}, r"one per prompt \(1\), got 2"),
        ({"height": 40}, "height must be a multiple of 16 pixels for this model, got 40"),
        ({"guidance": 3.0}, "guidance must be 1"),
        ({"guidanse": 3.0}, "unknown sampler option 'guidanse'; did you mean guidance?"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"solver": "heun"}, "solver must be one of euler, unipc"),
        ({"window_frames": 2, "sink_frames": 2}, "window_frames must exceed sink_frames"),
    ],
)
def test_errors_name_the_argument(causal, condition, call, message):
    call = {"prompts": PROMPT, "pose": POSE} | call
    with pytest.raises(ValueError, match=message):
        FewStepPipeline(causal, condition, SETTINGS)(**call)


def test_camera_without_a_camera_branch_and_causal_without_blocks(full, condition):
    plain = BidirectionalPipeline(make_backbone(camera=False), condition, SETTINGS)
    with pytest.raises(ValueError, match="no camera branch"):
        plain(PROMPT, pose=POSE)
    assert plain(PROMPT).shape[1] == SETTINGS.frames
    with pytest.raises(ValueError, match="block_frames must be given"):
        AutoregressivePipeline(full, condition, SETTINGS)(PROMPT, pose=POSE)


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold model_index.json"):
        loading.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="_class_name is missing"):
        loading.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FewStepPipeline", "condition": []}')
    with pytest.raises(ValueError, match="mode must be one of"):
        loading.load(tmp_path, mode="fast")
