"""Spreads a backbone over the ranks: a sequence-parallel group, FSDP2 shards, what stays in fp32, and the way back to one file.

Every transformer block, with its camera layer, is one shard unit; the rest of the model is another. The shard mesh is the
joint mesh (data × sequence): every sequence rank holds the same loss and the gradient of its own tokens times their number,
so the mean over all ranks is the exact gradient.
"""

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dit_ops.backbones._block import make_shard_unit
from dit_ops.parallel import SequenceParallel
from dit_ops.training.checkpoint import is_writer
from dit_ops.training.ranks import Ranks

if TYPE_CHECKING:
    from dit_ops.training.config import RunConfig


def parallelize(backbone: Any, config: "RunConfig", ranks: Ranks, device: torch.device) -> None:
    """In place. Without FSDP the module moves to the device whole and its gradients are averaged by the engine."""
    if ranks.sequence > 1:
        if not hasattr(backbone, "sequence_parallel"):
            raise ValueError(f"parallel.sequence = {ranks.sequence}: {type(backbone).__name__} knows no sequence parallelism")
        assert ranks.mesh is not None
        backbone.sequence_parallel = SequenceParallel(ranks.mesh.get_group("sequence"))
    if ranks.shard_mesh is not None:
        _shard(backbone, config, ranks, device)
        return
    backbone.to(device)
    if config.precision == "bf16":
        for module in fp32_modules(backbone):
            module.register_forward_pre_hook(_leave_autocast)
            module.register_forward_hook(_return_to_autocast, always_call=True)


def _shard(backbone: nn.Module, config: "RunConfig", ranks: Ranks, device: torch.device) -> None:
    """Blocks first, then the modules of their own precision, then the root.

    Parameters that stay fp32 inside units of another precision are small (norms, modulation tables): they are replicated, and
    the engine averages their gradients. The root is resharded after forward too: nothing stale is left by a forward without
    a backward (rollouts, averages).
    """
    mixed = config.precision == "bf16"
    cuda = device.type == "cuda"
    shared: dict[str, Any] = {
        "mesh": ranks.shard_mesh,
        "reshard_after_forward": True,
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if config.parallel.cpu_offload else OffloadPolicy(),
    }
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if mixed else plain
    units = block_units(backbone)
    ignored = set(replicated(backbone).values()) if mixed else set()
    for block, camera in units:
        make_shard_unit(block)
        if camera is not None:  # one unit, one all-gather: FSDP collects the camera layer's parameters as the block's
            block.add_module("_camera", camera)
        fully_shard(block, mp_policy=policy, ignored_params=ignored, **shared)
        if camera is not None:
            del block._modules["_camera"]
            ignored |= set(camera.parameters())
    for module in fp32_modules(backbone) if mixed else ():
        fully_shard(module, mp_policy=plain, **shared)
    fully_shard(backbone, mp_policy=policy, ignored_params=ignored, **shared)
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def block_units(backbone: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """The transformer blocks, which run through `call_block`, each with its camera layer."""
    transformer = getattr(backbone, "transformer", None)
    found = [getattr(transformer, name) for name in ("blocks", "transformer_blocks") if hasattr(transformer, name)]
    if not found:
        return []
    camera = getattr(backbone, "camera", None)
    return list(zip(found[0], camera if camera is not None else [None] * len(found[0]), strict=True))


def kept_in_fp32(backbone: nn.Module) -> tuple[str, ...]:
    """Module and parameter names that diffusers keeps in fp32 when a model is loaded in another dtype."""
    return tuple(getattr(getattr(backbone, "transformer", None), "_keep_in_fp32_modules", None) or ())


def fp32_modules(backbone: nn.Module) -> list[nn.Module]:
    """Outermost modules with parameters that stay fp32, outside the blocks: they run as a whole in fp32."""
    kept, found = kept_in_fp32(backbone), {}
    inside = {id(m) for block, _ in block_units(backbone) for m in block.modules()}
    for name, module in backbone.named_modules():
        path = name.split(".")
        if path[-1] in kept and id(module) not in inside and any(True for _ in module.parameters()):
            found[name] = module
    return [module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)]


def replicated(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that stay fp32 and are in no module of their own precision."""
    kept = kept_in_fp32(backbone)
    whole = {id(p) for module in fp32_modules(backbone) for p in module.parameters()}
    return {
        name: p
        for name, p in backbone.named_parameters()
        if id(p) not in whole and any(part in kept for part in name.split("."))
    }


_autocast: list[Any] = []  # the contexts of modules that are running in fp32


def _leave_autocast(module: nn.Module, args: Any) -> None:
    device = next(module.parameters()).device.type
    _autocast.append(torch.autocast(device, enabled=False))
    _autocast[-1].__enter__()


def _return_to_autocast(module: nn.Module, args: Any, output: Any) -> None:
    _autocast.pop().__exit__(None, None, None)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without memory: its parameters are on the meta device. For a plain model to come back to from the shards."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def gathered(module: nn.Module, plain: nn.Module) -> nn.Module | None:
    """`plain`, a skeleton of the module, filled with its weights in host memory: on rank 0, None elsewhere. Collective.

    One tensor is whole on the device at a time.
    """
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        whole = full_tensor(value)
        if is_writer():
            state[name] = whole.cpu()
        del whole
    if not is_writer():
        return None
    plain.load_state_dict(state, assign=True)
    return plain


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; a plain one as it is. Collective."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)
