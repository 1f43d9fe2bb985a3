"""What one raw image costs, stage by stage, in microseconds: `python -m benchmarks.budget`.

Decoding and inference as a worker does them, on one thread; the event loop's part through the real protocol object with
a transport that keeps what is written. System calls and the wake-ups between threads are not in it: they are what is
missing between the sum and the figures of `make bench`.
"""

from __future__ import annotations

import asyncio
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import onnxruntime
import uvicorn
import uvloop
from uvicorn.server import ServerState

from app.connection import Protocol
from app.engine.admission import Admission
from app.engine.outcome import Outcome, Timing
from app.engine.scheduler import Scheduler
from app.images import DecodeLimits, decode_image
from app.load import prepare
from app.service import Service
from app.settings import Settings
from app.telemetry.logs import AccessLog
from app.verdict import judge
from benchmarks.serve import PHOTOS, processor

REPEATS = 300
ROUNDS = 5


class Kept:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        """Keeps the answer."""
        self.written = data

    def is_closing(self) -> bool:
        """Never."""
        return False

    def get_extra_info(self, name: str, default: object = None) -> object:
        """No socket."""
        return default


class WithoutWorkers:
    """In the scheduler's place: its queue, from which nobody takes.

    Args:
        scheduler: whose settings the queue has.
        coalesce: as CONVMIXER_COALESCE.
    """

    def __init__(self, scheduler: Scheduler, *, coalesce: bool) -> None:
        self.admission = Admission(scheduler.service_time, lambda: 0, max_queue=scheduler.admission.max_queue, coalesce=coalesce)
        self.submit, self.refusal = self.admission.submit, self.admission.refusal

    def may_process_here(self, _: bytes) -> bool:
        """What the loop does with an image that a worker computes is the larger part."""
        return False


async def measure() -> dict[str, float]:
    """Stages and their microseconds, medians of the rounds."""
    settings = Settings.load()
    service = Service(settings)
    if settings.access_log != "off":
        service.watchers.append(AccessLog(settings.access_log))
    body = sorted(PHOTOS.glob("*/*.webp"))[0].read_bytes()
    rule, limits = service.metadata.resize, DecodeLimits(10**7, 10**4)
    pixels = decode_image(body, rule, limits).pixels[np.newaxis]
    outcome = Outcome(service.session.infer(pixels).logits[0], None, None, (), Timing(0.0, 0.001, 0.001, 0.002, 0.005, 1))

    real: Scheduler = service.scheduler
    queue = WithoutWorkers(real, coalesce=settings.coalesce)
    service.scheduler = cast("Scheduler", queue)
    protocol, transport = _connect(service)
    wire = prepare(body, "image/webp", []).wire

    def answer() -> None:
        protocol.data_received(wire)
        request = cast("Any", protocol.cycle)
        left.append(request.future)
        request.future = done
        request._end()

    def tidy() -> None:
        left.pop().cancel()
        item = queue.admission.take()
        if item is None or queue.admission.is_wanted(item):
            raise RuntimeError("the image was not in the queue")

    left: list[Future[Outcome]] = []

    done: Future[Outcome] = Future()
    done.set_result(outcome)
    stages = {
        "decode (worker)": _time(lambda: decode_image(body, rule, limits)),
        "infer (worker)": _time(lambda: service.session.infer(pixels)),
        "read, parse, admit, judge, write (event loop)": _time(answer, tidy),
    }
    if not transport.written.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"no answer but {transport.written[:100]!r}")
    predictions = [judge(outcome, service.metadata, index=0, filename=None, top_k=5)]

    def count() -> None:
        service.metrics.observe_batch([outcome])
        service.metrics.observe_answer(0.005, predictions)
        service.metrics.count_request(200)

    stages["of these: metrics"] = _time(count)
    service.scheduler, real.admission.max_queue = real, 0
    stages["refusal (event loop)"] = _time(lambda: protocol.data_received(wire))
    if not transport.written.startswith(b"HTTP/1.1 503"):
        raise RuntimeError(f"no refusal but {transport.written[:100]!r}")
    service.close()
    return stages


def _connect(service: Service) -> tuple[Protocol, Kept]:
    async def nothing(scope: object, receive: object, send: object) -> None:
        """No other way is taken."""

    config = uvicorn.Config(cast("Any", nothing), interface="asgi3", http=Protocol, ws="none", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Mon, 23 Nov 2026 12:00:00 GMT")]
    protocol, transport = Protocol(config, state, {"service": service}, asyncio.get_running_loop()), Kept()
    protocol.connection_made(cast("asyncio.Transport", transport))
    return protocol, transport


def _time(work: Callable[[], object], tidy: Callable[[], object] = lambda: None) -> float:
    """Microseconds of `work`, without those of what is to be done after each."""
    rounds = []
    for _ in range(ROUNDS):
        seconds = 0.0
        for _ in range(REPEATS):
            begin = time.perf_counter()
            work()
            seconds += time.perf_counter() - begin
            tidy()
        rounds.append(seconds / REPEATS * 1e6)
    return statistics.median(rounds)


def main() -> None:
    """Prints the table."""
    print(f"{processor()}; Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}")
    for stage, microseconds in uvloop.run(measure()).items():
        print(f"{stage:48} {microseconds:8.0f} µs")


if __name__ == "__main__":
    main()
