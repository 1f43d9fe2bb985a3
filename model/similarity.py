"""How like the training's classes a picture is, by its features: what "none of my classes" is told by.

Features of a trained network are correlated: the differences between its classes take the most room, and what none of them has
shows in what is left. So features are whitened first (arXiv 1512.00809), and then compared with each class's mean: no direction
counts for more than another. Without the whitening strangers pass a quarter to a half more often (docs/training.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHRINKAGE = 0.1
"""Of the mean variance, added to every direction's: those that few images say little about would count too much, and those that
are constant for ever. Between 0.03 and 0.3 it makes no difference."""


class FeatureSimilarity(nn.Module):
    """Cosine of whitened features to those of the nearest class mean.

    Args:
        width: h, of the features.
        classes: C.

    Attributes:
        mean: of the features of the training's images, float32 [h].
        whitening: makes their covariance the identity, but for the shrinkage, float32 [h, h], symmetric.
        class_means: of each class's features, float32 [C, h].
    """

    mean: Tensor
    whitening: Tensor
    class_means: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.eye(width))
        self.register_buffer("class_means", torch.zeros(classes, width))

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int) -> FeatureSimilarity:
        """Measures all three.

        Args:
            features: pooled, before the head, float [N, h]; as many of each class, as far as there are.
            labels: int64 [N], each class at least once.
            classes: C.
        """
        x = features.double()
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        variances, directions = torch.linalg.eigh(covariance)
        least = _SHRINKAGE * variances.mean().clamp_min(torch.finfo(torch.float32).tiny)
        whitening = directions * (variances.clamp_min(0) + least).rsqrt() @ directions.T
        fitted = cls(features.shape[1], classes)
        fitted.mean.copy_(mean)
        fitted.whitening.copy_(whitening)
        fitted.class_means.copy_(torch.stack([x[labels == number].mean(0) for number in range(classes)]))
        return fitted

    def forward(self, features: Tensor) -> Tensor:
        """Similarity in [-1, 1] of pooled features: float [N, h] → [N]."""
        directions = F.normalize((self.class_means - self.mean) @ self.whitening)
        whitened = F.normalize((features - self.mean) @ self.whitening)
        return (whitened @ directions.T).amax(1)
