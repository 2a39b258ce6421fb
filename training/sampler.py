"""Which samples an update trains on: a pure function of its running number."""

from collections.abc import Hashable, Sequence
from math import gcd
from typing import Any

from dit_ops.draws import Draws


class BatchSampler:
    """All samples of one update come from one bucket: no batch mixes sizes, all ranks run the same blocks and collectives.

    keys      one per sample; samples with equal keys, such as (frames, height, width), are one bucket
    samples   of one update, over all micro batches and data ranks

    A bucket is an endless stream, epoch after epoch, each a fresh permutation of all its samples: nothing is dropped, and
    nothing repeats before the epoch is over. A cycle of Σ N / gcd(N) updates takes N_j / gcd(N) from the bucket of N_j samples,
    in random order: all buckets go through their epochs at the same pace. How an update is cut into micro batches and ranks
    changes nothing.
    """

    def __init__(self, keys: Sequence[Hashable], samples: int, seed: int) -> None:
        if not keys:
            raise ValueError("keys must be one per sample, got none")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        buckets: dict[Hashable, list[int]] = {}
        for i, key in enumerate(keys):
            buckets.setdefault(key, []).append(i)
        self.buckets, self.samples, self.seed = list(buckets.values()), samples, seed
        divisor = gcd(*map(len, self.buckets))
        self._share = [len(bucket) // divisor for bucket in self.buckets]
        self._cycle: tuple[int, list[int]] = (-1, [])
        self._orders: dict[int, tuple[int, list[int]]] = {}  # bucket → the epoch last used and its order

    def indices(self, update: int) -> list[int]:
        """The samples of an update, counted from 0; micro batch m of size b is [m·b, (m + 1)·b)."""
        cycle, place = divmod(update, sum(self._share))
        if cycle != self._cycle[0]:
            turns = [bucket for bucket, share in enumerate(self._share) for _ in range(share)]
            order = Draws(self.seed, (cycle,)).permutation("bucket order", len(turns))
            self._cycle = cycle, [turns[i] for i in order]
        bucket = self._cycle[1][place]
        batch = cycle * self._share[bucket] + self._cycle[1][:place].count(bucket)
        return [self._sample(bucket, batch * self.samples + i) for i in range(self.samples)]

    def _sample(self, bucket: int, position: int) -> int:
        members = self.buckets[bucket]
        epoch, place = divmod(position, len(members))
        if self._orders.get(bucket, (-1, []))[0] != epoch:
            counters = (epoch, bucket) if bucket else (epoch,)
            self._orders[bucket] = epoch, Draws(self.seed, counters).permutation("sample order", len(members))
        return members[self._orders[bucket][1][place]]


def bucket_keys(dataset: Any) -> list[Any]:
    """(frames, height, width) of every sample; a data set without an index is one bucket."""
    entries = getattr(dataset, "entries", None)
    if entries is None:
        return [None] * len(dataset)
    return [tuple(entry.get(key) for key in ("frames", "height", "width")) for entry in entries]
