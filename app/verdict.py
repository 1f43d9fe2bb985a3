"""Logits → what a person can use: calibrated probabilities, "none of my classes", the heat map; and how that is written down."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic_core import to_json

from app.engine.artifact import ArtifactMetadata
from app.engine.outcome import Outcome
from app.schemas import ClassifyAnswer, HeatMap, Prediction


def softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """Probabilities that sum to 1, one a class.

    Args:
        logits: [C], of one image.
        temperature: divides the logits, above 0; fitted on held-out images (arXiv 1706.04599).
    """
    largest = max(logits)
    exponentials = [math.exp((logit - largest) / temperature) for logit in logits]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def energy(logits: Sequence[float], temperature: float) -> float:
    """Log of the sum of the exponentials of the scaled logits, in nats: higher for pictures like those of the training.

    Args:
        logits: [C], of one image.
        temperature: as for `softmax`.
    """
    largest = max(logits)
    return largest / temperature + math.log(sum(math.exp((logit - largest) / temperature) for logit in logits))


def answer_body(metadata: ArtifactMetadata, predictions: list[Prediction], request_id: str) -> bytes:
    """The whole answer of `/classify` as JSON."""
    answer: ClassifyAnswer = {
        "model": {"name": metadata.name, "version": metadata.version},
        "predictions": predictions,
        "request_id": request_id,
    }
    return to_json(answer)


def judge(outcome: Outcome, metadata: ArtifactMetadata, *, index: int, filename: str | None, top_k: int) -> Prediction:
    """The answer for one image.

    Args:
        outcome: of the engine.
        metadata: classes, temperature, threshold.
        index: position in the request.
        filename: as sent, or None.
        top_k: number of classes listed, at most all.
    """
    classes = metadata.classes
    # Python's own floats: for so few numbers faster than arrays, and numpy's sort would give the interpreter away and
    # wait to get it back, in the one thread that must not wait
    logits = outcome.logits.tolist()
    probabilities = softmax(logits, metadata.temperature)
    best = sorted(range(len(classes)), key=probabilities.__getitem__, reverse=True)[:top_k]
    winner = best[0]
    prediction: Prediction = {"index": index}
    if filename is not None:
        prediction["filename"] = filename
    prediction["label"] = classes[winner]
    prediction["confidence"] = probabilities[winner]
    if rule := metadata.out_of_distribution:
        if outcome.similarity is not None:
            score = outcome.similarity
        else:
            score = probabilities[winner] if rule.score == "max_probability" else energy(logits, metadata.temperature)
        prediction["in_distribution"] = score >= rule.threshold
        prediction["in_distribution_score"] = score
    prediction["top_k"] = [{"label": classes[i], "probability": probabilities[i]} for i in best]
    prediction["warnings"] = list(outcome.warnings)
    if outcome.class_maps is not None:
        prediction["heat_map"] = heat_map(outcome.class_maps[winner], classes[winner])
    return prediction


def heat_map(class_map: NDArray[np.float32], label: str) -> HeatMap:
    """Scales one class map to [0, 1]: float32 [h, w] → rows of h lists. A flat map becomes all zeros.

    Class activation mapping (arXiv 1512.04150), exact here because the head is linear and pooling is a mean.
    """
    low, high = float(class_map.min()), float(class_map.max())
    scaled = (class_map - low) / (high - low) if high > low else np.zeros_like(class_map)
    png = io.BytesIO()
    Image.fromarray(np.round(scaled * 255).astype(np.uint8)).save(png, "PNG")
    values = np.round(scaled.astype(np.float64), 4).tolist()
    return {"label": label, "values": values, "png": base64.b64encode(png.getvalue()).decode()}
