"""The average that is released."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.architectures import Network, build_network
from model.convmixer import ConvMixerConfig
from training.ema import MovingAverage

NET = ConvMixerConfig(hidden_dim=8, depth=1, kernel_size=3, patch_size=2)


def network(value: float) -> Network:
    model = build_network(NET)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_short_run_releases_what_it_came_to_and_not_what_it_began_with() -> None:
    model = network(0.0)
    average = MovingAverage(model, 0.9995)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for step in range(100):
        average.update(step)
    assert values(average.module).min() > 0.999


def test_a_long_run_is_averaged_with_its_decay() -> None:
    model = network(1.0)
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.zero_()
    for step in range(1000, 1003):
        average.update(step)
    assert torch.allclose(values(average.module), torch.tensor(1 - 0.9**3))


def test_statistics_are_averaged_and_counts_are_not() -> None:
    model = network(0.0)
    average = MovingAverage(model, 0.5)
    norm = model.stem.norm  # type: ignore[union-attr]
    norm.running_mean.fill_(2.0)  # type: ignore[union-attr,operator]
    norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr,operator]
    average.update(1000)
    averaged = average.module.stem.norm  # type: ignore[union-attr]
    assert averaged.running_mean.eq(1.0).all()  # type: ignore[union-attr,operator]
    assert averaged.num_batches_tracked == 7  # type: ignore[union-attr]


def test_without_decay_nothing_is_averaged() -> None:
    model = network(1.0)
    average = MovingAverage(model, 0.0)
    with torch.no_grad():
        next(model.parameters()).zero_()
    average.update(0)
    assert values(average.module).eq(1.0).all()
