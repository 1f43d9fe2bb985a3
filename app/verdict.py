"""Logits → what a person can use: calibrated probabilities, "none of my classes", the heat map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from app.engine.artifact import ArtifactMetadata
from app.engine.scheduler import Outcome
from app.schemas import ClassProbability, HeatMap, Prediction


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Probabilities that sum to 1: float [C] → float64 [C].

    Args:
        logits: of one image.
        temperature: divides the logits; fitted on held-out images (arXiv 1706.04599).
    """
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max())
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


def energy(logits: NDArray[np.float32], temperature: float) -> float:
    """Log of the sum of the exponentials of the scaled logits, in nats: higher for pictures like those of the training.

    Args:
        logits: of one image, float32 [C].
        temperature: as for `softmax`.
    """
    return float(np.logaddexp.reduce(logits.astype(np.float64) / temperature))


def judge(outcome: Outcome, metadata: ArtifactMetadata, *, index: int, filename: str | None, top_k: int) -> Prediction:
    """The answer for one image.

    Args:
        outcome: of the engine.
        metadata: classes, temperature, threshold.
        index: position in the request.
        filename: as sent, or None.
        top_k: number of classes listed, at most all.
    """
    probabilities = softmax(outcome.logits, metadata.temperature)
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    winner = int(best[0])
    rule = metadata.out_of_distribution
    confidence = float(probabilities[winner])
    score = energy(outcome.logits, metadata.temperature) if rule and rule.score == "energy" else confidence
    return Prediction(
        index=index,
        filename=filename,
        label=metadata.classes[winner],
        confidence=confidence,
        in_distribution=None if rule is None else score >= rule.threshold,
        in_distribution_score=None if rule is None else score,
        top_k=[ClassProbability(label=metadata.classes[i], probability=float(probabilities[i])) for i in best],
        warnings=list(outcome.warnings),
        heat_map=None if outcome.class_maps is None else heat_map(outcome.class_maps[winner], metadata.classes[winner]),
    )


def heat_map(class_map: NDArray[np.float32], label: str) -> HeatMap:
    """Scales one class map to [0, 1]: float32 [h, w] → rows of h lists. A flat map becomes all zeros.

    Class activation mapping (arXiv 1512.04150), exact here because the head is linear and pooling is a mean.
    """
    low, high = float(class_map.min()), float(class_map.max())
    scaled = (class_map - low) / (high - low) if high > low else np.zeros_like(class_map)
    return HeatMap(label=label, values=np.round(scaled.astype(np.float64), 4).tolist())
