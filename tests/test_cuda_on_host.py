"""The CUDA device code, compiled for the host with one thread to a block: formulas, tables, strides, chunks, roundings."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dit_ops
from dit_ops.ops.adaln import table_gradients
from dit_ops.testing import assert_within_rounding, run_with_grads

ROOT = Path(__file__).resolve().parents[1]
STEPS = {  # as in csrc/sampler_steps.h: the call with x, y, z, and which of them it has
    "add_noise": (lambda x, y, z, s, t: dit_ops.add_noise(x, y, s, backend="reference"), "xy"),
    "flow_to_x0": (lambda x, y, z, s, t: dit_ops.flow_to_x0(x, y, s, backend="reference"), "xy"),
    "renoise": (lambda x, y, z, s, t: dit_ops.renoise(x, y, z, s, t, backend="reference"), "xyz"),
    "cfg_euler_step": (lambda x, y, z, s, t: dit_ops.cfg_euler_step(x, y, z, 3.0, s, t, backend="reference"), "xyz"),
    "unguided": (lambda x, y, z, s, t: dit_ops.cfg_euler_step(x, y, None, 1.0, s, t, backend="reference"), "xy"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for header in ("cuda_runtime", "cuda_runtime_api", "cuda_bf16", "cuda_fp16"):
        (folder / f"{header}.h").touch()
    source, library = ROOT / "tests/cuda_on_host.cpp", folder / "host.so"
    flags = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def numbers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("absent", [(), ("gate",), ("scale",), ("shift",), ("weight", "bias")], ids="-".join)
@pytest.mark.parametrize("summed", [False, True], ids=["adaln", "gated_residual_adaln"])
def test_adaln_kernels(host, summed, absent, norm, dtype):
    """Rows that fill three of four vectors, modulation cut out of a packed table, chunks of 2 of 5 tokens."""
    B, F, group, C, tokens = 2, 3, 5, 3 * 16 // dtype.itemsize, 2
    L, chunks = F * group, -(-group // tokens)
    packed = torch.randn(B, F, 3, C)
    tables = dict(zip(("gate", "scale", "shift"), packed.unbind(2), strict=True))
    tables |= {"weight": 1 + 0.1 * torch.randn(C), "bias": torch.randn(C)}
    tables |= {name: None for name in absent}
    branches = {name: torch.randn(B, L, C).to(dtype) for name in ("x", "y")}
    op = dit_ops.gated_residual_adaln if summed else dit_ops.adaln
    args = {n: t for n, t in (branches | tables).items() if summed or n not in ("y", "gate")}
    cotangents = [torch.randn(B, L, C).to(dtype) for _ in range(1 + summed)]

    x, y, gate, scale, shift, weight, bias = (branches | tables).values()
    x_new, h, dx, dy = (torch.full_like(x, torch.nan) for _ in range(4))
    mean, rstd = torch.full((2, B, L), torch.nan)
    sums = torch.full((3, B, F, chunks, C), torch.nan)
    head = summed, dtype == torch.bfloat16, numbers(B, L, group, C), numbers(*packed.stride()[:2] * 3)
    host.adaln_forward_on_host(
        *head, *map(pointer, (x, y, gate, scale, shift, weight, bias, x_new, h, mean, rstd)), norm == "rms"
    )
    x_norm = x_new if summed else x
    if summed:  # the norm sees x' as it was rounded
        again, alone = torch.empty_like(mean), torch.empty_like(h)
        inputs = map(pointer, (x_new, y, gate, scale, shift, weight, bias, None, alone, again, again))
        host.adaln_forward_on_host(False, *head[1:], *inputs, norm == "rms")
        assert torch.equal(h, alone)
    dx_new, dh = cotangents[0], cotangents[-1]
    inputs = map(pointer, (dx_new, dh, x_norm, y, gate, scale, weight, mean, rstd, dx, dy, *sums))
    host.adaln_backward_on_host(*head, chunks, tokens, *inputs, norm == "rms")

    dgate, dh_xhat, dh_sum = sums.sum(3)
    needed = tuple(tables[n] is not None for n in ("scale", "shift", "weight", "bias"))
    grads = table_gradients(needed, dh_xhat, dh_sum, scale, weight, bias, torch.float32)
    got = ({"y0": x_new, "y1": h} if summed else {"y0": h}) | {"dx": dx}
    got |= {"dy": dx if gate is None else dy, "dgate": dgate}
    got |= dict(zip(("dscale", "dshift", "dweight", "dbias"), grads, strict=True))
    wide = {n: None if t is None else t.double() for n, t in args.items()}
    exact = run_with_grads(op, wide, [c.double() for c in cotangents], backend="reference", norm=norm)
    plain = run_with_grads(op, args, cotangents, backend="reference", norm=norm)
    for name in exact:
        assert_within_rounding(name, got[name], exact[name], plain[name])


@pytest.mark.parametrize("n", [2064, 1031], ids=["aligned", "one value a thread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_sampler_kernels(host, step, dtype, n):
    """fp32 latents, branches in dtype; sigma per sample or per frame, sigma_next per frame or a number."""
    call, names = STEPS[step]
    number = min([*STEPS].index(step), 3)
    for s, t in ((torch.rand(2), torch.rand(2, 3)), (torch.rand(2, 3), 0.25)):
        args = {name: torch.randn(2, 3, n).to(torch.float32 if name == "x" else dtype) for name in names}
        fn = lambda backend, z=None, *, x, y, s=s, t=t: call(x, y, z, s, t)
        dout = torch.randn(2, 3, n)
        exact = run_with_grads(fn, {k: v.double() for k, v in args.items()}, [dout.double()], backend="")
        plain = run_with_grads(fn, args, [dout], backend="")
        levels = [pointer(v) if isinstance(v, Tensor) else pointer(None) for v in (s, t)]
        levels += [ctypes.c_float(0.0 if isinstance(v, Tensor) else v) for v in (s, t)]
        levels += [6 // v.numel() if isinstance(v, Tensor) else 1 for v in (s, t)]
        shape = ctypes.c_float(3.0), 6, ctypes.c_int64(n), n % 8 == 0
        half, index = dtype == torch.bfloat16, ctypes.c_int64(number)
        got = {"y0": torch.full_like(args["x"], torch.nan)}
        operands = map(pointer, (args["x"], args["y"], args.get("z"), got["y0"]))
        host.sampler_forward_on_host(index, half, *operands, *levels, *shape)
        for name in names:
            wide = name == "x" or not half
            grad = got[f"d{name}"] = torch.full_like(args[name], torch.nan)
            guidance = shape if "z" in names else (ctypes.c_float(1.0), *shape[1:])
            of = ctypes.c_char(name.encode())
            host.sampler_backward_on_host(index, of, not wide, pointer(dout), pointer(grad), *levels, *guidance)
        for name in exact:
            assert_within_rounding(f"{step} {name}", got[name], exact[name], plain[name])
