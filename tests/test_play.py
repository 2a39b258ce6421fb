"""The play server over real sockets: steering, turns, slow and vanished clients, nonsense, and who is let in."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from live_tensors import live_tensors
from toy_play import START, ToyPipeline, get, page, running, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from dit_ops.play.engine import Limits
from dit_ops.play.protocol import KEYS, MAX_MESSAGE, Keys, Shown, Start, Stop, parse
from dit_ops.play.stream import Steering
from dit_ops.video import read_mp4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (START, Start("a red room", 3)),
        ('{"type": "keys", "down": ["ArrowRight", "KeyW"], "number": 4}', Keys(("w", "l"), 4)),
        ('{"type": "keys", "down": [], "number": 0}', Keys((), 0)),
        ('{"type": "shown", "frame": 12}', Shown(12)),
        ('{"type": "stop"}', Stop()),
    ],
)
def test_messages(text, message):
    assert parse(text) == message


MALFORMED = [
    ("", "must be JSON, got ''"),
    ("{", "must be JSON"),
    ("[" * 50_000, "must be JSON"),
    ("[]", "with a type of start, keys, shown or stop"),
    ('{"type": ["keys"]}', "with a type of"),
    ('{"type": "fly"}', "with a type of"),
    ('{"type": "start", "seed": 1}', "prompt must be a text of 1 to 2000 characters, got NoneType"),
    (json.dumps({"type": "start", "prompt": "x" * 2001, "seed": 1}), "got 2001 characters"),
    ('{"type": "start", "prompt": " ", "seed": 1}', "got 1 characters"),
    ('{"type": "start", "prompt": "a", "seed": -1}', "seed must be an integer from 0 to .*, got '-1'"),
    ('{"type": "start", "prompt": "a", "seed": true}', "got 'true'"),
    ('{"type": "start", "prompt": "a", "seed": 1e3}', "got '1000.0'"),
    ('{"type": "keys", "down": "KeyW", "number": 1}', "down must be a list of KeyW"),
    ('{"type": "keys", "down": ["KeyQ"], "number": 1}', "down must be a list of KeyW"),
    ('{"type": "keys", "down": [["KeyW"]], "number": 1}', "down must be a list of KeyW"),
    ('{"type": "keys", "down": [], "number": NaN}', "number must be an integer"),
    ('{"type": "shown", "frame": null}', "frame must be an integer from 0"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=lambda text: text[:30])
def test_malformed_messages_are_named(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_every_keyboard_key_is_on_the_page():
    page = (Path(__file__).parents[1] / "dit_ops/play/page.html").read_text(encoding="utf-8")
    assert {code for code in KEYS if f'data-code="{code}"' in page} == set(KEYS)
    assert "http" not in page.replace('"https:"', "")  # nothing from elsewhere


def test_a_tap_between_two_steps_is_not_lost():
    steering = Steering()
    steps = steering.steps()
    assert next(steps) == "stay*1"
    steering.press(("w",), 1)
    steering.press(("w", "l"), 2)
    steering.press(("w",), 3)
    assert [next(steps), next(steps)] == ["w+l*1", "w*1"]
    assert steering.take(3) == ("stay*1,w+l*1,w*1", 0)  # the first of them followed no change
    steering.press((), 4)
    assert [next(steps), next(steps)] == ["stay*1", "stay*1"]
    assert steering.take(2) == ("stay*2", 4)


def test_a_chunk_has_its_own_steps_when_those_of_the_next_one_are_read():
    steering = Steering()
    steps = steering.steps()
    for number, key in enumerate("wsa", 1):
        steering.press((key,), number)
        next(steps), next(steps)
        steering.press((), 0)
        if number > 1:
            assert steering.take(2) == (f"{'wsa'[number - 2]}*2", number - 1)
    assert steering.take(0) == ("", 2)


@pytest.fixture(autouse=True)
def _no_error_is_logged(caplog):
    """Whatever a client does, no exception escapes into the server's log."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_keys_steer_the_frames_and_the_video_can_be_saved(tmp_path):
    pipeline = ToyPipeline(seconds=0.005)
    with running(pipeline, prompt="a hall") as address, page(address) as client:
        assert client.messages[0]["prompt"] == "a hall"
        session = client.start()
        assert client.chunk()["pose"] == "stay*2"
        client.send("keys", down=["ArrowLeft", "KeyW"], number=7)
        while (chunk := client.chunk())["keys"] != 7:
            pass
        assert chunk["pose"] == "w+j*2" and chunk["frames"] == 4
        assert client.frames[0][:2] == b"\xff\xd8"  # JPEG
        client.send("stop")
        until(lambda: pipeline.closed == 1)
        status, headers, data = get(address, f"/video.mp4?session={session}")
        assert (status, headers["content-type"]) == (200, "video/mp4")
        (tmp_path / "video.mp4").write_bytes(data)
        frames, fps = read_mp4(tmp_path / "video.mp4")
        assert frames.shape == (4 * pipeline.chunks, 3, 32, 48) and fps == 16
        assert get(address, "/video.mp4?session=another")[0] == 404
        client.start()  # the same connection plays again
        client.chunk()
        assert get(address, f"/video.mp4?session={session}")[0] == 404
    assert len(pipeline.threads) == 1 and pipeline.opened == pipeline.closed == 2


def test_only_the_latest_part_is_kept(tmp_path):
    pipeline = ToyPipeline(length=5)
    with running(pipeline, Limits(keep_seconds=0.5)) as address, page(address) as client:
        session = client.start()
        client.receive("ended")
        (tmp_path / "video.mp4").write_bytes(get(address, f"/video.mp4?session={session}")[2])
        assert read_mp4(tmp_path / "video.mp4")[0].shape[0] == 8


def test_no_chunk_is_made_before_the_frames_are_shown():
    pipeline = ToyPipeline()
    with running(pipeline, Limits(stall_seconds=0.6)) as address, page(address) as client:
        client.socket.send(START)
        until(lambda: pipeline.chunks == 3)  # 12 frames, half a second is 8
        with pytest.raises(AssertionError):
            until(lambda: pipeline.chunks > 3, 0.3)
        client.send("shown", frame=4)
        until(lambda: pipeline.chunks == 4)
        client.send("shown", frame=4000)
        client.messages.clear()
        with pytest.raises(ConnectionClosed):  # shows no more: dropped
            while True:
                message = client.socket.recv(timeout=10)
                client.messages += [json.loads(message)] if isinstance(message, str) else []
        errors = [m["message"] for m in client.messages if m["type"] == "error"]
        assert errors == [
            "shown: frame must be from 4 to the 16 sent so far, got 4000",
            "nothing was shown for 0.6 seconds",
        ]
        until(lambda: pipeline.closed == 1)


def test_the_next_client_waits_for_its_turn_and_places_are_bounded():
    pipeline = ToyPipeline(seconds=0.002)
    with running(pipeline, Limits(clients=3)) as address, page(address) as first:
        first.start()
        first.chunk()
        with page(address) as second, page(address) as third:
            second.socket.send(START)
            assert second.receive("waiting")["ahead"] == 1
            third.socket.send(START)
            assert third.receive("waiting")["ahead"] == 2
            with connect(address.ws, origin=address.origin) as fourth:
                assert json.loads(fourth.recv(timeout=5))["message"] == "all 3 places are taken"
                with pytest.raises(ConnectionClosed):
                    fourth.recv(timeout=5)
            second.vanish()  # while it waits
            assert third.receive("waiting")["ahead"] == 1
            first.chunk()
            first.send("stop")
            third.receive("started")
            third.chunk()
    assert pipeline.opened == pipeline.closed == 2


def test_errors_of_the_model_reach_the_page_and_the_server_lives():
    with running(ToyPipeline(length=2)) as address, page(address) as client:
        client.send("start", prompt="refused", seed=0)
        assert client.receive("error")["message"] == "prompt must be something else"
        client.receive("ended")
        client.start()
        client.chunk()
        client.receive("ended")


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_abrupt_disconnects_and_malformed_messages_leave_nothing_behind():
    pipeline = ToyPipeline(seconds=0.001)
    with running(pipeline, Limits(queue=8)) as address:

        def disconnect(i: int) -> None:
            with page(address) as client:
                if i % 4:
                    client.socket.send(START)
                if i % 4 > 1:
                    client.receive("started")
                if i % 4 > 2:
                    client.chunk()
                client.vanish()

        def nonsense(count: int) -> str:
            with page(address) as client:
                session = client.start()
                for i in range(count):
                    client.socket.send(b"\x00\xff" if i % 20 == 19 else MALFORMED[i % len(MALFORMED)][0][:MAX_MESSAGE])
                    message = client.receive("error")["message"]
                    assert message and "\n" not in message
                client.chunk()  # this very connection still plays
                return session

        def at_rest() -> tuple[int, int, int, set]:
            until(lambda: pipeline.opened == pipeline.closed and not address.server.server_state.connections)
            return live_tensors()[0], resident_bytes(), threading.active_count(), set(os.listdir("/proc/self/fd"))

        for i in range(8):
            disconnect(i)
        nonsense(40)
        tensors, resident, threads, files = at_rest()
        for i in range(100):
            disconnect(i)
        session = nonsense(1000)
        _, resident_now, threads_now, files_now = at_rest()
        assert get(address, f"/video.mp4?session={session}")[0] == 404  # its frames are gone, too
        assert threads_now <= threads and len(files_now) <= len(files)
        until(lambda: live_tensors()[0] <= tensors)  # the encoder may still hold the last chunk of a stream that was dropped
        assert resident_now - resident < 8 << 20
        with page(address) as client:  # the next client works
            client.start()
            client.chunk()
    assert pipeline.opened == pipeline.closed


def test_a_message_that_is_too_long_ends_the_connection_only():
    pipeline = ToyPipeline()
    with running(pipeline) as address:
        with page(address) as client:
            client.start()
            client.socket.send("x" * (MAX_MESSAGE + 1))
            with pytest.raises(ConnectionClosed):
                while True:
                    client.socket.recv(timeout=5)
        with page(address) as client:
            client.start()
            client.chunk()


def test_a_client_that_takes_no_data_is_dropped():
    pipeline = ToyPipeline(height=256, width=384)
    with running(pipeline, Limits(stall_seconds=0.7)) as address:
        client = connect(address.ws, origin=address.origin, compression=None, max_queue=1).__enter__()
        client.send(START)
        until(lambda: pipeline.chunks == 3)
        try:
            while pipeline.closed == 0:  # it claims to show what it never reads
                client.send(json.dumps({"type": "shown", "frame": 4 * (pipeline.chunks - 1)}))
                time.sleep(0.005)
        except ConnectionClosed:
            pass
        until(lambda: pipeline.closed == 1)
        until(lambda: not address.server.server_state.connections, 5)  # nothing waits for it
        assert pipeline.chunks * 4 * 50_000 > 1 << 20  # it was data that it did not take
        client.socket.close()
        client.recv_events_thread.join(5)


def test_who_is_let_in_on_this_machine():
    with running(ToyPipeline()) as address:
        assert address.url == f"http://127.0.0.1:{address.port}/"
        status, headers, body = get(address, "/")
        assert status == 200 and b"<canvas" in body and "default-src 'none'" in headers["content-security-policy"]
        assert get(address, "/", Host=f"localhost:{address.port}")[0] == 200
        for host in ("evil.example", f"evil.example:{address.port}", "127.0.0.1.evil.example", "", "["):
            assert get(address, "/", Host=host)[0] in (400, 403)
        assert get(address, "/docs")[0] == 404
        for origin in ("http://evil.example", f"http://127.0.0.1:{address.port + 1}", "null", None):
            with pytest.raises(InvalidStatus, match="403"), connect(address.ws, origin=origin):
                pass


@pytest.mark.parametrize("given", [None, "given & chosen"])
def test_another_host_asks_for_a_token(given):
    with running(ToyPipeline(), host="0.0.0.0", token=given) as address:
        assert address.query.startswith("token=") and len(address.query) > 15
        assert get(address, f"/?{address.query}", Host="a.name")[0] == 200
        for query in ("", "?token=", "?token=wrong", f"?{address.query}x", "?token=%ff"):
            for path in ("/", "/video.mp4"):
                status, _, body = get(address, path + query)
                assert status == 403 and b"?token=" in body and address.query.encode() not in body
            with pytest.raises(InvalidStatus, match="403"), connect(f"{address.origin}/ws{query}".replace("http", "ws")):
                pass
        with page(address) as client:
            client.start()
            client.chunk()


def test_the_token_is_a_new_one_every_time():
    with running(ToyPipeline(), host="0.0.0.0") as one, running(ToyPipeline(), host="0.0.0.0") as two:
        assert one.query != two.query and len(one.query) >= len("token=") + 32
