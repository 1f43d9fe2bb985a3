"""Tiny networks with weights and BatchNorm statistics that no default has, and real pixels to feed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from model.architectures import Network, build_network, config_from_dict
from model.checkpoint import SIMILARITY, Checkpoint
from model.convmixer import count_parameters
from model.similarity import FeatureSimilarity

IMAGES = Path(__file__).parent.parent / "data" / "cifar10"


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine parameters and running statistics in every BatchNorm; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2.0, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0.0, 0.3, generator=generator)
            module.num_batches_tracked.fill_(17)
    return net.eval()


@pytest.fixture(scope="session")
def random_net() -> Callable[..., Any]:
    def build(seed: int = 0, **settings: Any) -> Network:
        torch.manual_seed(seed)
        net = build_network(config_from_dict({"hidden_dim": 16, "depth": 2, **settings}))
        nn.init.trunc_normal_(net.head.weight, std=0.1)  # torchvision's is zero
        randomize(net, seed)
        return net

    return build


@pytest.fixture(scope="session")
def released(random_net: Callable[..., Network]) -> Callable[..., Checkpoint]:
    """A checkpoint as a training run releases it, of random weights."""

    def build(classes: list[str], image_size: int, **settings: Any) -> Checkpoint:
        net = random_net(num_classes=len(classes), **settings)
        net.head.weight.data.mul_(20)  # logits as far apart as a trained network's, so that top-1 is no toss-up
        description: dict[str, Any] = {
            "name": net.config.name,
            "model": vars(net.config),
            "parameters": count_parameters(net),
            "classes": classes,
            "image_size": image_size,
            "normalize_mean": [0.4914, 0.4822, 0.4465],
            "normalize_std": [0.2470, 0.2435, 0.2616],
            "calibration": {
                "temperature": 1.25,
                "thresholds": {"max_probability": 0.4, "energy": 1.5, "feature_similarity": 0.7},
            },
            "code_version": "0.0.test",
        }
        generator = torch.Generator().manual_seed(5)
        features = torch.randn(20 * len(classes), net.head.in_features, generator=generator).exp()
        similarity = FeatureSimilarity.fit(features, torch.arange(len(features)) % len(classes), len(classes))
        beside = {SIMILARITY + name: tensor for name, tensor in similarity.state_dict().items()}
        return Checkpoint({**net.state_dict(), **beside}, description)

    return build


@pytest.fixture(scope="session")
def photos() -> Callable[[int, int], NDArray[np.uint8]]:
    """The first n real images, brought to side s: uint8 [n, s, s, 3], RGB."""

    def load(count: int, side: int) -> NDArray[np.uint8]:
        paths = sorted(IMAGES.glob("*/*.webp"))[:: 200 // count][:count]
        return np.stack([np.asarray(Image.open(path).convert("RGB").resize((side, side))) for path in paths])

    return load
