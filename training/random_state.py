"""The global random generators. Our own numbers come from Draws; these are for third-party code that uses them."""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """State of Python's, numpy's, and torch's CPU and current CUDA generator, as JSON."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    state = {
        "python": [version, list(words), gauss],
        "numpy": legacy,
        "cpu": _text(torch.get_rng_state()),
    }
    return state | ({"cuda": _text(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    legacy = state["numpy"]
    key = np.array(legacy["state"]["key"], dtype=np.uint32)
    np.random.set_state(legacy | {"state": {"key": key, "pos": legacy["state"]["pos"]}})
    torch.set_rng_state(_tensor(state["cpu"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
