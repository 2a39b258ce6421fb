"""RMS norm of queries and keys, then 3D rotary position embedding."""

import torch
import torch.nn.functional as tf
from torch import Tensor

from dit_ops import _library as lib
from dit_ops.ops.adaln import cpu_refuses, kernel_tables
from dit_ops.ops.prope_output import project_ref

Rope = tuple[Tensor, Tensor, Tensor]
Grid = tuple[int, int, int]


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    *,
    eps: float = 1e-6,
    start_frame: int = 0,
    halves: int = 1,
    v: Tensor | None = None,
    k_out: Tensor | None = None,
    v_out: Tensor | None = None,
    turn_keys: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """rope(q / rms(q) * q_weight), the same for k; computed in fp32; differentiable in every tensor.

    q, k: [B, L, N, D], any strides, L = halves * F * H * W    grid: (F, H, W); both halves have the same positions
    q_weight, k_weight: [N * D] (rms over all channels), [D] (rms per head) or None (no norm)
    rope: three tables (frame, height, width) [positions, D_axis / 2, 2] of (cos, sin) for the pairs (2i, 2i + 1) of the head,
    axes in this order; the frame position is start_frame + frame    returns q, k in their dtype, contiguous
    k_out: [B, L, N, D] view, such as the slots of a ring cache, to write k into; with v and v_out the same launch copies v
    into v_out; without gradient    turn_keys: False writes k normed, not turned
    """
    op = "qk_norm_rope"
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    check_heads(op, named, {"q_weight": q_weight, "k_weight": k_weight}, rope, grid, start_frame, halves)
    if v is not None and k_out is None:
        raise ValueError(f"{op}: v is only copied beside the keys, to v_out, and needs k_out, got None")
    check_outputs(op, k, v, k_out, v_out, 1, (q, k, v, q_weight, k_weight))
    backend = lib.choose(op, backend, REFUSES, q, k, *rope)
    if k_out is not None:
        rest = (rope, grid, None, None, k_out, v_out, eps, start_frame, halves, turn_keys)
        return write_into(backend, q, k, v, q_weight, k_weight, *rest), k_out
    if not turn_keys:
        raise ValueError(f"{op}: turn_keys = False needs k_out, got None")
    if backend == "reference":
        return qk_norm_rope_ref(q, k, q_weight, k_weight, rope, grid, eps, start_frame, halves)
    tables = kernel_tables(backend, q, q_weight, k_weight, *(t.contiguous() for t in rope))
    heads = (kernel_heads(backend, t) for t in (q, k))
    q_out, k_out, _, _ = _qk_norm_rope(*heads, *tables, *grid, eps, start_frame, backend)
    return q_out, k_out


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    eps: float,
    start_frame: int,
    halves: int,
) -> tuple[Tensor, Tensor]:
    factors = rope_factors_ref(rope, grid, start_frame, halves, torch.promote_types(q.dtype, torch.float32))
    q_out = rotate_ref(rms_norm_ref(q, q_weight, eps), factors).to(q.dtype)
    k_out = rotate_ref(rms_norm_ref(k, k_weight, eps), factors).to(k.dtype)
    return q_out, k_out


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight in fp32 (fp64 for fp64); weight None: x itself, widened."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is None:
        return wide
    channels = wide if weight.shape[0] == x.shape[-1] else wide.flatten(-2)
    return tf.rms_norm(channels, weight.shape, weight.to(wide.dtype), eps).view(x.shape)


def rope_factors_ref(rope: Rope, grid: Grid, start_frame: int, halves: int, dtype: torch.dtype) -> Tensor:
    """[2, L, 1, D]: the pair (a, b) at angle t turns into (a, b) * (cos t, cos t) + (b, a) * (-sin t, sin t)."""
    axes = []
    for axis, (table, start, n) in enumerate(zip(rope, (start_frame, 0, 0), grid, strict=True)):
        cos, sin = table[start : start + n].to(dtype).unbind(-1)  # [n, D_axis / 2]
        factors = torch.stack((torch.stack((cos, cos), -1), torch.stack((-sin, sin), -1))).flatten(-2)  # [2, n, D_axis]
        shape = [2, 1, 1, 1, factors.shape[-1]]
        shape[1 + axis] = n
        axes.append(factors.view(shape).expand(2, *grid, -1))
    factors = torch.cat(axes, -1).flatten(1, 3)
    return (factors if halves == 1 else factors.repeat(1, halves, 1))[:, :, None]


def rotate_ref(x: Tensor, factors: Tensor) -> Tensor:
    """x: [B, L, N, D]    factors: [2, L, 1, D]"""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * factors[0], swapped, factors[1])


def write_into(
    backend: str,
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    P: Tensor | None,
    P_inv: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
    eps: float,
    start_frame: int,
    halves: int,
    turn_keys: bool,
) -> Tensor:
    """Writes keys to k_out and values to v_out, of one path (N heads) or with cameras of two (2N); returns the queries.

    turn_keys False: one path of normed, unturned keys and plain values. q None: keys and values only, returns an empty tensor.
    """
    if backend == "reference":
        return into_ref(q, k, v, q_weight, k_weight, rope, grid, P, P_inv, k_out, v_out, eps, start_frame, halves, turn_keys)
    q, v = (None if t is None else kernel_heads(backend, t) for t in (q, v))
    k = kernel_heads(backend, k)
    cameras = (None if M is None else M.float() for M in (P, P_inv))
    tables = kernel_tables(backend, k, q_weight, k_weight, *(t.contiguous() for t in rope), *cameras)
    k_to, v_to = (None if t is None else kernel_output(backend, t) for t in (k_out, v_out))
    q_out = _into(q, k, v, *tables, k_to, v_to, *grid, eps, start_frame, turn_keys, backend)
    for out, to in ((k_out, k_to), (v_out, v_to)):
        if out is not None and to is not None and out is not to:
            out.copy_(to)
    return q_out


def into_ref(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Rope,
    grid: Grid,
    P: Tensor | None,
    P_inv: Tensor | None,
    k_out: Tensor,
    v_out: Tensor | None,
    eps: float,
    start_frame: int,
    halves: int,
    turn_keys: bool,
) -> Tensor:
    factors = rope_factors_ref(rope, grid, start_frame, halves, torch.promote_types(k.dtype, torch.float32))

    def paths(first: Tensor, x: Tensor, M: Tensor | None) -> Tensor:
        return first if M is None else torch.cat((first, project_ref(x, M, halves).to(first.dtype)), 2)

    kn = rms_norm_ref(k, k_weight, eps)
    k_out.copy_(paths(rotate_ref(kn, factors), kn, P_inv) if turn_keys else kn)
    if v is not None and v_out is not None:
        v_out.copy_(paths(v, v, P_inv) if turn_keys else v)
    if q is None:
        return k.new_empty(0)
    qn = rms_norm_ref(q, q_weight, eps)
    return paths(rotate_ref(qn, factors), qn, None if P is None else P.mT).to(q.dtype)


def check_outputs(
    op: str,
    k: Tensor,
    v: Tensor | None,
    k_out: Tensor | None,
    v_out: Tensor | None,
    paths: int,
    inputs: tuple[Tensor | None, ...],
) -> None:
    """The views to write keys and values into, heads [0, N) of one path or [0, 2N) of two."""
    if k_out is None:
        if v_out is not None:
            raise ValueError(f"{op}: v_out needs k_out, got only v_out")
        return
    if (v is None) != (v_out is None):
        raise ValueError(f"{op}: v and v_out come together with k_out, got only {'v_out' if v is None else 'v'}")
    B, L, N, D = k.shape
    for name, out, source in (("k_out", k_out, k), ("v_out", v_out, v)):
        if out is None or source is None:
            continue
        lib.check_shape(op, name, out, f"B, L, {paths if paths > 1 else ''}N, D", (B, L, paths * N, D))
        if out.dtype != source.dtype or out.stride(-1) != 1:
            raise ValueError(f"{op}: {name} must be {source.dtype} with unit stride over D, got {out.dtype}, {out.stride()}")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, out)):
            raise ValueError(f"{op}: k_out and v_out are written without gradient, got a tensor that requires it")


def kernel_output(backend: str, out: Tensor) -> Tensor:
    """The view itself where the kernel can write it; a tensor to copy from where not."""
    in_place = out.stride(-1) == 1 and (backend != "cpu" or out.stride(-2) == out.shape[-1])
    return out if in_place else out.new_empty(out.shape)


def check_heads(
    op: str,
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor | None],
    rope: Rope,
    grid: Grid,
    start_frame: int,
    halves: int,
) -> None:
    first, q = next(iter(tensors.items()))
    lib.check_tensor(op, first, q, "B, L, N, D")
    B, L, N, D = q.shape
    for name, t in tensors.items():
        lib.check_shape(op, name, t, "B, L, N, D", (B, L, N, D))
    if D % 2:
        raise ValueError(f"{op}: the head size D of {first} must be even, got {D}")
    frames, height, width = grid
    if halves not in (1, 2):
        raise ValueError(f"{op}: halves must be 1 or 2, got {halves}")
    tokens = halves * frames * height * width
    if tokens != L:
        raise ValueError(f"{op}: the L of {first} must be halves * F * H * W = {tokens}, got {L}")
    for name, weight in weights.items():
        if weight is not None and tuple(weight.shape) not in ((N * D,), (D,)):
            raise ValueError(f"{op}: {name} must be [N * D] = [{N * D}], [D] = [{D}] or None, got {list(weight.shape)}")
    if start_frame < 0:
        raise ValueError(f"{op}: start_frame must be at least 0, got {start_frame}")
    if len(rope) != 3 or any(t.ndim != 3 or t.shape[-1] != 2 for t in rope) or 2 * sum(t.shape[1] for t in rope) != D:
        shapes = [list(t.shape) for t in rope]
        raise ValueError(f"{op}: rope must be three tables [positions, D_axis / 2, 2], D_axis summing to D = {D}, got {shapes}")
    for axis, table, positions in zip(("frame", "height", "width"), rope, (start_frame + frames, height, width), strict=True):
        if table.shape[0] < positions:
            raise ValueError(f"{op}: rope's {axis} table must have at least {positions} positions, got {table.shape[0]}")


def kernel_heads(backend: str, x: Tensor) -> Tensor:
    """As the kernels read it: unit stride inside a head, tokens at any stride; for cpu the heads of a token side by side."""
    in_place = x.stride(-1) == 1 and (backend != "cpu" or x.stride(-2) == x.shape[-1])
    return x if in_place else x.contiguous()


def heads_refuse(*tensors: Tensor) -> str | None:
    """What the Triton kernels of queries, keys and values cannot take."""
    N, D = tensors[0].shape[-2:]
    width = (1 << (N - 1).bit_length()) * (1 << (D - 1).bit_length())
    if width > 8192:
        return f"N = {N}, D = {D}: a token, both rounded up to powers of two, must fit in registers, at most 8192 values"
    return next(filter(None, (lib.refuses("triton", t) for t in tensors)), None)


def _triton_refuses(q: Tensor, k: Tensor, *rope: Tensor) -> str | None:
    return heads_refuse(q, k) or needs_gradient(*rope)


def _cpu_refuses(q: Tensor, k: Tensor, *rope: Tensor) -> str | None:
    return cpu_refuses(q, k) or needs_gradient(*rope)


def needs_gradient(*constants: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in constants):
        return "gradients of rope, P and P_inv are written in the reference only"
    return None


REFUSES = {"triton": _triton_refuses, "cpu": _cpu_refuses}


def _fwd(q, k, q_weight, k_weight, rope_t, rope_h, rope_w, F, H, W, eps, start_frame, backend):
    if q.numel() == 0:
        return _fwd_fake(q, k, q_weight, k_weight, rope_t, rope_h, rope_w, F, H, W, eps, start_frame, backend)
    launch = lib.kernel(backend, "qk_norm_rope", "qk_norm_rope_fwd")
    return launch(q, k, q_weight, k_weight, rope_t, rope_h, rope_w, F, H, W, eps, start_frame)


def _fwd_fake(q, k, q_weight, k_weight, rope_t, rope_h, rope_w, F, H, W, eps, start_frame, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), rstd_fake(q, q_weight), rstd_fake(k, k_weight)


def rstd_fake(x: Tensor, weight: Tensor | None) -> Tensor:
    means = 0 if weight is None else x.shape[2] * x.shape[3] // weight.shape[0]
    return x.new_empty(*x.shape[:2], means, dtype=torch.float32)


def dweight_fake(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32)


def _bwd(dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, F, H, W, start_frame, backend):
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), dweight_fake(q, q_weight).zero_(), dweight_fake(k, k_weight).zero_()
    launch = lib.kernel(backend, "qk_norm_rope", "qk_norm_rope_bwd")
    return launch(dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, F, H, W, start_frame)


def _bwd_fake(dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, rope_t, rope_h, rope_w, F, H, W, start_frame, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), dweight_fake(q, q_weight), dweight_fake(k, k_weight)


def _into_fwd(
    q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, k_out, v_out, F, H, W, eps, start_frame, turn_keys, backend
):
    args = (q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, k_out, v_out, F, H, W, eps, start_frame, turn_keys)
    if k.numel() == 0:
        return _into_fake(*args, backend)
    return lib.kernel(backend, "qk_norm_rope", "qk_norm_rope_into_fwd")(*args)


def _into_fake(
    q, k, v, q_weight, k_weight, rope_t, rope_h, rope_w, P, P_inv, k_out, v_out, F, H, W, eps, start_frame, turn_keys, backend
):
    if q is None:
        return k.new_empty(0)
    B, L, N, D = q.shape
    return q.new_empty(B, L, N if P is None else 2 * N, D)


_qk_norm_rope = lib.define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h, Tensor rope_w,"
    " SymInt F, SymInt H, SymInt W, float eps, SymInt start_frame, str backend)"
    " -> (Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)",
    _fwd,
    _fwd_fake,
)
_into = lib.define(
    "qk_norm_rope_into(Tensor? q, Tensor k, Tensor? v, Tensor? q_weight, Tensor? k_weight, Tensor rope_t, Tensor rope_h,"
    " Tensor rope_w, Tensor? P, Tensor? P_inv, Tensor(a!) k_out, Tensor(b!)? v_out, SymInt F, SymInt H, SymInt W, float eps,"
    " SymInt start_frame, bool turn_keys, str backend) -> Tensor q_out",
    _into_fwd,
    _into_fake,
)
_qk_norm_rope_bwd = lib.define(
    "qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor q_rstd,"
    " Tensor k_rstd, Tensor rope_t, Tensor rope_h, Tensor rope_w, SymInt F, SymInt H, SymInt W, SymInt start_frame,"
    " str backend) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, k_weight, *rope, F, H, W, _, start_frame, backend = inputs
    ctx.rest = (F, H, W, start_frame, backend)
    ctx.save_for_backward(q, k, q_weight, k_weight, *output[2:], *rope)


def _backward(ctx, dq_out, dk_out, _dq_rstd, _dk_rstd):
    q, k, q_weight, k_weight, *rest = ctx.saved_tensors
    grads = _qk_norm_rope_bwd(dq_out.contiguous(), dk_out.contiguous(), q, k, q_weight, k_weight, *rest, *ctx.rest)
    dq, dk, *dweights = grads
    return dq, dk, *weight_gradients((q_weight, k_weight), dweights), *[None] * 9


def weight_gradients(weights: tuple[Tensor | None, ...], gradients: list[Tensor]) -> list[Tensor | None]:
    """In the weights' dtypes; None for an absent weight, whose gradient is empty."""
    return [None if w is None else dw.to(w.dtype) for w, dw in zip(weights, gradients, strict=True)]


lib.define_backward("qk_norm_rope", _backward, _setup_context)
