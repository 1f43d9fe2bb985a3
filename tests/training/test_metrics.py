"""Scores of toys whose answer is known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from training.metrics import (
    CALIBRATION_BINS,
    calibration_bins,
    expected_calibration_error,
    familiarity,
    fit_temperature,
    honest_ece,
    probability_scores,
    proportion_interval,
    rejection_thresholds,
    score,
)


def logits_of(confidence: float, classes: int = 4) -> torch.Tensor:
    """One row whose softmax gives class 0 that confidence and the others equal shares."""
    row = torch.full((classes,), math.log((1 - confidence) / (classes - 1)))
    row[0] = math.log(confidence)
    return row


@pytest.fixture(scope="module")
def honest() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from exactly the probabilities that they state."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.7, 6.0])
def test_temperature_undoes_a_known_scaling(honest: tuple[torch.Tensor, torch.Tensor], scale: float) -> None:
    logits, labels = honest
    temperature = fit_temperature(logits * scale, labels)
    assert temperature == pytest.approx(scale, rel=0.05)
    assert probability_scores(logits * scale, labels, temperature)["ece"] < 0.01


def test_temperature_lowers_the_loss_it_minimises(honest: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = honest[0] * 4, honest[1]
    best = probability_scores(logits, labels, fit_temperature(logits, labels))["nll"]
    assert best < probability_scores(logits, labels)["nll"]
    assert best <= probability_scores(logits, labels, 4.0)["nll"] + 1e-6, "but for what speaks for no temperature at all"


def test_temperature_of_few_images_does_little_harm(honest: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Whichever ten are held out; one that is wrong by a hair among nine that are right would have it fall to nearly 0."""
    logits, labels = honest
    loss = probability_scores(logits, labels)["nll"]
    for begin in range(0, 2000, 10):
        few = slice(begin, begin + 10)
        assert probability_scores(logits, labels, fit_temperature(logits[few], labels[few]))["nll"] < loss + 0.5
    margins = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 0.01]])
    assert fit_temperature(margins, torch.zeros(10, dtype=torch.int64)) > 0.2


@pytest.mark.parametrize("right", [True, False])
def test_temperature_of_extremes_is_usable(right: bool) -> None:
    logits = 5 * torch.eye(4).repeat(5, 1)
    labels = torch.arange(4).repeat(5)
    temperature = fit_temperature(logits, labels if right else (labels + 1) % 4)
    assert math.isfinite(temperature)
    assert temperature >= 1, "that all answers were right so far does not make the next one certain"
    assert temperature > 0
    assert torch.isfinite((logits.double() / temperature).softmax(1)).all()
    assert 0 <= rejection_thresholds(familiarity(logits, temperature, torch.zeros(20)))["max_probability"] <= 1


def test_ece_of_an_honest_classifier_is_zero() -> None:
    logits = torch.stack([logits_of(0.8)] * 10 + [logits_of(0.5)] * 10)
    labels = torch.tensor([0] * 8 + [1] * 2 + [0] * 5 + [2] * 5)
    assert probability_scores(logits, labels)["ece"] == pytest.approx(0, abs=1e-6)


def test_ece_of_an_over_confident_classifier_is_its_excess() -> None:
    logits = torch.stack([logits_of(0.95)] * 20)
    labels = torch.tensor([0] * 12 + [1] * 8)
    assert probability_scores(logits, labels)["ece"] == pytest.approx(0.35, abs=1e-6)


@pytest.mark.parametrize("images", [300, 10_000])
def test_ece_of_an_honest_classifier_of_few_images_is_what_chance_makes_of_it(
    honest: tuple[torch.Tensor, torch.Tensor], images: int
) -> None:
    found = []
    for seed in range(20):
        labels = torch.multinomial(honest[0].softmax(1), 1, generator=torch.Generator().manual_seed(seed))[:images, 0]
        found.append(probability_scores(honest[0][:images], labels)["ece"])
    assert honest_ece(honest[0][:images]) == pytest.approx(sum(found) / len(found), rel=0.15)
    assert honest_ece(1000 * torch.eye(4)) == 0, "whoever is certain and right"


def test_bins_count_every_image_and_the_last_takes_certainty() -> None:
    logits = torch.stack([logits_of(0.3), logits_of(0.62), logits_of(0.62), torch.tensor([200.0, 0, 0, 0])])
    bins = calibration_bins(logits, torch.tensor([0, 0, 1, 0]))
    assert len(bins) == CALIBRATION_BINS
    assert [b["count"] for b in bins] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert bins[9] == {"count": 2, "confidence": pytest.approx(0.62), "accuracy": 0.5}
    assert bins[14] == {"count": 1, "confidence": 1.0, "accuracy": 1.0}
    assert bins[0] == {"count": 0, "confidence": 0.0, "accuracy": 0.0}
    assert expected_calibration_error(bins) == pytest.approx((0.7 + 2 * 0.12 + 0) / 4, abs=1e-6)


def test_scores_of_ignorance() -> None:
    scores = probability_scores(torch.zeros(8, 4), torch.arange(8) % 4)
    assert scores["nll"] == pytest.approx(math.log(4))
    assert scores["brier"] == pytest.approx(0.75)
    assert scores["ece"] == pytest.approx(0, abs=1e-6)


def test_threshold_keeps_95_of_100(honest: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _ = honest
    similarity = torch.rand(len(logits), dtype=torch.float64)
    thresholds = rejection_thresholds(familiarity(logits, 1.3, similarity))
    scaled = logits.double() / 1.3
    expected = {
        "max_probability": scaled.softmax(1).amax(1),
        "energy": scaled.exp().sum(1).log(),
        "feature_similarity": similarity,
    }
    for name, values in expected.items():
        torch.testing.assert_close(familiarity(logits, 1.3, similarity)[name], values)
        assert float((values >= thresholds[name]).double().mean()) == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize("count", [2, 9, 19, 20, 21])
def test_threshold_of_few_images_keeps_as_many(count: int) -> None:
    values = torch.rand(count, dtype=torch.float64)
    kept = (values >= rejection_thresholds({"any": values})["any"]).double().mean()
    assert kept >= 0.95


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(1.0, 20, 0.8389, 1.0), (0.0, 10, 0.0, 0.2775), (0.5, 100, 0.4038, 0.5962), (0.959, 10_000, 0.9549, 0.9627)],
)
def test_interval_of_a_proportion(share: float, count: int, low: float, high: float) -> None:
    """Of Wilson (1927); the first two are in every table."""
    assert proportion_interval(share, count) == pytest.approx((low, high), abs=1e-4)


def test_report_adds_up() -> None:
    generator = torch.Generator().manual_seed(1)
    classes = ["a", "b", "c", "d", "e", "f", "g"]
    labels = torch.randint(7, (300,), generator=generator)
    logits = torch.randn(300, 7, generator=generator) + 1.5 * torch.eye(7)[labels]
    report = score(logits, labels, classes, 1.2)
    confusion = torch.tensor(report["confusion"])
    assert report["images"] == confusion.sum() == 300
    assert confusion.sum(1).tolist() == labels.bincount().tolist(), "a row is a true class"
    assert confusion.sum(0).tolist() == logits.argmax(1).bincount(minlength=7).tolist(), "a column is an answer"
    assert report["top1"] == pytest.approx(float(confusion.trace()) / 300)
    assert report["top1"] < report["top5"] < 1
    assert report["per_class"] == {c: pytest.approx(float(confusion[i, i] / confusion[i].sum())) for i, c in enumerate(classes)}
    assert report["temperature"] == 1.2
    assert report["calibrated"] == probability_scores(logits, labels, 1.2)
    assert report["honest_ece"] == honest_ece(logits, 1.2)
    assert report["uncalibrated"] == probability_scores(logits, labels)
    assert sum(b["count"] for b in report["bins"]) == 300


def test_top5_of_fewer_classes_is_certain() -> None:
    assert score(torch.randn(10, 3), torch.arange(10) % 3, ["a", "b", "c"], 1.0)["top5"] == 1.0
