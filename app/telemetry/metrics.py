"""Metrics for Prometheus, in the names and units of its conventions; docs/observability.md lists them all.

What is counted for each image is kept in plain numbers under one lock and becomes Prometheus' text at the scrape:
prometheus_client's own counters and histograms took 7 µs a request for half of it, these 3 (`python -m benchmarks.budget`).
Every histogram has fixed buckets, so those of all replicas add up. No client can make up a label's value; of the model's
classes `MAX_CLASSES` are told apart.
"""

from __future__ import annotations

import platform
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import onnxruntime
from prometheus_client import CollectorRegistry, GCCollector, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app import __version__
from app.errors import CLIENT_LEFT, NotServing, Overloaded, ServiceError

if TYPE_CHECKING:
    from app.engine.outcome import Outcome, Timing
    from app.schemas import Prediction
    from app.service import Service

MAX_CLASSES = 100
"""Classes with a histogram of their own; those behind them in the model's list share the one of class="other"."""

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIDENCE = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
"""Narrow where a trained model's answers are: a tenth of them leaving the last bucket is seen long before accuracy is."""

_ERRORS: list[type[ServiceError]] = [ServiceError, *ServiceError.__subclasses__()]


class Metrics(Collector):
    """All metrics of one service, in a registry of their own.

    Args:
        classes: the model's, in its order.

    Attributes:
        registry: what is scraped.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        # what may happen is there from the start, as 0: else the first time it does is no increase to Prometheus
        self._requests = Counter({int(status): 0 for status in (200, CLIENT_LEFT, *(error.status for error in _ERRORS))})
        self._failures = Counter({error.code: 0 for error in _ERRORS})
        self._refused = Counter({reason: 0 for error in (Overloaded, NotServing) for reason in error.reasons})
        self._images = self._strangers = 0
        self._request_s, self._queue_s, self._decode_s, self._infer_s = (_Distribution(SECONDS) for _ in range(4))
        self._batch_size = _Distribution(IMAGES)
        self._confidence = {name: _Distribution(CONFIDENCE) for name in classes[:MAX_CLASSES]}
        self._other_classes = _Distribution(CONFIDENCE)
        if len(classes) > MAX_CLASSES:
            self._confidence["other"] = self._other_classes
        self._service: Service | None = None

    def publish(self, service: Service) -> None:
        """Opens the registry, with what is read from the running service at each scrape."""
        self._service = service
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def count_request(self, status: int) -> None:
        """Records an answer of the model's paths."""
        with self._lock:
            self._requests[status] += 1

    def count_failure(self, code: str, reason: str | None = None) -> None:
        """Records a problem document, or one image's error in a request of several.

        Args:
            code: of the failure.
            reason: why the request was refused, if it was.
        """
        with self._lock:
            self._failures[code] += 1
            if reason:
                self._refused[reason] += 1

    def count_refusal(self, error: ServiceError) -> None:
        """Records an answer of the model's paths that is this refusal."""
        with self._lock:
            self._requests[error.status] += 1
            self._failures[error.code] += 1
            if error.reason:
                self._refused[error.reason] += 1

    def observe_batch(self, outcomes: Sequence[Outcome]) -> None:
        """Records one batch; called by the engine's threads."""
        with self._lock:
            self._images += len(outcomes)
            self._batch_size.add(len(outcomes))
            self._infer_s.add(outcomes[0].timing.infer_s)
            for outcome in outcomes:
                self._queue_s.add(outcome.timing.queue_s)
                self._decode_s.add(outcome.timing.decode_s)

    def observe_failure(self, timing: Timing) -> None:
        """Records the time of an image without an outcome; called by the engine's threads.

        Args:
            timing: of it; without a time in the model if it did not get there.
        """
        with self._lock:
            self._decode_s.add(timing.decode_s)
            if timing.infer_s:
                self._infer_s.add(timing.infer_s)

    def observe_answer(self, seconds: float, predictions: Iterable[Prediction]) -> None:
        """Records a request that was answered with predictions.

        Args:
            seconds: from its headers to its answer.
            predictions: those of images that failed are passed over.
        """
        with self._lock:
            self._request_s.add(seconds)
            for prediction in predictions:
                if "label" in prediction:
                    self._confidence.get(prediction["label"], self._other_classes).add(prediction["confidence"])
                    self._strangers += not prediction.get("in_distribution", True)

    def collect(self) -> Iterator[Metric]:
        """Everything that is known now (prometheus_client's Collector)."""
        with self._lock:  # not while the families are written down: the engine would wait for it
            families = list(self._counted())
        yield from families
        if self._service:
            yield from _state(self._service)

    def _counted(self) -> Iterator[Metric]:
        yield _counter("convmixer_requests", "Answers of the model's paths by HTTP status.", "status", self._requests)
        yield _counter("convmixer_failures", "Failed requests and images by error code.", "code", self._failures)
        yield _counter("convmixer_refused", "Requests refused for want of room or time, by reason.", "reason", self._refused)
        yield CounterMetricFamily("convmixer_images", "Images classified.", self._images)
        yield CounterMetricFamily(
            "convmixer_out_of_distribution", "Images that probably show none of the classes.", self._strangers
        )
        yield _histogram("convmixer_request_seconds", "A request answered with predictions, headers to answer.", self._request_s)
        yield _histogram("convmixer_queue_seconds", "An image's wait for a worker; 0 if it needed none.", self._queue_s)
        yield _histogram("convmixer_decode_seconds", "Decoding of an image, of one that fails, too.", self._decode_s)
        yield _histogram("convmixer_infer_seconds", "A batch in the model.", self._infer_s)
        yield _histogram("convmixer_batch_size", "Images in a batch.", self._batch_size)
        confidence = HistogramMetricFamily(
            "convmixer_prediction_confidence", "Calibrated probability of the predicted class.", labels=["class"]
        )
        for name, distribution in self._confidence.items():
            confidence.add_metric([name], distribution.buckets(), distribution.total)
        yield confidence


class _Distribution:
    """A histogram's numbers; who adds to it holds the lock."""

    __slots__ = ("bounds", "counts", "labels", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = [float(bound) for bound in bounds]
        self.labels = [*map(floatToGoString, self.bounds), "+Inf"]
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more; a value equal to a bound is below it (`le`)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Bound and how many values are not above it."""
        return list(zip(self.labels, accumulate(self.counts), strict=True))


def _counter(name: str, text: str, label: str, counts: Counter[int] | Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([str(value)], count)
    return family


def _histogram(name: str, text: str, distribution: _Distribution) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, distribution.buckets(), distribution.total)


def _state(service: Service) -> Iterator[Metric]:
    """What the service is and does at this moment."""
    scheduler, calibration, metadata = service.scheduler, service.calibration, service.metadata
    alive = scheduler.failure() is None
    for name, text, value in (
        ("queue_depth", "Images waiting.", scheduler.waiting()),
        ("queue_limit", "Images that may wait.", scheduler.admission.max_queue),
        ("busy_workers", "Inference threads at work.", scheduler.busy()),
        ("workers", "Inference threads.", scheduler.workers),
        ("max_batch", "Largest batch.", scheduler.max_batch),
        ("held_bytes", "Bytes in memory of requests' bodies and of answers over 64 KiB.", service.bodies.held),
        ("held_bytes_limit", "What they may come to (CONVMIXER_MAX_HELD_BYTES).", service.bodies.limit),
        ("ready", "1 while /readyz says yes.", service.not_ready() is None),
        ("engine_alive", "1 while every worker runs, none hangs, and the model has not failed on 32 images in a row.", alive),
    ):
        yield GaugeMetricFamily(f"convmixer_{name}", text, float(value))
    curve = GaugeMetricFamily(
        "convmixer_calibration_batch_seconds", "A batch at start, every worker having one.", labels=["images"]
    )
    for size, milliseconds in calibration.batch_ms.items():
        curve.add_metric([str(size)], milliseconds / 1000)
    yield curve
    model = GaugeMetricFamily("convmixer_model_info", "What is served.", labels=["name", "version", "sha256", "provider"])
    model.add_metric([metadata.name, metadata.version, service.sha256, service.session.provider], 1)
    yield model
    build = GaugeMetricFamily("convmixer_build_info", "What serves it.", labels=["version", "python", "onnxruntime"])
    build.add_metric([__version__, platform.python_version(), onnxruntime.__version__], 1)
    yield build
