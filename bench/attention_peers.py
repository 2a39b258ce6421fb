"""Other ways to compute attention over key intervals, as functions of q, k, v: [B, L, N, D]."""

import functools
import importlib.util

import torch
import torch.nn.functional as tf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_ops.bench.runs import Peer
from dit_ops.masks import Mask, TeacherForcing

LARGEST_MASK = 1 << 26  # pairs whose boolean mask is still worth a measurement


def attention_peers(mask: Mask, device: str, deterministic: bool) -> dict[str, Peer]:
    """Every peer by name; one that does not apply here says why. Deterministic, nothing but our own kernels is compared."""
    if deterministic:
        return {}
    rows = mask.intervals()
    every_key = len(rows) == 1 and rows[0][2] == ((0, mask.keys),)
    gpu = None if device != "cpu" else "it needs a CUDA device"
    one = None if every_key else "it has no interval mask"
    packs = None if not every_key else "the mask is one rectangle"
    installed = None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"
    return {
        "cuDNN SDPA": _peer(functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION), gpu or one),
        "FA2 SDPA": _peer(functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION), gpu or one),
        "flash-attn": _peer(flash_attn, gpu or installed or one),
        "FA2 varlen on packed copies": _peer(functools.partial(varlen, mask), gpu or packs),
        "flex_attention, cached BlockMask": _flex(mask, device) if gpu is None else _peer(None, gpu),
        "SDPA, boolean mask": _masked_sdpa(mask, device, every_key),
    }


def _peer(fn, missing: str | None) -> Peer:
    return Peer(None if missing else fn, missing)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | list[SDPBackend], attn_mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        return tf.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)


def _masked_sdpa(mask: Mask, device: str, every_key: bool) -> Peer:
    pairs = mask.queries * mask.keys
    if every_key or pairs > LARGEST_MASK:
        return Peer(None, "there is nothing to mask" if every_key else f"a mask of {pairs} pairs is too large")
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return Peer(functools.partial(sdpa, backend=backends, attn_mask=mask.dense(device)))


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def varlen(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row of the mask is a sequence of its own, with a copy of its keys; B = 1."""
    from torch.nn.attention.varlen import varlen_attn

    at, (cu_q, cu_k), (longest_q, longest_k) = _packing(mask, str(q.device))
    keys, values = (torch.cat([t[0, a:b] for a, b in at]) for t in (k, v))
    o = varlen_attn(q[0], keys, values, cu_q, cu_k, longest_q, longest_k)
    assert isinstance(o, Tensor)  # nothing but o was asked for
    return o[None]


@functools.lru_cache
def _packing(mask: Mask, device: str) -> tuple[list[tuple[int, int]], tuple[Tensor, Tensor], tuple[int, int]]:
    rows = mask.intervals()
    sizes = [[q1 - q0 for q0, q1, _ in rows], [sum(b - a for a, b in keys) for _, _, keys in rows]]
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for n in sizes)
    return [pair for _, _, keys in rows for pair in keys], (cu_q, cu_k), (max(sizes[0]), max(sizes[1]))


def _flex(mask: Mask, device: str) -> Peer:
    """The mask in closed form where it has one, so that flex loads nothing for it; built once, outside of the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule = _teacher_forcing(mask) if isinstance(mask, TeacherForcing) else _intervals(mask, device)
    blocks = create_block_mask(rule, None, None, mask.queries, mask.keys, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return Peer(run)


def _teacher_forcing(mask: TeacherForcing):
    layout = mask.layout
    prefix, tokens, step = layout.prefix, layout.tokens, layout.tokens_per_frame * (layout.block_frames or layout.frames)

    def rule(b, h, q, k):
        q_video, k_video = q - prefix, k - prefix
        q_noisy, k_noisy = q_video >= tokens, k_video >= tokens
        q_block, k_block = q_video % tokens // step, k_video % tokens // step
        earlier = ~k_noisy & torch.where(q_noisy, k_block < q_block, k_block <= q_block)
        own = q_noisy & k_noisy & (q_block == k_block)
        return (k_video < 0) | ((q_video >= 0) & (earlier | own))

    return rule


def _intervals(mask: Mask, device: str):
    rows = mask.intervals()
    most = max((len(keys) for *_, keys in rows), default=0)
    edges = torch.zeros(most, 2, mask.queries, dtype=torch.int32)
    for q0, q1, keys in rows:
        for i, pair in enumerate(keys):
            edges[i, :, q0:q1] = torch.tensor(pair)[:, None]
    edges = edges.to(device)

    def rule(b, h, q, k):
        seen = k < 0
        for i in range(most):
            seen = seen | ((k >= edges[i, 0][q]) & (k < edges[i, 1][q]))
        return seen

    return rule
