"""Random numbers as pure functions of (seed, counters, name).

A run has no random state: whoever needs noise for step 7 asks for it by name and gets the same numbers before and after a
resume, on any device, on any rank and in any order of asking. Ranks that must differ put their data rank into the counters.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """`Draws(seed).at(step, micro).normal("noise", shape)`; the key of a draw is (seed, counters, name)."""

    seed: int
    counters: tuple[int, ...] = ()

    def at(self, *counters: int) -> "Draws":
        return Draws(self.seed, self.counters + counters)

    def generator(self, name: str) -> torch.Generator:
        """A fresh CPU generator: two calls with the same name give the same stream."""
        key = hashlib.blake2b(repr((self.seed, self.counters, name)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)

    def normal(
        self, name: str, shape: tuple[int, ...], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """N(0, 1), drawn in fp32 on the CPU and then moved: the numbers do not depend on the device."""
        return torch.randn(shape, generator=self.generator(name)).to(device, dtype)

    def uniform(self, name: str, shape: tuple[int, ...] = (), *, device: torch.device | str = "cpu") -> Tensor:
        """U[0, 1) in fp32."""
        return torch.rand(shape, generator=self.generator(name)).to(device)

    def integers(
        self, name: str, low: int, high: int, shape: tuple[int, ...] = (), *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Uniform int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator(name)).to(device)

    def permutation(self, name: str, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator(name)).tolist()
