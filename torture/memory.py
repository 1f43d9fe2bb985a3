"""Memory is bounded by arithmetic: bombs, a million one-byte chunks, many large bodies at once."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections import Counter

import numpy as np
from PIL import Image

from benchmarks.server import ServerProcess
from torture.target import Finding, now, pictures, post, read_answer

BYTES_PER_PIXEL = 24
"""Most that decoding takes of one pixel; docs/settings.md states the bound with it."""

GROWTH_MIB = 2
"""Least that is called growth: what a few large requests that meet by chance take more than those before."""

MIB = 1024 * 1024
_WORKERS = 2
_FEW = [(picture, "image/webp") for picture in pictures()[:8]]


def _bombs(pixels: int) -> list[bytes]:
    """Small files that decode to so many pixels, in the modes that take most."""
    side = int(pixels**0.5)
    found = []
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("LA", "PNG")):
        buffer = io.BytesIO()
        Image.new(mode, (side, side)).save(buffer, kind)
        found.append(buffer.getvalue())
    return found


async def _send_all(port: int, bodies: list[tuple[bytes, str]]) -> list[int]:
    """Statuses of these bodies, with their types, sent at once."""

    async def one(body: bytes, content_type: str) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(body, content_type, "X-Deadline-Ms: 600000", close=True))
        status, _, _ = await read_answer(reader)
        writer.close()
        return status

    return await asyncio.gather(*(one(*body) for body in bodies))


def bombs() -> Finding:
    """64 pictures at the pixel limit at once; the peak must stay below what the settings imply."""
    pixels, held = 24_000_000, 64 * MIB
    with ServerProcess(workers=_WORKERS, max_pixels=pixels, max_held_bytes=held) as server:
        asyncio.run(_send_all(server.port, _FEW))
        base = server.memory_mib()
        kinds = _bombs(pixels)
        statuses = asyncio.run(_send_all(server.port, [(kinds[i % len(kinds)], "image/png") for i in range(64)]))
        peak = server.memory_mib("VmHWM")
    bound = base + (held + _WORKERS * pixels * BYTES_PER_PIXEL) / MIB
    figure = (
        f"64 pictures of {pixels // 10**6} megapixels at once, {_WORKERS} workers: peak {peak:.0f} MiB, bound {bound:.0f} MiB "
        f"(idle {base:.0f}); answers {sorted(set(statuses))}"
    )
    return Finding(
        "64 bombs at once stay within the settings' bound",
        figure,
        peak <= bound and set(statuses) <= {200, 503} and 200 in statuses,
    )


def failures() -> Finding:
    """64 pictures that fail at their last bytes, from clients that stay: what was decoded must be gone all the same."""
    pixels, count = 24_000_000, 64
    picture = _bombs(pixels)[0][:-1000]

    async def fail_and_stay(server: ServerProcess) -> tuple[list[int], float]:
        statuses, writers = [], []
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writers.append(writer)
            writer.write(post(picture, "image/png", "X-Deadline-Ms: 600000"))
            statuses.append((await read_answer(reader))[0])
        after = server.memory_mib()
        for writer in writers:
            writer.close()
        return statuses, after

    with ServerProcess(workers=_WORKERS, max_pixels=pixels) as server:
        asyncio.run(_send_all(server.port, _FEW))
        base = server.memory_mib()
        statuses, after = asyncio.run(fail_and_stay(server))
    figure = (
        f"{count} pictures of {pixels // 10**6} megapixels, cut off at the end, whose clients stay: {base:.0f} MiB before, "
        f"{after:.0f} after; answers {sorted(set(statuses))}"
    )
    return Finding("Pictures that fail are not kept", figure, after < base + 32 and set(statuses) == {422})


def large_bodies() -> Finding:
    """64 clients send 16 MiB each, half of them JSON; what is held at once must stay bounded."""
    held = 64 * MIB
    text = json.dumps({"images": [base64.b64encode(bytes(12 * MIB - 64)).decode()]}).encode()
    with ServerProcess(max_held_bytes=held) as server:
        asyncio.run(_send_all(server.port, _FEW))
        base = server.memory_mib()
        kinds = [(b"\0" * 16 * MIB, "image/png"), (text, "application/json")]
        statuses = asyncio.run(_send_all(server.port, kinds * 32))
        peak = server.memory_mib("VmHWM")
    bound = base + 4 * held / MIB
    figure = f"64 bodies of 16 MiB at once: peak {peak:.0f} MiB, bound {bound:.0f} MiB; answers {sorted(set(statuses))}"
    return Finding("Bodies held at once are bounded", figure, peak <= bound and {503} < set(statuses))


def chunks() -> Finding:
    """A million chunks of one byte, each in a segment of its own as far as the kernel allows."""
    count = 1_000_000
    with ServerProcess() as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n")  # this way has been gone before
        while not connection.recv(65536).endswith(b"}"):
            pass
        before = server.memory_mib()
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        begin, peak = now(), before
        for _ in range(count // 100):
            connection.sendall(b"1\r\nx\r\n" * 100)
        peak = max(peak, server.memory_mib())
        connection.sendall(b"0\r\n\r\n")
        answer = connection.makefile("rb").readline().decode().strip()
        seconds = now() - begin
        after = server.memory_mib()
    growth = max(peak, after) - before - count / MIB
    figure = f"{count:,} chunks of one byte in {seconds:.0f} s: {growth:+.2f} MiB beyond the body itself; answered {answer}"
    return Finding("A million one-byte chunks cost no more than their bytes", figure, growth < 1)


def soak(seconds: float) -> Finding:
    """Mixed load; memory of the second half must not grow."""
    rng = np.random.default_rng(0)
    good = pictures()
    large = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (1500, 1500, 3), dtype=np.uint8)).save(large, "JPEG")
    bad = [b"x" * 1000, good[0][:100], b"\x89PNG\r\n\x1a\n" + b"\0" * 200, large.getvalue()[:-1000]]
    part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n'
    texts = [base64.b64encode(picture).decode() for picture in good[:2]]
    tensor = {"name": "encoded_images", "shape": [2], "datatype": "BYTES", "data": texts}
    rare = {
        1: post(large.getvalue(), "image/jpeg"),
        2: post(part + good[0] + b"\r\n" + part + good[1] + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        4: post(json.dumps({"images": texts}).encode(), "application/json"),
        5: post(good[0], "image/webp", path="/classify?explain=true"),
        7: post(json.dumps({"inputs": [tensor]}).encode(), "application/json", path="/v2/models/fast/infer"),
    }
    samples: list[float] = []
    wrong: Counter[str] = Counter()

    def request(number: int) -> tuple[bytes, int]:
        """The next of the mixture, and the status of its answer."""
        if number % 3 == 0:
            which = number // 3 % len(bad)
            return post(bad[which], "image/png"), 422 if which % 2 else 415
        return rare.get(number % 40) or post(good[number % len(good)], "image/webp"), 200

    async def client(server: ServerProcess, number: int, end: float) -> int:
        sent = 0
        while now() < end:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for _ in range(20):
                sent += 1
                wire, expected = request(sent + number)
                writer.write(wire)
                status, _, _ = await read_answer(reader)
                wrong[f"{status} for {expected}"] += status != expected
            writer.close()
        return sent

    async def run(server: ServerProcess) -> int:
        end = now() + seconds

        async def watch() -> int:
            while now() < end:
                await asyncio.sleep(seconds / 40)
                samples.append(server.memory_mib())
            return 0

        return sum(await asyncio.gather(watch(), *(client(server, number, end) for number in range(8))))

    with ServerProcess() as server:
        sent = asyncio.run(run(server))
    half = len(samples) // 2
    middle, last = max(samples[half // 2 : half]), max(samples[-half // 2 :])
    figure = (
        f"{sent:,} requests of every kind in {seconds:.0f} s: {middle:.1f} MiB at most before half-time, {last:.1f} at the end; "
        f"unexpected answers: {dict(+wrong) or 0}"
    )
    return Finding("Mixed load does not make it grow", figure, last <= middle + GROWTH_MIB and not +wrong)
