"""Where a process stands among those of a run: torchrun's environment, the process group, and the mesh (data × sequence).

Ranks of one sequence group are neighbours, so the all-to-all of every block stays within a node as long as it fits there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from dit_ops.training.config import RunConfig


@dataclass(frozen=True)
class Ranks:
    """data: groups that read batches of their own; sequence: ranks that share one video. mesh is None in a single process."""

    data: int = 1
    data_rank: int = 0
    sequence: int = 1
    mesh: DeviceMesh | None = None  # ("data", "sequence")
    shard_mesh: DeviceMesh | None = None  # FSDP's: ("shard",), or ("replicate", "shard")

    @property
    def world(self) -> int:
        return self.data * self.sequence


def device_of(config: "RunConfig") -> torch.device:
    """`auto` is the GPU if there is one; under torchrun each process of a node has the GPU of its LOCAL_RANK."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


@contextmanager
def process_group(config: "RunConfig") -> Iterator[None]:
    """The default process group for the length of a run: torchrun's, or one process alone where FSDP asks for a group.

    NCCL on CUDA with gloo for CPU tensors, gloo on the CPU. A group that exists already is used and left as it is.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if dist.is_initialized() or (world == 1 and config.parallel.fsdp == "none"):
        yield
        return
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks_of(config: "RunConfig") -> Ranks:
    """ValueError where data × sequence (× the replicas of hybrid sharding) does not fit the number of processes."""
    parallel, kind = config.parallel, device_of(config).type
    if not dist.is_initialized():
        if parallel.sequence != 1 or parallel.data not in (None, 1) or parallel.fsdp != "none":
            raise ValueError(
                f"parallel: data {parallel.data}, sequence {parallel.sequence}, fsdp {parallel.fsdp!r} need a process group: "
                "start with torchrun"
            )
        return Ranks()
    world = dist.get_world_size()
    data = parallel.data or max(1, world // parallel.sequence)
    if data * parallel.sequence != world:
        raise ValueError(f"parallel: data × sequence must be the {world} processes, got {data} × {parallel.sequence}")
    mesh = init_device_mesh(kind, (data, parallel.sequence), mesh_dim_names=("data", "sequence"))
    shard_mesh = None
    if parallel.fsdp == "full":
        shard_mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    elif parallel.fsdp == "hybrid":
        replicas = parallel.replicas or max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        if world % replicas:
            raise ValueError(f"parallel: replicas must divide the {world} processes, got {replicas}")
        shard_mesh = init_device_mesh(kind, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    return Ranks(data, mesh.get_local_rank("data"), parallel.sequence, mesh, shard_mesh)
