"""Stock diffusers Wan transformers after `fuse`: the same outputs, and everything around the blocks goes on working."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import toy_wan
from diffusers import (
    AutoencoderKLWan,
    ContextParallelConfig,
    FirstBlockCacheConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch.distributed.fsdp import fully_shard

from dit_ops import fuse, unfuse, use_backend
from dit_ops.backbones import wan_fused
from dit_ops.testing import assert_within_rounding

TINY = toy_wan.TINY | dict(num_layers=3)
IMAGE = dict(image_dim=20, added_kv_proj_dim=48)
CASES = ["t2v", "i2v", "per-token time", "no cross norm"]


def make(case: str = "t2v") -> WanTransformer3DModel:
    """Norm weights, biases and tables differ from their initial ones and zeros, so that a lost one shows."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**TINY, **(IMAGE if case == "i2v" else {}), cross_attn_norm=case != "no cross norm")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 3) + (p.dim() == 1) * 0.5)
    return model.eval()


def inputs(case: str = "t2v", dtype: torch.dtype = torch.float32) -> dict:
    """Two different samples of an odd grid: 3 frames of 3 × 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    time = torch.randint(0, 1000, (2, 45) if case == "per-token time" else (2,), generator=generator)
    tokens = 512 if case == "i2v" else 7
    image = {"encoder_hidden_states_image": randn(2, 5, 20)} if case == "i2v" else {}
    given = {"hidden_states": randn(2, 4, 3, 6, 10), "timestep": time, "encoder_hidden_states": randn(2, tokens, 12)}
    return given | image | {"return_dict": False}


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def gradients(model, case="t2v") -> dict[str, torch.Tensor]:
    model(**inputs(case))[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_stock(case):
    model = make(case)
    with torch.no_grad():
        expected = model(**inputs(case))[0]
    stock_gradients = gradients(copy.deepcopy(model), case)
    assert fuse(model) is model
    with torch.no_grad():
        close(model(**inputs(case))[0], expected)
        with use_backend("reference"):
            close(model(**inputs(case))[0], expected)
    own = gradients(model, case)
    assert own.keys() == stock_gradients.keys()
    for name, expected in stock_gradients.items():
        error = (own[name] - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_no_further_from_fp32_than_stock(case, tmp_path):
    """As loaded by users: norms, tables and the time embedding stay in fp32."""
    make(case).save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    wide = copy.deepcopy(model).float()
    given = inputs(case, torch.bfloat16)
    with torch.no_grad():
        exact = wide(**{k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()})[0]
        plain = model(**given)[0]
        assert_within_rounding(case, fuse(model)(**given)[0], exact.double(), plain, factor=1.2)


@pytest.mark.parametrize("op", ["adaln", "gated_residual", "gated_residual_adaln", "qk_norm_rope", "attention"])
def test_a_bug_in_any_operator_call_shows(op, monkeypatch):
    """Each of the block's operators once without its last tensor or option: none of these tests would pass by chance."""
    model = make()
    with torch.no_grad():
        expected = model(**inputs())[0]
        right = getattr(wan_fused, op)
        wrong = {
            "adaln": lambda x, scale, shift, **o: right(x, scale, None, **o),
            "gated_residual": lambda x, y, gate: right(x, y),
            "gated_residual_adaln": lambda x, y, gate, *rows, weight=None, **o: right(x, y, gate, *rows, **o),
            "qk_norm_rope": lambda q, k, q_weight, k_weight, *a, **o: right(q, k, k_weight, q_weight, *a, **o),
            "attention": lambda q, k, v: right(q, k, v.flip(1)),
        }
        monkeypatch.setattr(wan_fused, op, wrong[op])
        error = (fuse(model)(**inputs())[0] - expected).abs().max()
    assert error > 1e-3


def test_a_block_takes_the_tables_of_a_stock_model():
    """As split by context parallelism: cos and sin come apart, and the tokens are no whole grid."""
    block, x, context, temb = make().blocks[0], torch.randn(2, 20, 48), torch.randn(2, 7, 48), torch.randn(2, 6, 48)
    tables = [t[:, 8:28] for t in make().rope(torch.empty(1, 4, 3, 6, 10))]
    with torch.no_grad():
        expected = block(x, context, temb, tables)
        block = fuse(make()).blocks[0]
        close(block(hidden_states=x, encoder_hidden_states=context, temb=temb, rotary_emb=tables), expected)


# inside diffusers


def test_pipeline():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": make()}
    pipe = WanPipeline(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), **parts)
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.randn(1, 7, 12), "negative_prompt_embeds": torch.randn(1, 7, 12)}
    options = dict(height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent", **embeds)
    run = lambda: pipe(generator=torch.Generator().manual_seed(0), **options).frames
    expected = run()
    fuse(pipe.transformer)
    close(run(), expected)
    with pytest.raises(ValueError, match="got .*WanPipeline with no list of blocks"):
        fuse(pipe)


def test_hooks_of_blocks_attentions_and_projections_run():
    model, seen = fuse(make()), []
    parts = {name: part for name, part in model.named_modules() if not any(s in name for s in (".norm", "norm_out"))}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    with torch.no_grad():
        model(**inputs())
    containers = {"blocks", "condition_embedder.act_fn"} | {n for n in parts if n.endswith((".to_out", ".net"))}
    assert set(parts) - set(seen) <= containers


def test_first_block_cache():
    """Two equal steps: the second reuses what the first one computed, in a fused model as in a stock one."""
    given = inputs()

    def steps(model):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        calls = []
        model.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad(), model.cache_context("cond"):
            outs = [model(**given)[0], model(**given | {"timestep": given["timestep"] - 1})[0]]
        assert len(calls) == 1
        return torch.stack(outs)

    fused = fuse(make())
    close(steps(fused), steps(make()))
    for change in (fuse, unfuse):
        with pytest.raises(ValueError, match="hooks replaced the forward of .*FusedWanTransformerBlock"):
            change(fused)
    fused.disable_cache()
    assert type(unfuse(fused).blocks[0]) is WanTransformerBlock
    with torch.no_grad():
        close(fused(**given)[0], make()(**given)[0], 0)


def test_a_diffusers_without_the_private_registry(monkeypatch):
    def missing(cls):
        raise ValueError("not registered")

    monkeypatch.setattr(TransformerBlockRegistry, "get", missing)
    fuse(make())


def test_a_chosen_attention_backend_stays_in_charge(monkeypatch):
    model, used = make(), []
    dispatch = wan_fused.dispatch_attention_fn
    monkeypatch.setattr(wan_fused, "dispatch_attention_fn", lambda *a, **o: used.append(o["backend"]) or dispatch(*a, **o))
    with torch.no_grad():
        expected = model(**inputs())[0]
        model.set_attention_backend("_native_math")
        close(fuse(model)(**inputs())[0], expected)
        assert used == [AttentionBackendName._NATIVE_MATH] * 6
        model.reset_attention_backend()
        close(model(**inputs())[0], expected)
    assert len(used) == 6


def test_fused_projections():
    model = make("i2v")
    with torch.no_grad():
        expected = model(**inputs("i2v"))[0]
        model.fuse_qkv_projections()
        close(fuse(model)(**inputs("i2v"))[0], expected)


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
    stock, fused = make().requires_grad_(False), fuse(make()).requires_grad_(False)
    for model in (stock, fused):
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected, got = gradients(stock), gradients(fused)
    assert got.keys() == expected.keys() and len(got) == 3 * (2 * 4 + 1) * 2
    for name in expected:
        close(got[name], expected[name])
    fused.save_lora_adapter(tmp_path)
    again = make()
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with torch.no_grad():
        close(again(**inputs())[0], fused(**inputs())[0])
        assert (again(**inputs())[0] - make()(**inputs())[0]).abs().max() > 1e-2


def compiled(case):
    torch.compiler.reset()
    model = fuse(make(case))
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    return model


def test_compile_repeated_blocks():
    case = "per-token time"
    with torch.no_grad():
        close(compiled(case)(**inputs(case))[0], make(case)(**inputs(case))[0])


def test_compile_repeated_blocks_for_training():
    expected, got = gradients(make()), gradients(compiled("t2v"))
    assert got.keys() == expected.keys()
    for name in expected:
        close(got[name], expected[name])


# saving, copying, undoing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_files_are_byte_identical(dtype, tmp_path):
    stock, fused = make("i2v").to(dtype), fuse(make("i2v").to(dtype))
    assert list(stock.state_dict()) == list(fused.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    files = lambda folder: {file.name: file.read_bytes() for file in Path(tmp_path / folder).iterdir()}
    assert len(files("stock")) == 2 and files("stock") == files("fused")


def test_copies_stay_fused():
    model = fuse(make())
    with torch.no_grad():
        expected = model(**inputs())[0]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin.blocks[0]) is wan_fused.FusedWanTransformerBlock
            close(twin(**inputs())[0], expected, 0)


def test_unfuse_restores_and_both_may_be_repeated():
    model = make()
    classes = lambda: [type(part) for part in model.modules()] + [type(p) for p in model.attn_processors.values()]
    stock, fused = classes(), None
    with torch.no_grad():
        expected = model(**inputs())[0]
        for _ in range(2):
            fuse(model)
            assert fused in (None, classes())
            fused = classes()
        assert sum(a is not b for a, b in zip(stock, fused, strict=True)) == 3 + 1 + 6  # blocks, position tables, processors
        assert type(model.blocks[0]).__name__ == "WanTransformerBlock"
        for _ in range(2):
            assert unfuse(model) is model and classes() == stock
        close(model(**inputs())[0], expected, 0)


# refusals


def test_other_models_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"consist of diffusers\S+\.WanTransformerBlock or .*, got \S+\.Linear with no list of blocks"
    ):
        fuse(torch.nn.Linear(2, 2))
    vace = WanVACETransformer3DModel(**TINY, vace_layers=[0], vace_in_channels=4)
    classes = [type(part) for part in vace.modules()]
    for change in (fuse, unfuse):
        with pytest.raises(ValueError, match=r"got \S+\.WanVACETransformer3DModel with blocks of \S+\.WanVACETransformerBlock"):
            change(vace)
    assert [type(part) for part in vace.modules()] == classes


def test_a_foreign_attention_processor_is_refused_before_anything_changes():
    class Mine(WanAttnProcessor):
        pass

    model = make()
    model.blocks[2].attn2.set_processor(Mine())
    with pytest.raises(ValueError, match=r"attention processors must be \S+\.WanAttnProcessor, got \S+\.Mine"):
        fuse(model)
    assert type(model.blocks[0]) is WanTransformerBlock


@pytest.mark.parametrize("norm", ["norm2", "attn1.norm_q"])
def test_offloaded_norm_weights_are_refused(norm):
    model = fuse(make())
    model.blocks[1].get_submodule(norm).to("meta")
    with pytest.raises(ValueError, match="norm weights on cpu, got meta"):
        model(**inputs())


# several processes


def on_a_rank(rank, ranks):
    """What FSDP2 and, in another model, diffusers' own context parallelism give: outputs, gradients."""
    model = fuse(make())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert type(model.blocks[0]).__name__ == "FSDPWanTransformerBlock"
    with pytest.raises(ValueError, match="FSDPWanTransformerBlock"):
        unfuse(model)
    out = model(**inputs())[0]
    out.square().mean().backward()
    got = {"out": out.detach()} | {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}

    split = fuse(make())
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators and starts on no CPU otherwise
    split.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    with torch.no_grad():
        return got | {"ulysses": split(**even_inputs())[0]}


def even_inputs() -> dict:
    """3 frames of 3 × 4 tokens: 18 for each of two ranks, in the middle of a frame."""
    given = inputs()
    return given | {"hidden_states": given["hidden_states"][..., :8]}


@pytest.mark.dist
def test_two_ranks_are_the_single_process(run_ranks):
    model = make()
    with torch.no_grad():
        expected = {"out": model(**inputs())[0], "ulysses": model(**even_inputs())[0]}
    expected |= gradients(model)
    for got in run_ranks(on_a_rank, 2):
        assert got.keys() == expected.keys()
        for name in expected:
            close(got[name], expected[name])
