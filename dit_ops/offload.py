"""A backbone whose blocks live in host memory and visit the device: for weights that do not fit, in inference.

The weights of a block are one run of bytes in pinned memory. While block i computes, those of block i + 1 are copied into the
other one of two device buffers, on a stream of their own; after the last block comes the first again, so the first copy of a
step hides behind the end of the step before. Between two calls every parameter is in host memory: state_dict and save work.

A step takes at least the bytes of all blocks over the bus; see docs/low_memory.md for when that is hidden.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dit_ops.backbones._block import ShardUnit, make_shard_unit

ALIGNMENT = 256  # bytes: what kernels may expect of a tensor's address
LARGEST_ALLOCATION = 2**33  # bytes of pinned memory at once, beside a model that is not moved yet


def offload_blocks(backbone: Any, device: torch.device | str) -> None:
    """Moves the weights of the blocks (with their camera layers) to pinned host memory and everything else to the device.

    In place. What changes weights comes before: LoRA adapters, `to_float8`, a dtype. ValueError: parameters that are trained,
    blocks that are offloaded already. On a CPU the same copies are made between two places in host memory.
    """
    if backbone.offloaded:
        raise ValueError("offload_blocks: backbone must have its blocks in place, but they are offloaded already")
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"offload_blocks: backbone must be frozen, offloaded weights are for inference only; {trained[0]} requires grad"
        )
    units = block_modules(backbone)
    tensors = [tensors_of(modules) for modules in units]
    inside = {id(t) for unit in tensors for t in unit}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    with torch.inference_mode(False), torch.no_grad():
        buffers = DoubleBuffer(tensors, torch.device(device))
    for i, modules in enumerate(units):
        block = modules[0]
        if not isinstance(block, ShardUnit):
            make_shard_unit(block)
        block.register_forward_pre_hook(lambda module, args, i=i: buffers.enter(i))
        block.register_forward_hook(lambda module, args, output, i=i: buffers.leave(i), always_call=True)
        for module in modules:
            module.register_load_state_dict_post_hook(lambda module, keys: buffers.forget())
    backbone.offloaded = True


def block_modules(backbone: Any) -> list[list[nn.Module]]:
    """What runs inside each block: the block itself and its camera layer, which is kept beside the transformer."""
    camera = backbone.camera if backbone.camera is not None else [None] * len(backbone.blocks)
    return [[m for m in pair if m is not None] for pair in zip(backbone.blocks, camera, strict=True)]


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


class DoubleBuffer:
    """Two device buffers and the host copies of all units, a unit being the tensors of one block."""

    def __init__(self, units: list[list[Tensor]], device: torch.device):
        self.api: Any = torch.get_device_module(device)  # its streams and events; those of a CPU do nothing
        self.units = units
        sizes = [unit_bytes(unit) for unit in units]
        self.slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self.host: list[Tensor] = []
        for first, last in allocations(sizes):
            flat = torch.empty(sum(sizes[first:last]), dtype=torch.uint8, pin_memory=device.type != "cpu")
            self.host += flat.split(sizes[first:last])
            for i in range(first, last):
                for tensor, view in zip(units[i], views(self.host[i], units[i]), strict=True):
                    tensor.data = view.copy_(tensor)
        self.at_rest = [[t.data for t in unit] for unit in units]
        self.placed = [[views(slot, unit) for slot in self.slots] for unit in units]
        self.copying = self.api.Stream(device)
        self.device = device
        self.copied, self.free = [[self.api.Event() for _ in range(2)] for _ in range(2)]
        for slot, event in zip(self.slots, self.free, strict=True):
            event.record(self.api.current_stream(device))  # the memory may have had another use on this stream
            if slot.is_cuda:
                slot.record_stream(self.copying)
        self.current = 1
        self.running: int | None = None
        self.forget()

    def forget(self) -> None:
        """The host copies have changed: nothing on the device is valid."""
        self.holds: list[int | None] = [None, None]

    def enter(self, i: int) -> None:
        """Block i is about to run: its parameters become views of its buffer, and the next block's copy starts."""
        if torch.is_grad_enabled():
            raise ValueError(
                "offloaded blocks are for inference only: call the model under torch.no_grad() or inference_mode()"
            )
        for tensor, view in zip(self.units[i], self.at_rest[i], strict=True):
            if tensor.data_ptr() != view.data_ptr():
                raise ValueError(
                    f"the weights of offloaded block {i} must stay where offload_blocks put them, but were moved, cast or "
                    "replaced: do that before"
                )
        if i not in self.holds:
            self._fetch(i, 1 - self.current)
        self.current = slot = self.holds.index(i)
        self.api.current_stream(self.device).wait_event(self.copied[slot])
        for tensor, view in zip(self.units[i], self.placed[i][slot], strict=True):
            tensor.data = view
        self.running = i
        following = (i + 1) % len(self.units)
        if following not in self.holds:
            self._fetch(following, 1 - slot)

    def leave(self, i: int) -> None:
        """Block i has been launched, or has failed: its buffer is free once what was launched is computed."""
        if self.running != i:
            return
        self.running = None
        for tensor, view in zip(self.units[i], self.at_rest[i], strict=True):
            tensor.data = view
        self.free[self.current].record(self.api.current_stream(self.device))

    def _fetch(self, i: int, slot: int) -> None:
        with torch.inference_mode(False), torch.no_grad(), self.api.stream(self.copying):
            self.copying.wait_event(self.free[slot])
            self.slots[slot][: len(self.host[i])].copy_(self.host[i], non_blocking=True)
            self.copied[slot].record(self.copying)
        self.holds[slot] = i


def views(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of the bytes `flat`, one behind the other, with the shapes and dtypes of the tensors."""
    found, start = [], 0
    for tensor in tensors:
        found.append(flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += aligned(tensor.nbytes)
    return found


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def unit_bytes(tensors: list[Tensor]) -> int:
    return sum(aligned(t.nbytes) for t in tensors)


def allocations(sizes: list[int], largest: int = LARGEST_ALLOCATION) -> list[tuple[int, int]]:
    """Runs [first, last) of units that share one pinned allocation: torch rounds each up to a power of two, which for single
    blocks would waste up to half of the memory. The run that wastes least comes first.
    """
    runs, first = [], 0
    while first < len(sizes):
        totals = [total for total in accumulate(sizes[first:]) if total <= largest] or sizes[first : first + 1]
        n = min(range(len(totals)), key=lambda k: power_of_two(totals[k]) / totals[k]) + 1
        runs.append((first, first + n))
        first += n
    return runs


def power_of_two(nbytes: int) -> int:
    """The smallest one that is not less."""
    return 1 << max(0, nbytes - 1).bit_length()
