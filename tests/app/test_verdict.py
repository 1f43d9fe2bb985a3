import base64
import io

import numpy as np
import pytest
from PIL import Image

from app.engine.artifact import ArtifactMetadata
from app.engine.outcome import Outcome, Timing
from app.images import ResizeRule
from app.verdict import energy, heat_map, judge, softmax


def metadata(threshold: float | None, score: str = "max_probability") -> ArtifactMetadata:
    rule = None if threshold is None else {"score": score, "threshold": threshold}
    return ArtifactMetadata(
        contract="convmixer-artifact/1",
        name="toy",
        version="1",
        classes=["a", "b", "c"],
        input_size=4,
        resize=ResizeRule(4),
        temperature=2.0,
        out_of_distribution=rule,
    )


def outcome(*logits: float, similarity: float | None = None) -> Outcome:
    return Outcome(np.array(logits, np.float32), None, similarity, ("note",), Timing(0))


def test_softmax_divides_by_the_temperature_and_survives_large_logits():
    assert softmax([0, np.log(4) * 2], 2.0) == pytest.approx([0.2, 0.8])
    assert softmax([1e4, 0], 1.0) == pytest.approx([1, 0])
    assert energy([1e4, 0], 1.0) == pytest.approx(1e4)


def test_the_best_classes_come_first_and_ties_keep_their_order():
    answer = judge(outcome(0, 3, 0), metadata(None), index=2, filename="f", top_k=3)
    assert [entry["label"] for entry in answer["top_k"]] == ["b", "a", "c"]
    assert (answer["index"], answer["filename"], answer["label"], answer["warnings"]) == (2, "f", "b", ["note"])
    assert "in_distribution" not in answer


@pytest.mark.parametrize(("threshold", "inside"), [(0.5, True), (0.9, False)])
def test_low_confidence_is_called_none_of_the_classes(threshold, inside):
    answer = judge(outcome(0, 3, 0), metadata(threshold), index=0, filename=None, top_k=1)
    assert answer["in_distribution"] is inside
    assert answer["in_distribution_score"] == answer["confidence"] == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize(("threshold", "inside"), [(1.8, True), (1.9, False)])
def test_low_energy_is_called_none_of_the_classes(threshold, inside):
    answer = judge(outcome(0, 3, 0), metadata(threshold, "energy"), index=0, filename=None, top_k=1)
    assert answer["in_distribution"] is inside
    assert answer["in_distribution_score"] == pytest.approx(np.log(2 + np.exp(1.5)))
    assert answer["confidence"] == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize(("threshold", "inside"), [(0.7, True), (0.8, False)])
def test_features_unlike_every_class_are_called_none_of_the_classes(threshold, inside):
    rule = metadata(threshold, "feature_similarity")
    answer = judge(outcome(0, 3, 0, similarity=0.75), rule, index=0, filename=None, top_k=1)
    assert (answer["in_distribution"], answer["in_distribution_score"]) == (inside, 0.75)


def test_a_heat_map_is_a_picture_too():
    made = heat_map(np.array([[-2, 0], [2, 1], [0, 0]], np.float32), "a")
    with Image.open(io.BytesIO(base64.b64decode(made["png"]))) as picture:
        assert np.array_equal(np.asarray(picture), np.round(np.array(made["values"]) * 255))


def test_heat_maps_span_zero_to_one_and_a_flat_one_is_zero():
    assert heat_map(np.array([[-2, 0], [2, 1]], np.float32), "a")["values"] == [[0, 0.5], [1, 0.75]]
    assert heat_map(np.full((2, 2), 7, np.float32), "a")["values"] == [[0, 0], [0, 0]]
