"""Which samples an update trains on."""

from collections import Counter

import pytest

from dit_ops.training.sampler import BatchSampler


@pytest.mark.parametrize(("length", "samples"), [(9, 3), (10, 4), (3, 7), (1, 1)])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(length, samples):
    sampler = BatchSampler(["one"] * length, samples, seed=3)
    stream = sum((sampler.indices(update) for update in range(4 * length)), [])
    assert len(stream) == 4 * length * samples
    epochs = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert length < 9 or epochs[0] != epochs[1] != epochs[2]


def test_an_update_is_a_pure_function_of_its_number():
    keys = [(8, 64, 64)] * 12 + [(4, 64, 64)] * 6
    sampler = BatchSampler(keys, 4, seed=1)
    forward = [sampler.indices(update) for update in range(12)]
    for update in (11, 0, 5, 5, 3):
        assert sampler.indices(update) == BatchSampler(keys, 4, seed=1).indices(update) == forward[update]
    assert [BatchSampler(keys, 4, seed=2).indices(update) for update in range(12)] != forward


def test_no_update_mixes_buckets_and_all_keep_the_same_pace():
    """Buckets of 12, 6 and 2 samples: in 10 updates of 4 samples they give 6, 3 and 1, which is two epochs of each."""
    keys = ["a"] * 12 + ["b"] * 6 + ["c"] * 2
    sampler = BatchSampler(keys, 4, seed=5)
    for cycle in range(3):
        updates = [sampler.indices(10 * cycle + i) for i in range(10)]
        assert all(len({keys[i] for i in update}) == 1 for update in updates)
        assert Counter(keys[update[0]] for update in updates) == {"a": 6, "b": 3, "c": 1}
        assert set(Counter(sum(updates, [])).values()) == {2}
    order = lambda cycle: [keys[sampler.indices(10 * cycle + i)[0]] for i in range(10)]
    assert order(0) != order(1)


def test_a_wrong_request_is_explained():
    with pytest.raises(ValueError, match="keys must be one per sample, got none"):
        BatchSampler([], 1, 0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        BatchSampler(["a"], 0, 0)
