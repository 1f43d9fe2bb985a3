"""The Python client without the service: what it imports, how it encodes, and how it waits, against a scripted socket."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from app.client import (
    AsyncClient,
    ClassificationError,
    Client,
    ClientClosed,
    DeadlineExceeded,
    Health,
    ImageRejected,
    Overloaded,
    RequestFailed,
    Unauthorized,
    Unreachable,
)
from app.client.exchange import BACKOFF_S, Contact, Options, Pause, Send, exchange
from app.client.images import Picture, batches, encode, load
from app.images import DecodeLimits, ResizeRule, decode_image
from tests.server import ScriptedServer

ANSWER = {
    "model": {"name": "m", "version": "1"},
    "predictions": [{"index": 0, "label": "cat", "confidence": 1.0, "top_k": [], "warnings": []}],
    "request_id": "r",
}
BUSY = {"status": 503, "code": "overloaded", "detail": "full", "request_id": "busy"}


def test_importing_it_brings_neither_the_server_nor_what_only_some_callers_have():
    code = "import sys, app.client; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {
        "fastapi",
        "starlette",
        "uvicorn",
        "uvloop",
        "onnxruntime",
        "pydantic",
        "numpy",
        "PIL",
        "typer",
        "prometheus_client",
    }
    assert not foreign & set(result.stdout.split())


def test_serving_does_not_import_it():
    code = "import sys, app.main, app.server, app.cli; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"app.client", "app.cli_classify", "app.cli_writers", "app.load", "httpx", "pyarrow", "rich"} & set(
        result.stdout.split()
    )


def test_an_orientation_in_xmp_alone_turns_a_picture_no_more_than_its_file():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>')
    with Image.open(buffer) as image:
        assert image.getexif()[0x0112] == 6, "Pillow takes it"
        sent = encode(image)
    assert 0x0112 not in Image.open(io.BytesIO(sent)).getexif()


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_pixels_are_sent_without_loss(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for image in (pixels, Image.fromarray(pixels)):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(image)))), pixels)


GREY = np.arange(0, 256, 4, np.uint8).reshape(8, 8)
FADING = np.ascontiguousarray(GREY.T)


def as_mode(mode: str) -> Image.Image:
    """GREY as a Pillow image; FADING is how much of it shows, where the mode has that."""
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (8, 8), (GREY.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode == "I":
        return Image.fromarray(GREY.astype(np.int32) * 257)
    grey = Image.fromarray(GREY)
    if mode in {"LA", "La", "RGBA", "RGBa"}:
        clear = grey.convert("LA" if mode.startswith("L") else "RGBA")
        clear.putalpha(Image.fromarray(FADING))
        return clear.convert(mode)
    if mode == "PA":
        clear = grey.convert("P").convert("PA")
        clear.putalpha(Image.fromarray(FADING))
        return clear
    return grey.convert("RGB").convert(mode) if mode in {"CMYK", "HSV", "YCbCr"} else grey.convert(mode)


@pytest.mark.parametrize(
    "mode",
    [
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "HSV",
        "F",
        "I",
        "I;16",
        "I;16B",
        "I;16L",
        "I;16N",
    ],
)
def test_the_service_sees_a_pillow_image_of_any_mode_as_it_is(mode):
    pixels = decode_image(encode(as_mode(mode)), ResizeRule(8), DecodeLimits(64, 8)).pixels
    shown = FADING / 255.0 if mode.lower().endswith("a") else 1.0
    expected = (GREY * shown + 255 * (1 - shown))[..., None].repeat(3, axis=2)
    assert np.abs(pixels - expected).max() <= 2  # what is multiplied by how much shows was rounded, and so is YCbCr


def test_black_and_white_is_sent_without_loss():
    bits = Image.fromarray(GREY).convert("1")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(bits)))), np.asarray(bits))


ASCII, SHORT, SSHORT, FLOAT = 2, 3, 8, 11
ORIENTATION = 0x0112


def photo(*tags: tuple[int, int, object]) -> bytes:
    """A JPEG of 8 x 4 pixels, its left half red.

    Args:
        *tags: of EXIF: number, type, value.
    """
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, kind, value in tags:
        directory.tagtype[tag] = kind
        directory[tag] = value
    image, buffer = Image.new("RGB", (8, 4), "blue"), io.BytesIO()
    image.paste("red", (0, 0, 4, 4))
    image.save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8), quality=95, subsampling=0)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "tags",
    [
        [(ORIENTATION, SHORT, 6)],
        [(ORIENTATION, SHORT, 6), (282, ASCII, "72")],
        [(ORIENTATION, SHORT, 6), (296, ASCII, "2")],
        [(ORIENTATION, SHORT, 6), (256, FLOAT, 4.5)],
        [(ORIENTATION, ASCII, "6")],
        [(ORIENTATION, SSHORT, -1)],
        [(ORIENTATION, SHORT, 9)],
    ],
)
def test_a_photo_that_pillow_opened_is_seen_as_its_file_is_whatever_its_exif_says(tags):
    data = photo(*tags)
    sent = load(0, Image.open(io.BytesIO(data)))
    assert isinstance(sent, Picture)
    rule, limits = ResizeRule(4, "squash", "box"), DecodeLimits(64, 8)
    assert np.array_equal(decode_image(sent.data, rule, limits).pixels, decode_image(data, rule, limits).pixels)


def test_of_exif_the_orientation_alone_is_sent():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "a maker"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    image = Image.new("RGB", (4, 8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert dict(Image.open(io.BytesIO(encode(Image.open(buffer)))).getexif()) == {ORIENTATION: 6}


def test_a_tiff_which_pillow_turns_upright_itself_is_not_turned_twice(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (4, 8)).save(tmp_path / "a.tiff", exif=exif)
    sent = Image.open(io.BytesIO(encode(Image.open(tmp_path / "a.tiff"))))
    assert (sent.size, dict(sent.getexif())) == ((8, 4), {})


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_another_kind_are_refused(pixels):
    with pytest.raises(ValueError, match="must be uint8"):
        encode(pixels)


def test_what_is_no_image_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="not int"):
        list(batches([7], 2))


def test_an_image_on_which_pillow_raises_a_type_error_is_reported_in_its_place():
    class Odd(Image.Image):
        def load(self) -> None:
            raise TypeError("bad operand type for abs(): 'str'")

    (batch,) = batches([Odd(), b"good"], 2)
    bad, good = batch.entries
    assert (bad.index, bad.code, bad.detail) == (0, "unreadable", "cannot be read: bad operand type for abs(): 'str'")
    assert good.data == b"good"


def test_a_reused_buffer_is_copied_before_the_next_is_asked_for():
    buffer = np.zeros((2, 2), np.uint8)

    def frames():
        for value in (1, 2, 3):
            buffer[:] = value
            yield buffer

    (batch,) = batches(frames(), 10)
    assert [np.asarray(Image.open(io.BytesIO(p.data)))[0, 0] for p in batch.pictures()] == [1, 2, 3]


def test_large_images_travel_in_smaller_batches():
    sizes = [len(batch.entries) for batch in batches([b"x" * 3_000_000] * 4 + [b"x"] * 5, 4)]
    assert sizes == [2, 2, 4, 1]


def test_retry_after_is_waited_for_and_the_deadline_shrinks():
    server = ScriptedServer((503, {"Retry-After": "1"}, BUSY), None, (200, {}, ANSWER))
    with Client(server.url, deadline_s=20) as client:
        assert client.classify(b"image").label == "cat"
    head, _, last_head = server.finish()
    deadlines = [int(h.partition("x-deadline-ms: ")[2].partition("\r\n")[0]) for h in (head, last_head)]
    assert 10_000 < deadlines[0] <= 20_000
    assert deadlines[1] <= deadlines[0] - 1000


def test_a_proxys_failure_is_tried_again_and_a_deadline_that_passed_is_not():
    server = ScriptedServer((502, {}, b"<html>"), (200, {}, ANSWER))
    with Client(server.url) as client:
        assert client.classify(b"image").label == "cat"
    assert len(server.finish()) == 2
    late = {"status": 504, "code": "deadline_exceeded", "detail": "late", "request_id": "a"}
    server = ScriptedServer((504, {}, late))
    with Client(server.url) as client, pytest.raises(DeadlineExceeded, match="late"):
        client.classify(b"image")
    assert len(server.finish()) == 1


def test_a_failure_comes_whole_out_of_another_process():
    """A pool of processes pickles it."""
    for kind in (RequestFailed, ImageRejected, Unauthorized, Overloaded, DeadlineExceeded):
        failure = kind(503, "overloaded", "full", request_id="busy", retry_after_s=2.0)
        copy = pickle.loads(pickle.dumps(failure))  # noqa: S301 - our own
        assert (type(copy), vars(copy), str(copy)) == (kind, vars(failure), "overloaded: full")


def test_what_never_ends_its_answer_is_not_waited_for(monkeypatch):
    """E.g. a camera's address: every piece comes in time, and there is always another."""
    monkeypatch.setattr("app.client.asynchronous.PROBE_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def stream() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.01)

        threading.Thread(target=stream).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match=r"no answer from .* within 0\.3 s"):
            client.model()


def test_a_pause_that_the_server_did_not_ask_for_is_short():
    conversation = exchange([Picture(0, None, b"image")], Options(top_k=1, explain=False, deadline_s=20), Contact())
    assert isinstance(next(conversation), Send)
    told = conversation.send(httpx.Response(503, headers={"Retry-After": "1"}, json=BUSY))
    assert isinstance(told, Pause)
    assert told.seconds >= 1
    assert isinstance(conversation.send(None), Send)
    own = conversation.send(httpx.ReadError("closed"))
    assert isinstance(own, Pause)
    assert own.seconds <= 2 * BACKOFF_S


POST = httpx.Request("POST", "http://127.0.0.1/classify")
BATCH = [Picture(number, None, b"image %d" % number) for number in range(4)]


def test_no_half_is_sent_after_the_deadline():
    conversation = exchange(BATCH, Options(top_k=1, explain=False, deadline_s=0.1), Contact())
    assert isinstance(next(conversation), Send)
    time.sleep(0.1)
    with pytest.raises(StopIteration) as ended:
        conversation.send(httpx.Response(413, json=BUSY | {"status": 413, "code": "body_too_large"}, request=POST))
    assert [type(failure) for failure in ended.value.value] == [Unreachable] * 4


@pytest.mark.parametrize("reply", [httpx.ConnectError("Connection refused"), httpx.Response(429, text="slow down", request=POST)])
def test_what_is_no_fault_of_the_batch_is_tried_again_whole(reply):
    """While a service restarts nobody listens, and who limits requests refuses more of halves."""
    contact = Contact()
    conversation = exchange(BATCH, Options(top_k=1, explain=False, deadline_s=600), contact)
    told = next(conversation)
    for _ in range(4):
        assert isinstance(told, Send)
        assert all(picture.data in told.content for picture in BATCH)
        contact.answered = time.monotonic()  # of another batch
        assert isinstance(conversation.send(reply), Pause)
        told = conversation.send(None)


def test_one_picture_that_pillow_opened_may_be_asked_about_twice_at_once():
    buffer = io.BytesIO()
    Image.effect_noise((600, 600), 50).save(buffer, "JPEG")
    for _ in range(20):
        image = Image.open(io.BytesIO(buffer.getvalue()))
        together = threading.Barrier(2)

        def sent(image: Image.Image = image, together: threading.Barrier = together) -> bytes:
            together.wait(30)
            return encode(image)

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.submit(sent), pool.submit(sent)
            assert first.result() == second.result()


def test_an_array_of_paths_is_several_images():
    assert [p.data for p in next(batches(np.array([b"one", b"two"]), 2)).pictures()] == [b"one", b"two"]
    with Client("http://127.0.0.1:1") as client:
        client.classify_many(np.array(["a.png", "b.png"], dtype=object))
        with pytest.raises(TypeError):
            client.classify_many(np.zeros((4, 4, 3), np.uint8))


def test_the_path_of_a_url_comes_before_the_services():
    server = ScriptedServer((200, {}, ANSWER), (200, {}, ANSWER))
    for path in ("/vision", "/vision/"):
        with Client(server.url + path) as client:
            client.classify(b"image")
    assert [head.partition("?")[0] for head in server.finish()] == ["post /vision/classify"] * 2


def test_a_key_and_a_users_name_exclude_one_another():
    with pytest.raises(ValueError, match="leave one out"):
        Client("http://user:password@127.0.0.1:8000", api_key="key")


def test_a_date_in_retry_after_is_understood():
    conversation = exchange(BATCH[:1], Options(top_k=1, explain=False, deadline_s=3600), Contact())
    assert isinstance(next(conversation), Send)
    date = formatdate(int(time.time()) + 1000, usegmt=True)
    pause = conversation.send(httpx.Response(429, headers={"Retry-After": date}, text="slow down", request=POST))
    assert isinstance(pause, Pause)
    assert 900 < pause.seconds <= 1250


def test_no_further_try_when_the_pause_would_pass_the_deadline():
    conversation = exchange(BATCH[:1], Options(top_k=1, explain=False, deadline_s=30), Contact())
    assert isinstance(next(conversation), Send)
    with pytest.raises(StopIteration) as ended:
        conversation.send(httpx.Response(503, headers={"Retry-After": "60"}, json=BUSY, request=POST))
    (failure,) = ended.value.value
    assert isinstance(failure, Overloaded)
    assert (failure.status, failure.code, failure.detail, failure.request_id) == (503, "overloaded", "full", "busy")
    assert failure.retry_after_s == 60


def test_no_answer_within_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url) as client, pytest.raises(Unreachable, match="no answer"):
            client.classify(b"image", deadline_s=0.2)
        silent.close()
        with Client(url) as client, pytest.raises(Unreachable, match="refused"):
            client.classify(b"image", deadline_s=0.2)


def test_a_batch_too_large_for_the_server_is_sent_in_halves():
    many = {"status": 413, "code": "too_many_images", "detail": "2 images", "request_id": "a"}
    server = ScriptedServer((413, {}, many), (200, {}, ANSWER), (413, {}, many | {"code": "body_too_large"}))
    with Client(server.url, concurrency=1) as client:
        good, bad = client.classify_many([b"a", b"b"])
    assert (good.index, good.label) == (0, "cat")
    assert (bad.index, bad.code, bad.request_id) == (1, "body_too_large", "a")
    assert len(server.finish()) == 3


def test_what_did_not_arrive_in_time_is_sent_in_halves():
    slow = {"status": 408, "code": "receive_timeout", "detail": "30 s", "request_id": "a"}
    server = ScriptedServer((408, {}, slow), (200, {}, ANSWER), (408, {}, slow), (200, {}, ANSWER))
    with Client(server.url, concurrency=1) as client:
        assert [result.label for result in client.classify_many([b"a", b"b"])] == ["cat", "cat"]
    assert len(server.finish()) == 4


def test_a_service_that_was_there_a_moment_ago_fails_images_and_not_the_job():
    server = ScriptedServer((503, {"Retry-After": "0"}, BUSY), (200, {}, ANSWER))
    with Client(server.url, concurrency=1) as client:
        good, bad = client.classify_many([b"a", b"b"], deadline_s=1)
    assert good.label == "cat"
    assert (bad.index, bad.code) == (1, "unreachable")
    assert "no answer" in bad.detail
    server.finish()


class HangsUp(BaseHTTPRequestHandler):
    """Answers what has a tenth of a second, but closes the connection on images that are called poison."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"poison" in body:
            self.close_connection = True
            return
        in_time = int(self.headers["X-Deadline-Ms"]) >= 100
        count = body.count(b"Content-Disposition") or 1
        answer = ANSWER | {"predictions": ANSWER["predictions"] * count} if in_time else {"code": "deadline_exceeded"}
        content = json.dumps(answer).encode()
        self.send_response(200 if in_time else 504)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_that_breaks_the_connection_takes_no_other_with_it(batch_size):
    images = [b"fine"] * 9 + [b"poison"] + [b"fine"] * 9
    with ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}", batch_size=batch_size, deadline_s=3) as client:
            results = list(client.classify_many(images))
        server.shutdown()
    assert [index for index, result in enumerate(results) if isinstance(result, ClassificationError)] == [9]
    assert results[9].code == "unreachable"


def test_a_server_without_tls_is_said_to_be_one():
    with ThreadingHTTPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"https://user:secret@127.0.0.1:{server.server_port}") as client, pytest.raises(Unreachable) as caught:
            client.model()
        server.shutdown()
    assert "TLS failed: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_answer_that_comes_byte_by_byte_does_not_outlast_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def dribble() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while True:  # until the client has closed
                    connection.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=dribble)
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}") as client, pytest.raises(Unreachable, match="deadline"):
            client.classify(b"image", deadline_s=0.2)
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_came_before_a_source_failed_is_told(asynchronous):
    def source() -> Iterator[bytes]:
        yield b"a"
        yield b"b"
        raise OSError("the disk is gone")

    server = ScriptedServer((200, {}, ANSWER), (200, {}, ANSWER))
    results: list[object] = []

    def run() -> None:
        with Client(server.url, batch_size=1) as client:
            for result in client.classify_many(source()):
                results.append(result)  # noqa: PERF402 (extend would append none of them if one raises)

    async def run_async() -> None:
        async with AsyncClient(server.url, batch_size=1) as client:
            async for result in client.classify_many(source()):
                results.append(result)  # noqa: PERF401

    with pytest.raises(OSError, match="the disk is gone"):
        asyncio.run(run_async()) if asynchronous else run()
    assert len(results) == 2
    server.finish()


def test_a_live_stream_has_its_answers_before_the_next_image_comes():
    """The source waits for them."""
    server = ScriptedServer(*[(200, {}, ANSWER)] * 3)

    async def run() -> int:
        answered = asyncio.Semaphore(0)

        async def camera() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"frame"
                await answered.acquire()

        count = 0
        async with AsyncClient(server.url, batch_size=1) as client:
            async for _ in client.classify_many(camera()):
                count += 1
                answered.release()
        return count

    assert asyncio.run(asyncio.wait_for(run(), 60)) == 3
    server.finish()


def test_a_plain_generator_that_waits_for_its_next_image_holds_neither_the_answers_nor_the_loop():
    server = ScriptedServer(*[(200, {}, ANSWER)] * 3)
    answered, threads = threading.Semaphore(0), set()

    def camera() -> Iterator[bytes]:
        for _ in range(3):
            threads.add(threading.current_thread())
            yield b"frame"
            assert answered.acquire(timeout=20), "the answer was held back"

    async def run() -> int:
        count = 0
        async with AsyncClient(server.url, batch_size=1) as client:
            async for _ in client.classify_many(camera()):
                count += 1
                answered.release()
        return count

    assert asyncio.run(run()) == 3
    assert len(threads) == 1  # what it opens may be bound to its thread, as sqlite is
    server.finish()


def test_whoever_leaves_need_not_wait_for_one_more_image():
    server = ScriptedServer((200, {}, ANSWER))
    motion, threads = threading.Event(), []

    def camera() -> Iterator[bytes]:
        threads.append(threading.current_thread())
        yield b"frame"
        motion.wait(20)
        yield b"another"

    async def run() -> None:
        async with AsyncClient(server.url, batch_size=1) as client, aclosing(client.classify_many(camera())) as stream:
            assert (await anext(stream)).label == "cat"

    asyncio.run(run())
    assert threads[0].is_alive()
    motion.set()
    threads[0].join(20)
    assert not threads[0].is_alive()
    server.finish()


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_taken_without_a_thread(kind):
    class Watched(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for image in super().__iter__():
                threads.append(threading.current_thread())
                yield image

    threads: list[threading.Thread] = []
    server = ScriptedServer((200, {}, ANSWER))

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            assert [result.label async for result in client.classify_many(Watched([b"a"]))] == ["cat"]

    asyncio.run(run())
    assert threads == [threading.current_thread()]
    server.finish()


def test_a_picture_that_pillow_opened_and_cannot_read_is_reported_in_its_place():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)).save(buffer, "PNG")
    data = buffer.getvalue()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    damaged = Image.open(io.BytesIO(data[:second] + b"\0\0\0\0" + data[second + 4 :]))
    (batch,) = batches([b"good", damaged], 2)
    good, bad = batch.entries
    assert good.data == b"good"
    assert (bad.index, bad.code) == (1, "unreadable")


def test_an_empty_file_is_called_what_the_service_calls_it(tmp_path):
    (tmp_path / "empty.png").touch()
    (batch,) = batches([tmp_path / "empty.png", b""], 2)
    assert [(bad.code, bad.detail) for bad in batch.entries] == [("undecodable_image", "the file is empty")] * 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, b"<html>"), "is the address right"),
        ((200, {}, {"predictions": [{}], "request_id": "", "model": {"name": "", "version": ""}}), "is the address right"),
        ((307, {"Location": "https://elsewhere"}, b""), "307 Temporary Redirect"),
        ((599, {}, b""), "599 unknown status"),
        ((404, {}, {"code": "not_found", "detail": "Not Found"}), "not_found: Not Found"),
        ((404, {}, {"code": ["a", "b"], "detail": {"c": 1}}), "'a', 'b'"),
        ((200, {}, {"predictions": [[]], "request_id": "", "model": {"name": "", "version": ""}}), "is the address right"),
        ((200, {}, b"[" * 200_000), "is the address right"),
    ],
)
def test_a_stranger_is_recognised(answer, message):
    server = ScriptedServer(answer)
    with Client(server.url) as client, pytest.raises(RequestFailed, match=message):
        client.classify(b"image")
    server.finish()


@pytest.mark.parametrize("value", ["\N{SUPERSCRIPT TWO}", "1 Jan 99999999999 00:00:00 GMT", "soon"])
def test_what_retry_after_does_not_say_is_not_waited_for(value):
    server = ScriptedServer((503, {"Retry-After": value}, BUSY), (200, {}, ANSWER))
    with Client(server.url) as client:
        assert client.classify(b"image").label == "cat"
    server.finish()


def test_an_answer_that_cannot_be_unpacked_is_asked_for_again():
    damaged = (200, {"Content-Encoding": "gzip"}, b"no gzip")
    server = ScriptedServer(damaged, (200, {}, ANSWER), damaged)
    with Client(server.url) as client:
        assert client.classify(b"image").label == "cat"
        with pytest.raises(Unreachable, match="decompressing"):
            client.model()
    server.finish()


def test_a_proxy_without_a_replica_is_no_reason_to_restart_anything():
    problem = {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "no replica is ready"}
    server = ScriptedServer((503, {"Retry-After": "2"}, problem), (503, {}, problem))
    with Client(server.url) as client, pytest.raises(Overloaded, match="no replica is ready") as caught:
        client.health()
    assert caught.value.status == 503
    server.finish()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(200, {}, {"status": "ok"})] * 2, Health(live=True, ready=True, reason=None)),
        ([(503, {}, {"status": "unavailable", "reason": "dead"})] * 2, Health(live=False, ready=False, reason="dead")),
    ],
)
def test_what_the_service_says_of_itself_is_health(answers, expected):
    server = ScriptedServer(*answers)
    with Client(server.url) as client:
        assert client.health() == expected
    server.finish()


def test_another_service_has_no_health():
    server = ScriptedServer(*[(200, {}, {"status": "green"})] * 2)
    with Client(server.url) as client, pytest.raises(RequestFailed, match="is the address right"):
        client.health()
    server.finish()


@pytest.mark.parametrize(
    "mistake", [httpx.LocalProtocolError("Illegal header value b'secret'"), httpx.UnsupportedProtocol("ftp")]
)
def test_a_request_that_cannot_be_sent_is_not_tried_again_nor_shown(mistake):
    conversation = exchange([Picture(0, None, b"image")], Options(top_k=1, explain=False, deadline_s=20), Contact())
    assert isinstance(next(conversation), Send)
    with pytest.raises(Unreachable) as caught:
        conversation.send(mistake)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    "key", ["one\nsecond", "secret\n", " secret", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", "a\x7f"]
)
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(client, key):
    with pytest.raises(ValueError, match="must be one line of printable ASCII") as caught:
        client(api_key=key)
    assert key.strip() not in str(caught.value)


def test_another_service_is_no_model():
    server = ScriptedServer((200, {}, {"name": "other"}))
    with Client(server.url) as client, pytest.raises(RequestFailed, match="is the address right"):
        client.model()
    server.finish()


def test_closing_ends_a_pause():
    server = ScriptedServer((503, {"Retry-After": "1000"}, BUSY))
    client = Client(server.url, deadline_s=3600)
    failure: list[Exception] = []

    def classify() -> None:
        with pytest.raises(ClientClosed, match="closed") as caught:
            client.classify(b"image")
        failure.append(caught.value)

    thread = threading.Thread(target=classify)
    thread.start()
    server.finish()
    client.close()
    thread.join(30)
    assert failure
    client.close()
    with pytest.raises(ClientClosed, match="closed"):
        client.health()


def test_a_closed_asyncio_client_is_no_programming_error_of_its_own():
    async def use() -> None:
        client = AsyncClient("http://127.0.0.1:1")
        await client.aclose()
        for call in (client.health, client.model, lambda: client.classify(b"image")):
            with pytest.raises(ClientClosed, match="the client was closed"):
                await call()

    asyncio.run(use())


def test_a_client_that_nobody_closes_leaves_no_thread():
    before = set(threading.enumerate())
    clients = [Client("http://127.0.0.1:1") for _ in range(3)]
    threads = set(threading.enumerate()) - before
    assert len(threads) == len(clients)
    clients.clear()
    gc.collect()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


FORK = """
import os
from app.client import Client, ClientClosed
with Client("http://127.0.0.1:1") as client:
    if child := os.fork():
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    try:
        client.model()
    except ClientClosed as error:
        print(error)
"""

LEAVE = """
import asyncio, threading
from app.client import AsyncClient
def camera():
    yield b"image"
    threading.Event().wait()
async def main():
    async with AsyncClient("http://127.0.0.1:1", deadline_s=0.1, batch_size=1) as client:
        try:
            async for _ in client.classify_many(camera()):
                pass
        except Exception as error:
            print(error)
asyncio.run(main())
"""


@pytest.mark.parametrize(("code", "said"), [(FORK, "made before this process was forked"), (LEAVE, "Connection refused")])
def test_a_program_ends(code, said):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    "image",
    ["cat.png", Path("cat.png"), b"image", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), Image.new("L", (8, 8))],
)
def test_one_image_is_not_taken_for_many(client, image):
    with pytest.raises(TypeError, match="classify_many takes several"):
        client("http://127.0.0.1:1").classify_many(image)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "localhost:8000"},
        {"url": "http://"},
        {"url": "http://127.0.0.1:80a0"},
        {"url": "http://127.0.0.1:99999"},
        {"url": "http://127.0.0.1:0"},
        {"deadline_s": 0},
        {"deadline_s": 3601},
        {"concurrency": 0},
        {"batch_size": 0},
    ],
)
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_bad_arguments_are_refused_at_once(client, options):
    with pytest.raises(ValueError, match=r"begins with http|(deadline_s|concurrency|batch_size) must be"):
        client(**options)


def test_parameters_are_checked_before_anything_is_sent():
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="top_k"):
            client.classify_many(itertools.repeat(b""), top_k=0)
        with pytest.raises(ValueError, match="deadline_s"):
            client.classify(b"", deadline_s=0)
        with pytest.raises(Unreachable, match="no answer from"):
            client.model()
