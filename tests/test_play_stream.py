"""The play engine: encoding beside the model, what a stream's chunks say of themselves, and several kinds of models."""

import asyncio
import json
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from live_tensors import live_tensors
from toy_hunyuan_directory import save as save_hunyuan
from toy_play import START, ToyPipeline, get, page, running, until
from toy_rooms import random_rooms
from websockets.exceptions import ConnectionClosed

from dit_ops import conditions
from dit_ops.backbones.hunyuan_video15 import HunyuanVideo15Backbone
from dit_ops.pipelines import loading
from dit_ops.pipelines.autoregressive import AutoregressivePipeline
from dit_ops.pipelines.settings import Settings
from dit_ops.play import engine as engine_module
from dit_ops.play.client import Client
from dit_ops.play.engine import Engine, Limits
from dit_ops.play.server import serve
from dit_ops.play.stream import Stream, encode_jpegs
from dit_ops.video import read_mp4, to_uint8


class Gate:
    """`encode_jpegs` that waits until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.opened, self.threads, self.images = threading.Event(), [], []
        monkeypatch.setattr(engine_module, "encode_jpegs", self)

    def __call__(self, images):
        self.threads.append(threading.current_thread().name)
        self.images.append(weakref.ref(images))
        opened = self.opened.wait(10)
        self.opened.set()
        assert opened
        return encode_jpegs(images)


def toy_frames(pipeline: ToyPipeline, seed: int, chunks) -> list[bytes]:
    return [frame for i in chunks for frame in encode_jpegs(to_uint8(pipeline.pixels(seed, i)[0]))]


def test_frames_are_encoded_in_order_beside_the_next_chunk(monkeypatch):
    pipeline, gate = ToyPipeline(), Gate(monkeypatch)
    with running(pipeline, Limits(ahead_seconds=60)) as address, page(address) as client:
        client.start()
        until(lambda: pipeline.chunks >= 2)
        time.sleep(0.3)
        made, encoding = pipeline.chunks, len(gate.threads)
        gate.opened.set()
        assert (made, encoding) == (2, 1)  # one is being encoded, one waits, no third one is made
        for _ in range(5):
            client.chunk()
        assert client.frames == toy_frames(pipeline, 3, range(1, 6))
    assert len(set(gate.threads)) == 1 and not pipeline.threads & set(gate.threads)
    until(lambda: all(images() is None for images in gate.images))


@pytest.mark.parametrize("leave", ["stop", "vanish"])
@pytest.mark.parametrize("model", ["waits", "computes"])
def test_a_client_that_leaves_while_frames_are_encoded_leaves_nothing(model, leave, monkeypatch):
    pipeline, gate = ToyPipeline(seconds=0.001), Gate(monkeypatch)
    pixels = pipeline.pixels

    def slower(seed, chunk):
        pipeline.network_steps = 1 if model == "waits" else 1_000_000
        return pixels(seed, chunk)

    pipeline.pixels = slower
    with running(pipeline) as address:
        with page(address) as client:
            client.start()
            until(lambda: pipeline.chunks >= 2 if model == "waits" else pipeline.steps > 5)
            client.send("stop") if leave == "stop" else client.vanish()
            until(lambda: pipeline.closed == 1, 5)  # though the encoder is held up
        pipeline.network_steps, pipeline.pixels = 1, pixels
        gate.opened.set()
        until(lambda: all(images() is None for images in gate.images))
        assert len(gate.images) == 1  # what waited for the encoder was dropped
        chunks = pipeline.chunks
        with page(address) as client:
            client.start()
            client.chunk()
            assert client.frames == toy_frames(pipeline, 3, [chunks + 1])  # nothing of the stream before
    assert pipeline.opened == pipeline.closed == 2


def test_an_error_of_the_encoder_reaches_the_page_and_the_server_lives(monkeypatch):
    pipeline, made = ToyPipeline(), []

    def encode(images):
        made.append(len(images))
        if len(made) == 2:
            raise OSError("encoder error -2\nwhen writing image file")
        return encode_jpegs(images)

    monkeypatch.setattr(engine_module, "encode_jpegs", encode)
    with running(pipeline) as address, page(address) as client:
        client.start()
        assert client.receive("error")["message"] == "encoder error -2 when writing image file"
        assert client.frames == toy_frames(pipeline, 3, [1])
        client.receive("ended")
        until(lambda: pipeline.closed == 1)
        client.start()
        client.chunk()


def test_frames_from_before_an_error_of_the_model_come_first(monkeypatch):
    pipeline, gate = ToyPipeline(), Gate(monkeypatch)
    pixels = pipeline.pixels

    def failing(seed, chunk):
        if chunk == 2:
            gate.opened.set()
            raise RuntimeError("out of\nmemory")
        return pixels(seed, chunk)

    pipeline.pixels = failing
    with running(pipeline) as address, page(address) as client:
        client.start()
        assert client.receive("error")["message"] == "out of memory"
        assert len(client.frames) == 4
        client.receive("ended")


def test_an_error_that_nobody_expects_is_named_and_logged(caplog):
    pipeline = ToyPipeline()
    pipeline.pixels = lambda seed, chunk: {}[chunk]
    with running(pipeline) as address, page(address) as client:
        client.start()
        assert client.receive("error")["message"] == "the server failed with a KeyError; its log says more"
        with pytest.raises(ConnectionClosed):
            client.receive("ended")
        until(lambda: pipeline.closed == 1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "the stream of a client failed"
    ]


def test_a_stream_is_stopped_between_two_network_steps():
    pipeline = ToyPipeline(seconds=0.002)
    pipeline.network_steps = 100_000
    with running(pipeline) as address, page(address) as client:
        client.start()
        until(lambda: pipeline.steps > 3)
        client.send("stop")
        until(lambda: pipeline.closed == 1)
        steps = pipeline.steps
        pipeline.network_steps = 1
        client.start()
        client.chunk()
        assert pipeline.steps - steps < 10


class SlowSocket:
    """A connection in one event loop whose frames wait in the network until `flows`."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue = asyncio.Queue()
        self.flows = asyncio.Event()
        self.sent: list[str | bytes] = []

    async def receive(self) -> dict:
        return await self.incoming.get()

    async def send_text(self, message: str) -> None:
        self.sent.append(message)

    async def send_bytes(self, message: bytes) -> None:
        await self.flows.wait()
        self.sent.append(message)

    def say(self, text: str) -> None:
        self.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def until(self, true) -> None:
        for _ in range(500):
            if true():
                return
            await asyncio.sleep(0.01)
        pytest.fail("the condition did not come true")


def test_frames_that_are_shown_while_others_are_sent_count():
    """The server waits for the network, not for a page that has shown all there is."""

    async def scenario() -> None:
        pipeline, socket = ToyPipeline(), SlowSocket()
        engine = Engine(pipeline, limits=Limits(queue=1, ahead_seconds=0, stall_seconds=0.5))
        running_client = asyncio.create_task(Client(socket, engine).run())
        socket.say(START)
        await socket.until(lambda: any('"chunk"' in message for message in socket.sent))
        socket.say(json.dumps({"type": "shown", "frame": 4}))
        await socket.until(socket.incoming.empty)
        await asyncio.sleep(0.05)
        socket.flows.set()
        await socket.until(lambda: pipeline.chunks == 2)
        socket.incoming.put_nowait({"type": "websocket.disconnect"})
        await running_client
        await engine.close()
        assert not any('"error"' in message for message in socket.sent if isinstance(message, str))

    asyncio.run(scenario())


def hunyuan(directory) -> loading.Pipeline:
    """A few-step model with a camera, saved and loaded; four pixel frames per latent frame behind the first."""
    stock = save_hunyuan(directory / "stock")
    config = json.loads((stock / "transformer/config.json").read_text(encoding="utf-8"))
    backbone = HunyuanVideo15Backbone.from_config(config, camera=True, block_frames=2)
    settings = Settings(height=32, width=32, fps=8, denoising_steps=(1000, 500))
    loading.save(directory / "model", "few_step", backbone, conditions.load(stock), settings)
    return loading.load(directory / "model", device="cpu")


def guided_rooms() -> AutoregressivePipeline:
    rooms = random_rooms()
    return AutoregressivePipeline(rooms.backbone, rooms.condition, rooms.settings.override({"num_steps": 2, "guidance": 2.0}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "few-step": random_rooms(),
        "autoregressive": guided_rooms(),
        "hunyuan": hunyuan(tmp_path_factory.mktemp("hunyuan")),
    }


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["few-step", "autoregressive", "hunyuan"])
def test_the_pose_of_a_chunk_is_that_of_its_own_frames(models, kind, overlap):
    """The pose strings up to a chunk, joined, make the frames up to it, and its key number names the keys in them."""
    model, options = models[kind], {"window_frames": 6}
    stream = Stream(model, "a red room", 5, 1000, overlap=overlap, **options)
    keys, chunks, ends = {0: "stay"}, [], []
    for number, key in enumerate(("w", "l", "a", "i", "s"), 1):
        keys[number] = key
        stream.steering.press((key,), number)
        stream.steering._tapped.clear()
        chunks.append(stream.next_chunk())
        ends.append(stream.frames)
    stream.close()
    assert [chunk.pose for chunk in chunks[1:]] == [f"{keys[chunk.keys]}*2" for chunk in chunks[1:]]
    assert chunks[0].pose == "w*1" and chunks[0].keys == 1
    late = [number - chunk.keys for number, chunk in enumerate(chunks, 1)]
    assert set(late) == {0, 1} if overlap else late == [0] * 5
    images = torch.cat([chunk.images for chunk in chunks])
    for count in (1, 3, 5):
        pose = ",".join(chunk.pose for chunk in chunks[:count])
        again = model("a red room", pose=iter([pose]), seed=5, **options)[0]
        assert torch.equal(to_uint8(again), images[: ends[count - 1]])


@pytest.mark.parametrize("kind", ["autoregressive", "hunyuan"])
def test_models_of_every_kind_are_steered_through_the_server(models, kind, tmp_path):
    model = models[kind]
    size = {name: getattr(model.settings, name) for name in ("width", "height", "fps")}
    with running(model, options={"window_frames": 4}, overlap=True) as address, page(address, **size) as client:
        session = client.start()
        assert client.chunk()["frames"] == model.condition.pixel_frames(2)
        client.send("keys", down=["ArrowLeft", "KeyW"], number=3)
        while (chunk := client.chunk())["keys"] != 3:
            pass
        assert chunk["pose"] == "w+j*2" and chunk["frames"] == model.condition.pixel_frames(3) - 1
        client.send("stop")
        (tmp_path / "video.mp4").write_bytes(get(address, f"/video.mp4?session={session}")[2])
        film, fps = read_mp4(tmp_path / "video.mp4")
        assert film.shape[2:] == (model.settings.height, model.settings.width) and fps == model.settings.fps
        assert film.shape[0] >= len(client.frames)


def test_sessions_one_after_the_other_leave_nothing(models):
    def sessions() -> tuple[tuple[int, int], int]:
        """Live tensors and threads after one of each kind."""
        for model in models.values():
            stream = Stream(model, "a red room", 5, 1000, overlap=True, window_frames=4)
            for _ in range(3):
                stream.next_chunk()
            stream.close()
        del stream
        return live_tensors(), threading.active_count()

    assert sessions() == sessions()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_gpu_is_that_of_the_models_thread(kind, monkeypatch):
    pipeline, used = ToyPipeline(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((device, threading.current_thread().name)))
    pipeline.backbone = SimpleNamespace(device=torch.device(kind, 1 if kind == "cuda" else None))
    engine = Engine(pipeline)

    async def work() -> None:
        name = await engine.on_model(lambda: threading.current_thread().name)
        assert used == ([(torch.device("cuda", 1), name)] if kind == "cuda" else [])
        await engine.close()

    asyncio.run(work())


def test_models_without_camera_or_blocks_are_refused(tmp_path):
    directory = save_hunyuan(tmp_path / "stock")
    for mode, message in ((None, "play needs a causal model"), ("autoregressive", "play needs a model that follows a camera")):
        with pytest.raises(ValueError, match=message):
            serve(loading.load(directory, device="cpu", mode=mode), say=pytest.fail)
    rooms = random_rooms()
    rooms.backbone.block_frames = None
    with pytest.raises(ValueError, match="play needs a model that was trained with causal blocks"):
        serve(rooms, say=pytest.fail)
