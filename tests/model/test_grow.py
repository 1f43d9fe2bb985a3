"""A grown network answers as the one it grew from, and its new channels go ways of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.convmixer import ConvMixer, ConvMixerConfig
from model.grow import can_grow, grow
from tests.model.conftest import randomize

SMALL = ConvMixerConfig(hidden_dim=12, depth=2, kernel_size=3, patch_size=2)


def _pair(large: ConvMixerConfig) -> tuple[ConvMixer, ConvMixer]:
    small = randomize(ConvMixer(SMALL))
    grown = ConvMixer(large)
    grown.load_state_dict(grow(small.state_dict(), SMALL, large))
    return small, grown


@pytest.mark.parametrize(
    "larger",
    [{"hidden_dim": 20}, {"hidden_dim": 43}, {"kernel_size": 7}, {"hidden_dim": 24, "kernel_size": 5}, {}],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True], ids=["statistics kept", "statistics of the batch"])
def test_answers_are_those_of_the_smaller_network(larger, training):
    small, grown = _pair(replace(SMALL, **larger))
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(grown.train(training)(images), small.train(training)(images), rtol=1e-4, atol=1e-4)


def test_copies_of_a_channel_learn_different_things():
    _, grown = _pair(replace(SMALL, hidden_dim=24))
    F.cross_entropy(grown.train()(torch.randn(8, 3, 16, 16)), torch.arange(8)).backward()
    gradient = grown.blocks[0].depthwise.weight.grad  # each channel has one copy, 12 further on
    assert gradient is not None
    assert ((gradient[:12] - gradient[12:]).flatten(1).norm(dim=1) > 0.01 * gradient[:12].flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize(
    "other",
    [{"hidden_dim": 11}, {"kernel_size": 4}, {"kernel_size": 1}, {"depth": 3}, {"patch_size": 1}, {"norm": "layernorm"}],
    ids=str,
)
def test_what_cannot_be_kept_is_refused(other):
    large = replace(SMALL, **other)
    small = replace(SMALL, norm=large.norm)
    assert not can_grow(small, large if large != small else replace(large, hidden_dim=24))
    with pytest.raises(ValueError, match="cannot grow into"):
        grow({}, small, large if large != small else replace(large, hidden_dim=24))
