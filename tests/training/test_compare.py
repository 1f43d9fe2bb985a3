"""Which of two networks is better, by the images on which they differ."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import build_model, load_checkpoint
from tests.training.conftest import CIFAR10, TINY, Outcome
from training.compare import Answers, answers_path, compare, mcnemar_p, read_answers
from training.data import ImageSet
from training.errors import DataError
from training.evaluate import compute_logits, evaluate


def answers(right: list[int], losses: list[float]) -> Answers:
    predicted = torch.tensor([0 if one else 1 for one in right])
    return Answers(predicted, torch.zeros(len(right), dtype=torch.int64), torch.tensor(losses), "a" * 64, "b" * 64)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (1, 5, 2 * 7 / 64), (10, 2, 2 * 79 / 4096), (61, 59, 0.9273), (0, 1100, 0.0)],
)
def test_mcnemars_exact_test_is_a_coins(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_p(only_first, only_second) == pytest.approx(p, abs=1e-4)
    assert mcnemar_p(only_second, only_first) == mcnemar_p(only_first, only_second)


def test_a_comparison_counts_the_images_on_which_two_differ() -> None:
    first = answers([1, 1, 1, 0, 0, 0, 1, 1], [0.1] * 8)
    second = answers([1, 1, 0, 1, 1, 0, 1, 1], [0.2, 0.2, 0.0, 0.2, 0.0, 0.0, 0.2, 0.2])
    found = compare(first, second)
    assert (found.images, found.only_first, found.only_second, found.p) == (8, 1, 2, 1.0)
    assert found.accuracies == (5 / 8, 6 / 8)
    assert found.losses == pytest.approx((0.1, 0.125))
    assert found.loss_gain == pytest.approx((0.025, 1.96 * math.sqrt(0.015 / 7 / 8 * 5)), abs=1e-6)
    gains = torch.tensor([0, 0, -1, 1, 1, 0, 0, 0]).double()
    assert found.accuracy_gain == pytest.approx((1 / 8, 1.96 * float(gains.std()) / math.sqrt(8)))


def test_an_evaluation_keeps_the_answer_to_each_image(evaluated: Path, photos: ImageSet, tmp_path: Path) -> None:
    found = read_answers(evaluated.parent)
    checkpoint = load_checkpoint(evaluated)
    logits = compute_logits(build_model(checkpoint), photos, TINY, torch.device("cpu"))
    temperature = checkpoint.description["calibration"]["temperature"]
    assert torch.equal(found.predicted, logits.argmax(1))
    assert torch.equal(found.labels, photos.labels)
    torch.testing.assert_close(
        found.losses, F.cross_entropy(logits / temperature, photos.labels, reduction="none"), rtol=1e-4, atol=1e-5
    )
    report = tmp_path / "other.json"
    evaluate(evaluated, CIFAR10, report, "cpu")
    assert answers_path(report).name == "other-answers.safetensors"
    for path in (report, answers_path(report)):
        assert torch.equal(read_answers(path).losses, found.losses)
    same = compare(found, read_answers(report))
    assert (same.only_first, same.only_second, same.p, same.loss_gain) == (0, 0, 1.0, (0.0, 0.0))


def test_the_command_tells_the_difference(command_line: Callable[..., Outcome], evaluated: Path) -> None:
    outcome = command_line("compare", evaluated.parent, evaluated.with_name("evaluation.json"))
    assert outcome.code == 0, outcome
    assert outcome.out.count(" of 200 right, loss ") == 2
    assert "second - first: +0.00 ± 0.00 points, exact McNemar p 1; loss +0.0000 ± 0.0000 (95 %)\n" in outcome.out


def test_answers_that_cannot_be_compared(evaluated: Path, tmp_path: Path) -> None:
    found = read_answers(evaluated.parent)
    for other in (
        replace(found, source_sha256="0" * 64),
        replace(found, labels=found.labels.flip(0)),
        replace(found, labels=found.labels[1:]),
    ):
        with pytest.raises(DataError, match="answers about other images"):
            compare(found, other)
    with pytest.raises(DataError, match=r"evaluation-answers\.safetensors is missing; run `convmixer-train evaluate` again"):
        read_answers(tmp_path)
    with pytest.raises(DataError, match="holds no answers to test images; give the folder of an evaluated run"):
        read_answers(evaluated)
    shutil.copy(evaluated.with_name("evaluation.json"), tmp_path)
    shutil.copy(evaluated.with_name("evaluation-answers.safetensors"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"calibrated anew")
    with pytest.raises(DataError, match=r"is of another checkpoint; run `convmixer-train evaluate .*/model\.safetensors` again"):
        read_answers(tmp_path)
    (tmp_path / "evaluation-answers.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match="is damaged"):
        read_answers(tmp_path)
