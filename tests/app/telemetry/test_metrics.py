"""The counters against prometheus_client's own, and that labels are bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from app.engine.outcome import Outcome, Timing
from app.telemetry.metrics import MAX_CLASSES, SECONDS, Metrics


def lines(registry, name: str) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith(name)]


def outcome(queue_s: float, decode_s: float = 0.001, infer_s: float = 0.002) -> Outcome:
    return Outcome(None, None, None, (), Timing(0.0, queue_s, decode_s, 1.0, infer_s, 1))  # type: ignore[arg-type]


def test_histograms_are_what_prometheus_client_would_have_counted():
    metrics = Metrics(["cat"])
    metrics.registry.register(metrics)
    registry = CollectorRegistry()
    reference = Histogram("convmixer_queue_seconds", "", buckets=SECONDS, registry=registry)
    values = [*SECONDS, 0.0, 100.0, *(10 ** (step / 100 - 5) for step in range(700))]
    for value in values:
        metrics.observe_batch([outcome(value)])
        reference.observe(value)
    expected = [line for line in lines(registry, "convmixer_queue_seconds") if "_created" not in line]
    assert sorted(lines(metrics.registry, "convmixer_queue_seconds")) == sorted(expected)


def test_a_batch_is_one_run_and_many_images():
    metrics = Metrics([])
    metrics.registry.register(metrics)
    metrics.observe_batch([outcome(0.1), outcome(0.2), outcome(0.3)])
    text = generate_latest(metrics.registry).decode()
    assert "convmixer_images_total 3.0" in text
    assert "convmixer_infer_seconds_count 1.0" in text
    assert "convmixer_queue_seconds_count 3.0" in text
    assert 'convmixer_batch_size_bucket{le="2.0"} 0.0' in text
    assert 'convmixer_batch_size_bucket{le="4.0"} 1.0' in text


def test_a_model_of_many_classes_does_not_make_as_many_series():
    classes = [f"class {i}" for i in range(1000)]
    metrics = Metrics(classes)
    metrics.registry.register(metrics)
    for name in classes:
        metrics.observe_answer(0.01, [{"index": 0, "label": name, "confidence": 0.6, "in_distribution": False}])
    counts = lines(metrics.registry, "convmixer_prediction_confidence_count")
    assert len(counts) == MAX_CLASSES + 1
    assert f'convmixer_prediction_confidence_count{{class="other"}} {1000 - MAX_CLASSES}.0' in counts
    assert lines(metrics.registry, "convmixer_out_of_distribution_total") == ["convmixer_out_of_distribution_total 1000.0"]
