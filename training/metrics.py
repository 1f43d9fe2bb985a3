"""How good and how honest a classifier is, from logits and labels alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15
WORST_MISTAKES = 32
_SIMULATIONS = 100


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises cross-entropy on held-out images (Guo et al. 2017, arXiv 1706.04599).

    With few images that is arbitrary, so log T has a standard normal prior: with ten images it weighs as much as they do, with
    2,500 nothing.

    Args:
        logits: float [N, C].
        labels: int64 [N].

    Returns:
        T > 0; probabilities are softmax(logits / T). At least 1 where no answer is wrong: then the loss falls for ever
        with T, and would have every answer be given as certain.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")
    logits = logits.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels) + log_temperature**2 / (2 * len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    temperature = float(log_temperature.detach().exp())
    return max(1.0, temperature) if bool((logits.argmax(1) == labels).all()) else temperature


def familiarity(logits: Tensor, temperature: float, similarity: Tensor) -> dict[str, Tensor]:
    """Scores that are higher for pictures like those of the training: name → float64 [N].

    `max_probability` (arXiv 1610.02136) and `energy`, log Σ exp (arXiv 2010.03759, with the sign turned), both of the
    logits after temperature scaling, and `feature_similarity` as given.
    """
    scaled = logits.double() / temperature
    return {
        "max_probability": F.softmax(scaled, dim=1).amax(1),
        "energy": scaled.logsumexp(1),
        "feature_similarity": similarity.double(),
    }


def rejection_thresholds(scores: dict[str, Tensor]) -> dict[str, float]:
    """For each score the value below which a picture is called "none of the classes": keeps at least 95 % of held-out images."""
    return {name: float(torch.quantile(values, 0.05, interpolation="lower")) for name, values in scores.items()}


def calibration_bins(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> list[dict[str, float]]:
    """Bins of equal width over the confidence, the largest probability (arXiv 1706.04599).

    Args:
        logits: float [N, C].
        labels: int64 [N].
        temperature: divides the logits.

    Returns:
        For each bin count, mean confidence and accuracy (0 where it is empty).
    """
    probabilities = F.softmax(logits.double() / temperature, dim=1)
    confidence, predicted = probabilities.max(1)
    index = _bin_of(confidence)
    correct = (predicted == labels).double()
    rows = []
    for number in range(CALIBRATION_BINS):
        member = index == number
        count = int(member.sum())
        rows.append(
            {
                "count": count,
                "confidence": float(confidence[member].mean()) if count else 0.0,
                "accuracy": float(correct[member].mean()) if count else 0.0,
            }
        )
    return rows


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """ECE in [0, 1]: mean gap between confidence and accuracy over the bins, weighted by count."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total


def honest_ece(logits: Tensor, temperature: float = 1.0) -> float:
    """ECE that these very confidences would show on so many images if each were exactly true: chance alone keeps it from 0.

    The mean of `_SIMULATIONS` draws of which answers are right, always the same ones.

    Args:
        logits: float [N, C].
        temperature: divides the logits.
    """
    confidence = F.softmax(logits.double() / temperature, dim=1).amax(1)
    index, generator = _bin_of(confidence), torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(_SIMULATIONS):
        right = torch.rand(len(confidence), generator=generator, dtype=torch.float64) < confidence
        excess = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, index, right.double() - confidence)
        gaps.append(float(excess.abs().sum()) / len(confidence))
    return sum(gaps) / len(gaps)


def _bin_of(confidence: Tensor) -> Tensor:
    return (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)


def probability_scores(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """`nll` in nats, `brier` in [0, 2] and `ece` in [0, 1] of softmax(logits / temperature)."""
    scaled = logits.double() / temperature
    one_hot = F.one_hot(labels, logits.shape[1])
    return {
        "nll": float(F.cross_entropy(scaled, labels)),
        "brier": float((F.softmax(scaled, dim=1) - one_hot).square().sum(1).mean()),
        "ece": expected_calibration_error(calibration_bins(logits, labels, temperature)),
    }


def proportion_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (1927), which has a width where all or none are right, too.

    Args:
        share: that was found, in [0, 1].
        count: of how many.
    """
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(logits: Tensor, labels: Tensor, classes: list[str], temperature: float) -> dict[str, Any]:
    """Everything `convmixer-train evaluate` reports, as plain values.

    Args:
        logits: float [N, C].
        labels: int64 [N].
        classes: C names.
        temperature: fitted on held-out training images.
    """
    count = len(classes)
    ranked = logits.argsort(1, descending=True)
    confidence = F.softmax(logits.double() / temperature, dim=1).amax(1)
    wrong = (ranked[:, 0] != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:WORST_MISTAKES]
    confusion = torch.bincount(labels * count + ranked[:, 0], minlength=count * count).view(count, count)
    return {
        "images": len(labels),
        "top1": float((ranked[:, 0] == labels).double().mean()),
        "top5": float((ranked[:, :5] == labels[:, None]).any(1).double().mean()),
        "per_class": {name: float(confusion[i, i] / confusion[i].sum()) for i, name in enumerate(classes)},
        "confusion": confusion.tolist(),
        "temperature": temperature,
        "uncalibrated": probability_scores(logits, labels),
        "calibrated": probability_scores(logits, labels, temperature),
        "honest_ece": honest_ece(logits, temperature),
        "bins": calibration_bins(logits, labels, temperature),
        "mistakes": [
            {"index": int(i), "label": int(labels[i]), "predicted": int(ranked[i, 0]), "confidence": float(confidence[i])}
            for i in worst
        ],
    }
