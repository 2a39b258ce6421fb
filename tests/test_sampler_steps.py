import pytest
import torch
from op_cases import kernel_backends

import dit_ops
from dit_ops.testing import check_backend

SHAPE = (2, 3, 4, 2, 2)  # B, F, Cz, h, w
SIGMAS = {"float": (0.75, 0.5), "per sample": ((2,), (2,)), "per frame": ((2, 3), (2, 3)), "mixed": (0.75, (2, 3))}


def sigma(spec: float | tuple, dtype: torch.dtype = torch.float32) -> float | torch.Tensor:
    return spec if isinstance(spec, float) else torch.rand(spec, dtype=dtype)


def spread(s: float | torch.Tensor) -> float | torch.Tensor:
    return s if isinstance(s, float) else s.view(*s.shape, *[1] * (5 - s.ndim)).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIGMAS)
def test_steps_are_their_formulas(kind, dtype):
    """In fp64, and in low precision to one rounding: everything between is fp32."""
    a, b, c = (torch.randn(SHAPE).to(dtype) for _ in range(3))
    s, s_next = (sigma(spec) for spec in SIGMAS[kind])
    x, y, z, t, u = a.double(), b.double(), c.double(), spread(s), spread(s_next)
    pairs = {
        "add_noise": (dit_ops.add_noise(a, b, s), (1 - t) * x + t * y),
        "flow_to_x0": (dit_ops.flow_to_x0(a, b, s), x - t * y),
        "renoise": (dit_ops.renoise(a, b, c, s, s_next), (1 - u) * (x - t * y) + u * z),
        "guided": (dit_ops.cfg_euler_step(a, b, c, 3.0, s, s_next), x + (u - t) * (z + 3 * (y - z))),
        "unguided": (dit_ops.cfg_euler_step(a, b, None, 3.0, s, s_next), x + (u - t) * y),
    }
    for name, (got, exact) in pairs.items():
        assert got.dtype == dtype and got.shape == SHAPE, name
        rtol = {torch.float64: 1e-12, torch.float32: 0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}[dtype]
        torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-12 if dtype == torch.float64 else 2e-6, msg=name)


def test_ends_are_exact():
    x0, noise = torch.randn(2, *SHAPE)
    assert torch.equal(dit_ops.add_noise(x0, noise, 0.0), x0)
    assert torch.equal(dit_ops.add_noise(x0, noise, torch.ones(2)), noise)
    assert torch.equal(dit_ops.renoise(x0, noise, noise, 0.5, 0.0), dit_ops.flow_to_x0(x0, noise, 0.5))


def test_steps_invert_each_other():
    x0, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    s = torch.rand(2, 3)
    x = dit_ops.add_noise(x0, noise, s)
    torch.testing.assert_close(dit_ops.flow_to_x0(x, noise - x0, s), x0)
    torch.testing.assert_close(dit_ops.cfg_euler_step(x, noise - x0, None, 1.0, s, 0.0), x0)


def test_gradients():
    a, b, c = (torch.randn(2, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(3))
    s = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    for fn in (
        lambda: lambda x, y, z, s: dit_ops.add_noise(x, y, s),
        lambda: lambda x, y, z, s: dit_ops.renoise(x, y, z, s, 0.3),
        lambda: lambda x, y, z, s: dit_ops.cfg_euler_step(x, y, z, 2.0, s, 0.1),
    ):
        assert torch.autograd.gradcheck(fn(), (a, b, c, s))


def test_zero_size_and_other_ranks():
    assert dit_ops.add_noise(torch.randn(2, 0, 4), torch.randn(2, 0, 4), torch.rand(2)).shape == (2, 0, 4)
    x = torch.randn(3)
    torch.testing.assert_close(dit_ops.flow_to_x0(x, x, torch.full((3,), 0.5)), x / 2)


def test_errors_name_argument_expected_and_got():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"add_noise: noise must be \[as x0\] = \[2, 3, 4, 2, 2\], got \[1, 3, 4, 2, 2\]"):
        dit_ops.add_noise(x, x[:1], 0.5)
    with pytest.raises(ValueError, match=r"renoise: sigma_next must be a float, \[B\] or \[B, F\] .* got \[3\]"):
        dit_ops.renoise(x, x, x, 0.5, torch.rand(3))
    with pytest.raises(ValueError, match="flow_to_x0: x must be a floating point tensor"):
        dit_ops.flow_to_x0(x.int(), x, 0.5)


def test_steps_compile_without_graph_break():
    x, y, s = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4), torch.rand(2, 3)
    step = lambda x: dit_ops.cfg_euler_step(dit_ops.renoise(x, y, y, s, 0.25), x, y, 3.0, 0.5, s).sum()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


KERNELS = {
    "add_noise": lambda x, y, z, s, **k: dit_ops.add_noise(x, y, s, **k),
    "flow_to_x0": lambda x, y, z, s, **k: dit_ops.flow_to_x0(x, y, s, **k),
    "renoise": lambda x, y, z, s, **k: dit_ops.renoise(x, y, z, s, 0.25, **k),
    "cfg_euler_step": lambda x, y, z, s, **k: dit_ops.cfg_euler_step(x, y, z, 3.0, s, 0.25, **k),
}


def test_cuda_takes_fp32_latents_with_half_precision_branches_and_no_other_mixture():
    x, y = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    reason = lambda *a: dit_ops.explain(dit_ops.renoise, *a, 0.5, 0.25).refused["cuda"]
    assert "all alike, or fp32 first" not in reason(x, y, y)
    for mixture in ((y, x, x), (x, y, x), (y, y, x), (y, y.half(), y.half())):
        assert "all alike, or fp32 first with alike others, is written" in reason(*mixture)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1000, 1001])
@pytest.mark.parametrize("step", KERNELS)
def test_cuda_kernels_take_fp32_latents_and_rows_of_any_length(step, n, device):
    names = "xy" if step in ("add_noise", "flow_to_x0") else "xyz"
    args = {name: torch.randn(2, 3, n, device=device) for name in names}
    args |= {name: t.bfloat16() for name, t in args.items() if name != "x"}
    for levels in (torch.rand(2, 3, device=device), torch.rand(2, device=device), 0.75):
        fn = lambda backend, z=None, levels=levels, **t: KERNELS[step](z=z, s=levels, **t, backend=backend)
        for backend in kernel_backends(device, "cuda", "triton"):
            check_backend(fn, args, [torch.randn(2, 3, n, device=device)], backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("step", KERNELS)
def test_kernels_on_the_gpu(step, backend, device, monkeypatch):
    """Within rounding with gradients, the same bits twice, one launch, graph capture and a whole compiled graph."""
    kernel_backends(device, backend)
    names = "xys" if step in ("add_noise", "flow_to_x0") else "xyzs"
    tensors = {n: torch.randn(2, 3, 1000, device="cuda").bfloat16() for n in names if n != "s"}
    fn = lambda backend, z=None, **t: KERNELS[step](z=z, **t, backend=backend)
    levels = torch.rand(2, 3, device="cuda")
    check_backend(fn, tensors | {"s": levels}, [torch.randn(2, 3, 1000, device="cuda").bfloat16()], backend)
    call = lambda: fn(backend, s=levels, **tensors)
    want = call()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a launch of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        again = call()
        torch.cuda.synchronize()
    assert torch.equal(again, want)
    launched = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len([name for name in launched if "sampler_step" in name]) == len(launched) == 1, launched
    assert torch.equal(torch.compile(call, fullgraph=True)(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert torch.equal(out, want)
