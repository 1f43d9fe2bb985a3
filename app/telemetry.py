"""Metrics for Prometheus and the log format."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.engine.calibration import Calibration
from app.engine.scheduler import Outcome, Scheduler

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("convmixer_requests", "Requests to classify by HTTP status.", ["status"], registry=self.registry)
        # finding a label's counter takes longer than counting
        self._requests_by_status = functools.cache(lambda status: self.requests.labels(str(status)))
        self.failures = Counter(
            "convmixer_failures", "Failed requests and images by error code.", ["code"], registry=self.registry
        )
        self.images = Counter("convmixer_images", "Images classified.", registry=self.registry)
        self.request_s = self._histogram("convmixer_request_seconds", "Body received to answer ready.")
        self.queue_s = self._histogram("convmixer_queue_seconds", "An image's wait for a worker.")
        self.decode_s = self._histogram("convmixer_decode_seconds", "Decoding of an image.")
        self.infer_s = self._histogram("convmixer_infer_seconds", "A batch in the model.")
        self.batch_size = Histogram(
            "convmixer_batch_size", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=self.registry
        )

    def count_request(self, status: int) -> None:
        """Records an answer."""
        self._requests_by_status(status).inc()

    def watch(self, scheduler: Scheduler) -> None:
        """Adds what is read from the scheduler at each scrape."""
        Gauge("convmixer_queue_depth", "Images waiting.", registry=self.registry).set_function(scheduler.waiting)
        alive = Gauge("convmixer_engine_alive", "1 while every worker runs, else 0.", registry=self.registry)
        alive.set_function(lambda: 0 if scheduler.failure() else 1)

    def show(self, calibration: Calibration) -> None:
        """Publishes what the engine measured of itself at start."""
        batch = Gauge(
            "convmixer_calibration_batch_seconds", "A batch on one worker, at start.", ["images"], registry=self.registry
        )
        for size, milliseconds in calibration.batch_ms.items():
            batch.labels(str(size)).set(milliseconds / 1000)
        Gauge("convmixer_workers", "Inference threads.", registry=self.registry).set(calibration.workers)
        Gauge("convmixer_max_batch", "Largest batch.", registry=self.registry).set(calibration.max_batch)

    def observe_batch(self, outcomes: Sequence[Outcome]) -> None:
        """Records one batch."""
        self.images.inc(len(outcomes))
        self.batch_size.observe(len(outcomes))
        self.infer_s.observe(outcomes[0].infer_s)
        for outcome in outcomes:
            self.queue_s.observe(outcome.queue_s)
            self.decode_s.observe(outcome.decode_s)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)


def configure_logging(level: str) -> None:
    """One line a message on standard error: time, level, logger, message."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True)
