"""Decoding beside denoising: the same frames in order, at most one chunk ahead, errors in their place, no thread left."""

import gc
import threading
import time

import pytest
import torch
from test_pipelines import POSE, PROMPT, SETTINGS, make_backbone

from dit_ops.conditions.linear import LinearCondition
from dit_ops.pipelines.few_step import FewStepPipeline

STEPS = 2 + 1  # of a chunk and of the rerun before it


class Recurrent(LinearCondition):
    """A decoder with a past, slower for the first chunks; says when and where it decodes."""

    def decode_stream(self, chunks, *, context=None):
        past, self.threads, self.decoded = None, [], 0
        for chunk in chunks:
            time.sleep(max(0.0, 0.05 - 0.02 * self.decoded))
            past = chunk if past is None else torch.cat([past[:, -2:] * 0.5, chunk], 1)
            self.threads.append(threading.current_thread())
            assert torch.is_inference_mode_enabled()
            yield self.decode_to_pixel(past)[:, -chunk.shape[1] :]
            self.decoded += 1


@pytest.fixture(scope="module")
def condition() -> LinearCondition:
    condition = LinearCondition.fit(torch.rand(2, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return Recurrent(condition.codec, condition.text)


@pytest.fixture(scope="module")
def pipeline(condition) -> FewStepPipeline:
    return FewStepPipeline(make_backbone(), condition, SETTINGS)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()  # an error's traceback may hold the stream
    assert set(threading.enumerate()) <= before


def test_the_same_bits_in_a_thread_of_its_own(pipeline):
    serial = list(pipeline.stream(PROMPT, pose=POSE))
    assert set(pipeline.condition.threads) == {threading.current_thread()}  # the default without a GPU
    beside = list(pipeline.stream(PROMPT, pose=POSE, overlap=True))
    (thread,) = set(pipeline.condition.threads)
    assert thread is not threading.current_thread()
    assert [c.shape for c in beside] == [c.shape for c in serial]
    assert all(map(torch.equal, beside, serial))


def test_a_chunk_is_decoded_while_the_next_one_is_made(pipeline, monkeypatch):
    """The decoder of every chunk but the first and the last waits for a step of the next chunk: in turn it would for ever."""
    moved, decode = threading.Event(), LinearCondition.decode_to_pixel
    late = []

    def waits(self, latent):
        chunk = len(pipeline.condition.threads)
        if chunk in (2, 3):
            late.append(not moved.wait(20))
        return decode(self, latent)

    def step(done, total):
        if done > STEPS * 2 - 1:
            moved.set()

    monkeypatch.setattr(LinearCondition, "decode_to_pixel", waits)
    assert len(list(pipeline.stream(PROMPT, pose="w*7", overlap=True, on_step=step))) == 4
    assert late == [False, False]


def test_a_chunk_is_decoded_while_the_caller_has_the_one_before(pipeline):
    stream = pipeline.stream(PROMPT, pose="w*11", overlap=True)
    next(stream), next(stream)
    until = time.monotonic() + 20
    while len(pipeline.condition.threads) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(pipeline.condition.threads) == 3
    stream.close()


def test_one_chunk_ahead_at_most_and_the_first_one_at_once(pipeline):
    done = []
    stream = pipeline.stream(PROMPT, pose="w*11", overlap=True, on_step=lambda i, _: done.append(i))
    steps = []
    for _ in stream:
        time.sleep(0.02)  # a slow consumer: nothing is made meanwhile
        steps.append(len(done))
    made = [2 + STEPS * chunk for chunk in range(6)]
    assert steps == [made[0], *made[2:], made[-1]]


def test_poses_are_read_one_block_ahead(pipeline):
    asked, seen = [], []

    def steer():
        for _ in range(7):
            asked.append(len(seen))
            yield "w*1"

    for chunk in pipeline.stream(PROMPT, pose=steer(), overlap=True):
        seen.append(chunk)
    assert asked == [0, 1, 1, 1, 1, 2, 2] and len(seen) == 4
    assert torch.equal(torch.cat(seen, 1), pipeline(PROMPT, pose="w*7"))


def test_an_error_of_the_decoder_reaches_the_caller(pipeline, monkeypatch):
    decode = LinearCondition.decode_to_pixel

    def fails(self, latent):
        if len(pipeline.condition.threads) == 3:
            raise RuntimeError("the decoder is out of memory")
        return decode(self, latent)

    monkeypatch.setattr(LinearCondition, "decode_to_pixel", fails)
    stream, seen = pipeline.stream(PROMPT, pose="w*11", overlap=True), []
    with pytest.raises(RuntimeError, match="the decoder is out of memory"):
        seen.extend(stream)
    assert list(stream) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_of_a_later_chunk_comes_behind_the_chunks_before_it(overlap, pipeline):
    stream, seen = pipeline.stream(PROMPT, pose=iter(["w*1", "w*2", "x*2", "w*2"]), overlap=overlap), []
    with pytest.raises(ValueError, match="segment 1"):
        for chunk in stream:
            seen.append(chunk)
    assert [c.shape[1] for c in seen] == [2, 2]


@pytest.mark.parametrize("end", ["close", "forget", "never begun"])
def test_a_stream_that_is_left_ends_its_thread(end, pipeline):
    stream = pipeline.stream(PROMPT, pose="w*11", overlap=True)
    if end != "never begun":
        next(stream), next(stream)
        assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    if end == "close":
        stream.close()
        assert not any(thread.name.startswith("decode") for thread in threading.enumerate())
    del stream
