"""Gradients of one update over all ranks: when they are reduced, their mean, their norm, and clipping."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from dit_ops.training.parallelize import local

BUCKET_BYTES = 64 << 20


def reduce_in_backward(module: nn.Module, last: bool, accumulate: str) -> None:
    """What FSDP does in the next backward: reduce in the last micro batch of an update only.

    accumulate  "local": before it each rank keeps whole gradients; "sharded": it reduce-scatters every time, which keeps
                shards only, and leaves the all-reduce over hybrid sharding's replicas to the last
    """
    if not isinstance(module, FSDPModule):
        return
    if accumulate == "sharded":
        module.set_requires_all_reduce(last)
    else:
        module.set_requires_gradient_sync(last)


def average_gradients(parameters: Iterable[nn.Parameter], world: int) -> None:
    """The mean over all ranks of what FSDP does not reduce, in few large all-reduces. Collective."""
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if world == 1 or not grads:
        return
    pending = []
    for bucket in _buckets(grads):
        flat = torch.cat([g.flatten() for g in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        parts = flat.div_(world).split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, up to BUCKET_BYTES together."""
    buckets: list[list[Tensor]] = []
    size = 0
    for t in tensors:
        if not buckets or t.dtype != buckets[-1][0].dtype or size + t.nbytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(t)
        size += t.nbytes
    return buckets


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """`‖g‖₂` over all parameters, whole and sharded. Collective where some are sharded."""
    grads = [p.grad for p in parameters if p.grad is not None]
    whole = [g for g in grads if not isinstance(g, DTensor)]
    shards = [g for g in grads if isinstance(g, DTensor)]
    total = nn.utils.get_total_norm(whole)
    if not shards:
        return total
    mesh = shards[0].device_mesh
    squared = nn.utils.get_total_norm([g.to_local() for g in shards]).square().to(mesh.device_type)
    dim = next(i for i, placement in enumerate(shards[0].placements) if isinstance(placement, Shard))
    dist.all_reduce(squared, group=mesh.get_group(dim))
    return (squared + total.square().to(squared.device)).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """`g ← g · min(1, limit / (‖g‖ + 1e-6))`"""
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            by_device.setdefault(local(p.grad).device, []).append(local(p.grad))
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0).to(device))
