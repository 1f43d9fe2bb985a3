"""Any bytes get a clean answer: mutated images, forms, JSON, tensors, queries, headers and whole requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.server import REPOSITORY, ServerProcess
from torture.target import Finding, now, pictures, post, read_answer

CONNECTIONS = 16
LIMIT_S = 2.0
KEPT = REPOSITORY / "torture-findings"
_ALLOWED = {200, 400, 404, 405, 408, 413, 415, 422, 431}
_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "application/octet-stream"]


def seeds(folder: Path | None = None) -> list[bytes]:
    """Small pictures of every format and mode read, crafted ones, and every file of `folder` up to 300 kB."""
    base = Image.open(io.BytesIO(pictures()[0])).convert("RGB").resize((48, 40))
    ImageDraw.Draw(base).ellipse((8, 8, 30, 30), fill="red")
    found = pictures()[:20] + _crafted()

    def add(image: Image.Image, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())

    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        add(base.convert(mode), "PNG")
    add(Image.new("I;16", (48, 40), 30_000), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("L", "RGB", "CMYK"):
        for progressive in (False, True):
            add(base.convert(mode), "JPEG", progressive=progressive, exif=exif)
    add(base, "MPO", save_all=True, append_images=[base.rotate(90)])
    frames = [base.rotate(10 * i) for i in range(5)]
    for kind in ("GIF", "WEBP", "PNG"):
        add(base, kind, save_all=True, append_images=frames)
    add(base.convert("RGBA"), "WEBP", lossless=True)
    for mode in ("1", "L", "P", "RGB"):
        add(base.convert(mode), "BMP")
    if folder:
        found += [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and 0 < path.stat().st_size < 300_000]
    return found


def _crafted() -> list[bytes]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *extra: bytes, rows: bytes = b"") -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    bomb = zlib.compress(b"a" * 20_000_000)
    return [
        png(1, 1, chunk(b"zTXt", b"k\0\0" + bomb), rows=b"\0\0"),
        png(1, 1, chunk(b"iTXt", b"k\0\1\0\0\0" + bomb), rows=b"\0\0"),
        png(1, 1, chunk(b"iCCP", b"k\0\0" + bomb), rows=b"\0\0"),
        png(20_000, 1, rows=b"\0" * 20_001),
        png(1, 20_000, rows=b"\0\0" * 20_000),
        png(2**31 - 1, 2**31 - 1),
        png(0, 0),
        png(7000, 7000, rows=bytes(7001 * 7000)),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;",
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, -(2**31), -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"%PDF-1.4\n" + pictures()[0],
        b"II*\0" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ]


class Mutator:
    """Damages what it is given.

    Args:
        seed: of its random numbers.
        corpus: whole pictures.
    """

    def __init__(self, seed: int, corpus: list[bytes]) -> None:
        self.random = random.Random(seed)
        self.corpus = corpus

    def damage(self, data: bytes) -> bytes:
        """One to four changes: bytes flipped, cut off, doubled, taken from another picture, numbers at their extremes."""
        value = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(value) + 1)
            choice = self.random.randrange(6)
            if choice == 0 and value:
                value[at % len(value)] ^= 1 << self.random.randrange(8)
            elif choice == 1:
                del value[at:]
            elif choice == 2:
                value[at:at] = value[at : at + self.random.randrange(64)]
            elif choice == 3:
                other = self.random.choice(self.corpus)
                begin = self.random.randrange(len(other) + 1)
                value[at : at + 16] = other[begin : begin + self.random.randrange(64)]
            elif choice == 4:
                value[at : at + 4] = self.random.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
            else:
                del value[at : at + self.random.randrange(32)]
        return bytes(value)

    def request(self) -> bytes:
        """One whole request, closing its connection."""
        picture = self.random.choice(self.corpus)
        return self.random.choices(
            [self._raw, self._form, self._json, self._open_inference, self._parameters, self._wire],
            weights=[50, 10, 10, 15, 5, 10],
        )[0](picture)

    def _raw(self, picture: bytes) -> bytes:
        return post(self.damage(picture), self.random.choice(_TYPES), close=True)

    def _form(self, picture: bytes) -> bytes:
        part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        whole = part + picture + b"\r\n" + part + self.damage(picture) + b"\r\n--b--\r\n"
        body = self.damage(whole) if self.random.random() < 0.5 else whole
        return post(body, "multipart/form-data; boundary=b", close=True)

    def _json(self, picture: bytes) -> bytes:
        texts = [base64.b64encode(self.damage(picture)).decode(), base64.b64encode(picture).decode()]
        whole = json.dumps({"images": texts}).encode()
        body = self.damage(whole) if self.random.random() < 0.5 else whole
        return post(body, "application/json", close=True)

    def _open_inference(self, picture: bytes) -> bytes:
        """Files or pixels, as JSON or as bytes behind it, compressed or not; one of the parts damaged."""
        size = self.random.choice([1, 2])
        pixels, files = bytes(size * 32 * 32 * 3), (struct.pack("<I", len(picture)) + picture) * size
        wanted: dict[str, object] = {"name": "images", "shape": [size, 32, 32, 3], "datatype": "UINT8"}
        data = pixels
        if self.random.random() < 0.5:
            wanted, data = {"name": "encoded_images", "shape": [size], "datatype": "BYTES"}, files
        document = {"id": "1", "inputs": [wanted], "outputs": [{"name": "logits"}, {"name": "class_maps"}]}
        headers = []
        if self.random.random() < 0.7:
            wanted["parameters"] = {"binary_data_size": len(data)}
            head = json.dumps(document).encode()
            length = len(head)
            if self.random.random() < 0.5:
                head = self.damage(head)
            else:
                data = self.damage(data)
            headers.append(f"Inference-Header-Content-Length: {length}")
            body = head + data
        else:
            wanted["data"] = [0] * len(pixels) if data is pixels else [base64.b64encode(picture).decode()] * size
            body = self.damage(json.dumps(document).encode())
        if self.random.random() < 0.3:
            body = zlib.compress(body)
            headers.append("Content-Encoding: deflate")
            body = self.damage(body) if self.random.random() < 0.3 else body
        return post(body, "application/octet-stream", *headers, path="/v2/models/fast/infer", close=True)

    def _parameters(self, picture: bytes) -> bytes:
        value = self.random.choice(["0", "-1", "1e9", "9" * 400, "%00", "true", "é".encode().hex(), "1&top_k=2", ""])
        path = f"/classify?{self.random.choice(['top_k', 'explain', 'x', ''])}={value}"
        name = self.random.choice(["X-Deadline-Ms", "X-Request-ID", "Accept", "Content-Encoding", "X-A"])
        return post(picture, "image/png", f"{name}: {value}", path=path, close=True)

    def _wire(self, picture: bytes) -> bytes:
        head, _, body = post(picture, "image/png", close=True).partition(b"\r\n\r\n")
        return b"\r\n" + self.damage(head + b"\r\n\r\n") + body  # an empty line before a request is allowed (RFC 9112, 2.2)


def _head_is_whole(wire: bytes) -> bool:
    return wire.startswith((b"POST /classify", b"POST /v2/"))


async def _attack(port: int, next_input: Callable[[], bytes | None], tally: Counter[str], slow: list[float]) -> None:
    def closed(wire: bytes) -> None:
        if _head_is_whole(wire):
            _keep(wire, "closed")
        tally["hung up on" if _head_is_whole(wire) else "closed without an answer"] += 1

    while (wire := next_input()) is not None:
        begin = now()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(wire)
                if not _head_is_whole(wire):
                    writer.write_eof()  # the head is damaged: the server may still wait for the rest of it
                status, _, body = await asyncio.wait_for(read_answer(reader), 30)
                if status and status not in _ALLOWED:
                    tally[f"status {status}"] += 1
                    _keep(wire, str(status))
                if status:
                    json.loads(body)
                    tally["answered"] += 1
                else:
                    closed(wire)
            finally:
                writer.close()
        except TimeoutError:  # an OSError too
            tally["hung"] += 1
        except (OSError, asyncio.IncompleteReadError):
            closed(wire)
        elapsed = now() - begin
        if elapsed > LIMIT_S:
            slow.append(elapsed)
            _keep(wire, f"{elapsed:.1f}s")


def _keep(wire: bytes, what: str) -> None:
    """For whoever has to find out why."""
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{what}-{zlib.crc32(wire):08x}.http").write_bytes(wire)


def pieces() -> Finding:
    """Files of 30 MB in as many pieces as fit, all of which Pillow would walk in Python, while somebody asks for health."""
    size, buffer = 30_000_000, io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    jpeg, frame = buffer.getvalue(), b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\0"
    png, empty = _crafted()[3], struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    files = [
        png[:33] + empty * (size // len(empty)) + png[33:],
        jpeg[:2] + b"\xff" * size + jpeg[2:],
        jpeg[:2] + b"\xff\xfe\0\2" * (size // 4) + jpeg[2:],
        b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0" + frame * (size // len(frame)) + b";",
    ]
    tally: Counter[str] = Counter()
    slow: list[float] = []
    health: list[int] = []
    wires = iter([post(data, "image/png", close=True) for data in files * 4])

    async def probe(port: int) -> None:
        for _ in range(200):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            health.append((await read_answer(reader))[0])
            writer.close()
            await asyncio.sleep(0.05)

    async def attack(port: int) -> None:
        await asyncio.gather(probe(port), *(_attack(port, lambda: next(wires, None), tally, slow) for _ in range(2)))

    with ServerProcess(deadline_ms=60_000) as server:
        asyncio.run(attack(server.port))
    sent, wrong = 4 * len(files), sum(status != 200 for status in health)
    figure = (
        f"{sent} files of 30 MB, two at once: {tally['answered']} answered, over {LIMIT_S:g} s: {len(slow)}; "
        f"{len(health)} probes, {wrong} wrong"
    )
    kept = tally["answered"] == sent and max(slow, default=0) < 2 * LIMIT_S and not wrong  # one waits for the other
    return Finding("A file of millions of pieces holds nobody up", figure, kept)


def fuzz(inputs: int, folder: Path | None = None, seed: int = 0) -> Finding:
    """Sends that many damaged inputs; every answer must be a documented one, within two seconds."""
    corpus = seeds(folder)
    mutator = Mutator(seed, corpus)
    untouched = iter([post(data, "image/png", close=True) for data in corpus])
    left = inputs
    tally: Counter[str] = Counter()
    slow: list[float] = []

    def next_input() -> bytes | None:
        nonlocal left
        left -= 1
        if left % 10_000 == 0:
            print(f"  fuzz: {left:,} left, {dict(tally)}", flush=True)
        return None if left < 0 else next(untouched, None) or mutator.request()

    async def attack(port: int) -> None:
        await asyncio.gather(*(_attack(port, next_input, tally, slow) for _ in range(CONNECTIONS)))

    with ServerProcess(deadline_ms=60_000) as server:  # a 504 would say that others were slow, not that this one was bad
        begin = now()
        asyncio.run(attack(server.port))
        seconds = now() - begin
        code = server.stop()
    bad = {name: count for name, count in tally.items() if name.startswith(("status", "hung"))}  # "hung up on", too
    figure = (
        f"{inputs:,} inputs from {len(corpus)} seeds in {seconds:.0f} s: {tally['answered']:,} answered, "
        f"{tally['closed without an answer']:,} of those with a damaged head closed; bad answers: {bad or 0}; "
        f"over {LIMIT_S:g} s: {len(slow)}; tracebacks in the log: {server.log.count('Traceback')}; exit code {code}"
    )
    return Finding("Any bytes get a clean answer", figure, not bad and not slow and not code and "Traceback" not in server.log)
