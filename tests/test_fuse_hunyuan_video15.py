"""Stock diffusers HunyuanVideo 1.5 transformers after `fuse`: the same outputs, and everything around the blocks goes on."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import toy_hunyuan_video15
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers import transformer_hunyuan_video15 as stock
from torch.distributed.fsdp import fully_shard

from dit_ops import fuse, unfuse, use_backend
from dit_ops.backbones import hunyuan_video15_block, hunyuan_video15_fused
from dit_ops.testing import assert_within_rounding

TINY = toy_hunyuan_video15.TINY | toy_hunyuan_video15.CONDITIONED | dict(num_layers=3)


def make(**config) -> HunyuanVideo15Transformer3DModel:
    """Norm weights, biases and tables differ from their initial ones and zeros, so that a lost one shows."""
    torch.manual_seed(0)
    model = HunyuanVideo15Transformer3DModel(**TINY | config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 3) + (p.dim() == 1) * 0.5)
    return model.eval()


def inputs(B: int = 1, dtype: torch.dtype = torch.float32, image: bool = True) -> dict:
    """3 frames of 3 × 5 tokens; every sample has padding, and in a batch the texts differ in length."""
    g = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    llm = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0]])[:B]
    byt5 = torch.tensor([[1, 1, 0], [0, 0, 0]])[:B]
    return {
        "hidden_states": randn(B, 9, 3, 3, 5),
        "timestep": torch.tensor([811.0, 250.0])[:B].to(dtype),
        "encoder_hidden_states": randn(B, 7, 12),
        "encoder_attention_mask": llm,
        "encoder_hidden_states_2": randn(B, 3, 10),
        "encoder_attention_mask_2": byt5,
        "image_embeds": randn(B, 2, 8) * image,
        "return_dict": False,
    }


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def gradients(model, **given) -> dict[str, torch.Tensor]:
    model(**inputs(**given))[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("given", [dict(), dict(image=False), dict(B=2)], ids=["image", "text only", "two lengths"])
def test_outputs_and_gradients_are_stock(given):
    model = make()
    with torch.no_grad():
        expected = model(**inputs(**given))[0]
    stock_gradients = gradients(copy.deepcopy(model), **given)
    assert fuse(model) is model
    with torch.no_grad():
        close(model(**inputs(**given))[0], expected)
        with use_backend("reference"):
            close(model(**inputs(**given))[0], expected)
    own = gradients(model, **given)
    for name, expected in stock_gradients.items():
        error = (own.get(name, torch.zeros(())) - expected).norm()
        assert error < 1e-4 * expected.norm().clamp_min(1e-3), f"{name}: error {error:.1e}"


def test_meanflow_models_and_patches():
    model = make(use_meanflow=True, patch_size=3, out_channels=2)
    given = inputs() | {"timestep_r": torch.tensor([400.0]), "hidden_states": torch.randn(1, 9, 2, 6, 9)}
    with torch.no_grad():
        close(fuse(copy.deepcopy(model))(**given)[0], model(**given)[0])
        assert fuse(model)(**given | {"return_dict": True}).sample.shape == (1, 2, 2, 6, 9)


def test_bf16_is_no_further_from_fp32_than_stock():
    model = make().bfloat16()
    wide, given = copy.deepcopy(model).float(), inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        exact = wide(**{k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()})[0]
        plain = model(**given)[0]
        assert_within_rounding("bf16", fuse(model)(**given)[0], exact.double(), plain, factor=1.2)


@pytest.mark.parametrize("op", ["adaln", "gated_residual", "gated_residual_adaln", "qk_norm_rope", "attention"])
def test_a_bug_in_any_operator_call_shows(op, monkeypatch):
    """Each of the block's operators once without its last tensor or option: none of these tests would pass by chance."""
    model = make()
    with torch.no_grad():
        expected = model(**inputs())[0]
        module = hunyuan_video15_fused if hasattr(hunyuan_video15_fused, op) else hunyuan_video15_block
        right = getattr(module, op)
        wrong = {
            "adaln": lambda x, scale, shift, **o: right(x, scale, None, **o),
            "gated_residual": lambda x, y, gate: right(x, y),
            "gated_residual_adaln": lambda x, y, gate, scale, shift, **o: right(x, y, gate, scale, None, **o),
            "qk_norm_rope": lambda q, k, q_weight, k_weight, *a, **o: right(q, k, k_weight, q_weight, *a, **o),
            "attention": lambda q, k, v, mask: right(q, k, v.flip(1), mask),
        }
        monkeypatch.setattr(module, op, wrong[op])
        error = (fuse(model)(**inputs())[0] - expected).abs().max()
    assert error > 1e-3


def test_no_block_ever_sees_padding_or_a_square_mask(monkeypatch):
    """One sample: its text is packed, so attention has no mask at all; two lengths: intervals, not a matrix."""
    seen, right = [], hunyuan_video15_fused.attention
    monkeypatch.setattr(
        hunyuan_video15_fused, "attention", lambda q, k, v, mask: seen.append((q.shape, mask)) or right(q, k, v, mask)
    )
    model = fuse(make())
    with torch.no_grad():
        model(**inputs())
        assert [(shape[1], mask) for shape, mask in seen] == [(45 + 2 + 2 + 4, None)] * 3
        model(**inputs(image=False))
        assert [shape[1] for shape, _ in seen[3:]] == [45 + 2 + 4] * 3


# inside diffusers


def test_pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    scheduler, guider = FlowMatchEulerDiscreteScheduler(shift=5.0), ClassifierFreeGuidance(guidance_scale=2.0)
    text = {name: None for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    pipe = HunyuanVideo15Pipeline(vae=vae, scheduler=scheduler, guider=guider, transformer=make(), **text)
    pipe.vision_num_semantic_tokens = 3
    pipe.set_progress_bar_config(disable=True)
    given, other = inputs(), inputs(image=False)
    embeds = {
        f"{sign}prompt_embeds{kind}{second}": source[f"encoder_{'attention_mask' if kind else 'hidden_states'}{second}"]
        for sign, source in (("", given), ("negative_", other))
        for kind in ("", "_mask")
        for second in ("", "_2")
    }
    options = dict(height=48, width=80, num_frames=9, num_inference_steps=2, output_type="latent", **embeds)
    run = lambda: pipe(generator=torch.Generator().manual_seed(0), **options).frames
    expected = run()
    fuse(pipe.transformer)
    close(run(), expected)


def test_hooks_of_blocks_attentions_and_projections_run():
    model, seen = fuse(make()), []
    parts = {name: part for name, part in model.named_modules() if not (".norm" in name and "linear" not in name)}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    with torch.no_grad():
        model(**inputs())
    containers = {"transformer_blocks", "context_embedder.token_refiner.refiner_blocks"}
    containers |= {name for name in parts if name.endswith((".to_out", ".net"))}
    assert set(parts) - set(seen) <= containers


def test_a_chosen_attention_backend_stays_in_charge(monkeypatch):
    model, used = make(), []
    dispatch = hunyuan_video15_fused.dispatch_attention_fn
    spy = lambda *a, **o: used.append((o["backend"], o["attn_mask"])) or dispatch(*a, **o)
    monkeypatch.setattr(hunyuan_video15_fused, "dispatch_attention_fn", spy)
    with torch.no_grad():
        expected = model(**inputs(B=2))[0]
        model.set_attention_backend("_native_math")
        close(fuse(model)(**inputs(B=2))[0], expected)
    assert [name for name, _ in used] == [AttentionBackendName._NATIVE_MATH] * 3
    assert {tuple(mask.shape) for _, mask in used} == {(2, 1, 1, 45 + 8)}


def test_gradient_checkpointing():
    model = fuse(make()).train()
    expected = gradients(copy.deepcopy(model))
    model.enable_gradient_checkpointing()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name], 0)


def test_lora_trains_and_its_file_loads_into_a_stock_model(tmp_path):
    peft = pytest.importorskip("peft")
    models = make().requires_grad_(False), fuse(make()).requires_grad_(False)
    for model in models:
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "ff.net.2"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected, got = (gradients(model) for model in models)
    for name in expected:
        close(got[name], expected[name])
    fused, again = models[1], make()
    fused.save_lora_adapter(tmp_path)
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with torch.no_grad():
        close(again(**inputs())[0], fused(**inputs())[0])
        assert (again(**inputs())[0] - make()(**inputs())[0]).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
def test_compile_repeated_blocks(training):
    torch.compiler.reset()
    model = fuse(make(num_layers=2))
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    if training:
        expected, got = gradients(make(num_layers=2)), gradients(model)
        for name in expected:
            close(got[name], expected[name], 1e-4 * expected[name].abs().max().item() + 1e-7)
    else:
        with torch.no_grad():
            close(model(**inputs())[0], make(num_layers=2)(**inputs())[0])


# saving, copying, undoing


def test_saved_files_are_byte_identical(tmp_path):
    plain, fused = make(), fuse(make())
    assert list(plain.state_dict()) == list(fused.state_dict())
    plain.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    files = lambda folder: {file.name: file.read_bytes() for file in Path(tmp_path / folder).iterdir()}
    assert len(files("stock")) == 2 and files("stock") == files("fused")


def test_copies_stay_fused_and_unfuse_restores():
    model = make()
    classes = lambda: [type(part) for part in model.modules()] + [type(p) for p in model.attn_processors.values()]
    before = classes()
    with torch.no_grad():
        expected = model(**inputs())[0]
        for _ in range(2):
            fuse(model)
        fused = model(**inputs())[0]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin.transformer_blocks[0]) is hunyuan_video15_fused.FusedHunyuanVideo15TransformerBlock
            close(twin(**inputs())[0], fused, 0)
        assert (
            sum(a is not b for a, b in zip(before, classes(), strict=True)) == 1 + 3 + 1 + 3
        )  # model, blocks, rope, processors
        assert type(model).__name__ == "HunyuanVideo15Transformer3DModel"
        assert unfuse(model) is model and classes() == before
        close(model(**inputs())[0], expected, 0)


def test_what_cannot_be_fused_is_named():
    class Mine(stock.HunyuanVideo15AttnProcessor2_0):
        pass

    model = make()
    model.transformer_blocks[2].attn.set_processor(Mine())
    with pytest.raises(ValueError, match=r"attention processors must be \S+\.HunyuanVideo15AttnProcessor2_0, got \S+\.Mine"):
        fuse(model)
    assert type(model) is HunyuanVideo15Transformer3DModel
    model = fuse(make())
    model.transformer_blocks[1].attn.norm_q.to("meta")
    with pytest.raises(ValueError, match="norm weights on cpu, got meta"):
        model(**inputs())


def on_a_rank(rank, ranks):
    model = fuse(make())
    for block in model.transformer_blocks:
        fully_shard(block)
    fully_shard(model)
    out = model(**inputs())[0]
    out.square().mean().backward()
    return {"out": out.detach()} | {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.dist
def test_sharded_over_two_ranks_is_the_single_process(run_ranks):
    model = fuse(make())
    with torch.no_grad():
        expected = {"out": model(**inputs())[0]}
    expected |= gradients(model)
    for got in run_ranks(on_a_rank, 2):
        for name in expected:
            close(got[name], expected[name])
