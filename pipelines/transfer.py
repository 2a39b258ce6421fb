"""Work beside the host's and beside the caller's: copies to the model's device that nobody waits for, and streams of a GPU."""

from collections import defaultdict

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it goes through pinned memory, which is not used again before the copy is done."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # torch cannot pin what was expanded


def take_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """A CUDA stream that nobody else has until it is given back. The next video that is made takes the same one again: memory
    goes back to the stream that used it, and cuBLAS keeps a workspace for every stream.
    """
    try:
        return _idle[device, use].pop()
    except IndexError:
        return torch.cuda.Stream(device)


def give_back(stream: torch.cuda.Stream, device: torch.device, use: str) -> None:
    """What runs on it may go on: the next one's work comes after it."""
    _idle[device, use].append(stream)


_idle: defaultdict[tuple[torch.device, str], list[torch.cuda.Stream]] = defaultdict(list)
