"""Strangers are told where the training's features hardly vary, and no network's features break it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.similarity import FeatureSimilarity


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes far apart along one axis, and noise that is small along the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    features = torch.randn(2000, 8, generator=generator) * torch.tensor([1.0] + [0.5] * 7) + 3.0
    features[:, 0] += torch.where(labels == 0, -10.0, 10.0)
    return features, labels


def test_what_no_class_has_makes_a_stranger(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    known, labels = features
    similarity = FeatureSimilarity.fit(known, labels, 2)
    stranger = known.clone()
    stranger[:, 5] += 4.0  # eight times as far as the known are spread there, and little beside the 10 of the classes
    assert similarity(known).median() > 2 * similarity(stranger).median()
    means = F.normalize(torch.stack([known[labels == number].mean(0) for number in (0, 1)]))
    plain = [(F.normalize(f) @ means.T).amax(1).median() for f in (known, stranger)]
    assert plain[0] < 1.2 * plain[1], "without whitening it is hardly told"


def test_a_class_is_itself(features: tuple[torch.Tensor, torch.Tensor]) -> None:
    similarity = FeatureSimilarity.fit(*features, 2)
    torch.testing.assert_close(similarity(similarity.class_means), torch.ones(2))
    assert similarity(features[0]).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("count", [2, 3, 2000])
def test_few_images_and_dead_features_have_a_similarity(features: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
    known, labels = features[0].clone(), features[1]
    known[:, 3] = 0.0  # a channel that a ReLU has closed
    found = FeatureSimilarity.fit(known[:count], labels[:count], 2)(features[0])
    assert found.isfinite().all()
    assert FeatureSimilarity.fit(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]), 2)(known).isfinite().all()
