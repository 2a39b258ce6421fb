"""Random numbers as pure functions of (seed, counters, name).

A run has no random state: whoever needs noise for step 7 asks for it by name and gets the same numbers before and after a
resume, on any device, on any rank and in any order of asking.

The rules of a training run, all of them:
- The engine gives a stage Draws(seed, (step, update, micro batch)). The micro batch is counted over the whole update,
  accumulation · data ranks + data rank, and no rank is in any key. So noise, timesteps and text dropout are the same on all
  ranks of a sequence-parallel group, differ between data ranks, and do not change with either number of ranks: two data ranks
  draw what one draws in two accumulated micro batches.
- What decides how many forwards there are (the exit step of a rollout) comes from `of_update()`, once for all micro batches and
  ranks: FSDP's collectives must match.
- The global generators, which only third-party code uses (dropout), are seeded with a draw before every micro batch.
- The order of the data is a draw of the epoch (training/sampler.py).
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

    def of_update(self) -> "Draws":
        """What all micro batches and ranks of a training update share: (step, update)."""
        return Draws(self.seed, self.counters[:2])

    def key(self, name: str) -> int:
        """63 bits of (seed, counters, name)."""
        digest = hashlib.blake2b(repr((self.seed, self.counters, name)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def generator(self, name: str) -> torch.Generator:
        """A fresh CPU generator: two calls with the same name give the same stream."""
        return torch.Generator().manual_seed(self.key(name))

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
