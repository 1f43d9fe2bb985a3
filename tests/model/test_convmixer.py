"""The network is the paper's: counts, residuals, shapes, and a configuration that refuses nonsense."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.architectures import config_from_dict, count_macs
from model.convmixer import ConvMixer, ConvMixerConfig, count_parameters


@pytest.mark.parametrize(
    ("depth", "kernel_size", "patch_size", "parameters"),
    [(8, 5, 2, 594_186), (8, 7, 2, 643_338), (8, 9, 1, 706_570), (11, 9, 1, 969_994)],
)
def test_has_the_published_number_of_parameters(depth: int, kernel_size: int, patch_size: int, parameters: int) -> None:
    config = ConvMixerConfig(hidden_dim=256, depth=depth, kernel_size=kernel_size, patch_size=patch_size)
    assert count_parameters(ConvMixer(config)) == parameters


def test_frozen_parameters_are_not_counted() -> None:
    net = ConvMixer(ConvMixerConfig(hidden_dim=8, depth=1))
    before = count_parameters(net)
    net.head.requires_grad_(False)
    assert count_parameters(net) == before - 8 * 10 - 10


def test_costs_what_the_design_says() -> None:
    assert count_macs(ConvMixerConfig(256, 8, 5, 2), 32) / 1e9 == pytest.approx(0.15, abs=0.005)
    assert count_macs(ConvMixerConfig(256, 8, 9, 1), 32) / 1e9 == pytest.approx(0.71, abs=0.005)


def test_name_is_the_papers() -> None:
    assert ConvMixerConfig(256, 8, 7, 2).name == "convmixer-256-8-k7-p2"


def test_spatial_mixing_has_a_residual_and_channel_mixing_has_none(random_net: Callable[..., ConvMixer]) -> None:
    block = random_net(depth=1).blocks[0]
    x = torch.randn(2, 16, 6, 6)

    for parameter in block.depthwise_norm.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), block.pointwise_norm(F.gelu(block.pointwise(x)))), "x itself must pass spatial mixing"

    for parameter in block.pointwise_norm.parameters():
        torch.nn.init.zeros_(parameter)
    assert not block(x).any(), "nothing may pass around channel mixing"


def test_depthwise_mixes_positions_only_and_pointwise_channels_only(random_net: Callable[..., ConvMixer]) -> None:
    block = random_net(depth=1, kernel_size=3).blocks[0]
    x = torch.zeros(1, 16, 7, 7)
    x[0, 5, 3, 3] = 1.0
    spatial = (block.depthwise(x) - block.depthwise(torch.zeros_like(x)))[0]
    assert spatial[5].count_nonzero() == 9
    assert spatial.count_nonzero() == 9
    channels = (block.pointwise(x) - block.pointwise(torch.zeros_like(x)))[0]
    assert channels[:, 3, 3].count_nonzero() == 16
    assert channels.count_nonzero() == 16


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (2, 2), (33, 47), (8, 100)])
def test_takes_any_image_size(random_net: Callable[..., ConvMixer], height: int, width: int) -> None:
    net = random_net(num_classes=7)
    images = torch.randn(3, 3, height, width)
    assert net.forward_features(images).shape == (3, 16, height // 2, width // 2)
    logits = net(images)
    assert logits.shape == (3, 7)
    whole_patches = images[:, :, : height // 2 * 2, : width // 2 * 2]
    torch.testing.assert_close(logits, net(whole_patches))


def test_other_input_channels(random_net: Callable[..., ConvMixer]) -> None:
    assert random_net(in_channels=1, patch_size=4)(torch.randn(2, 1, 16, 16)).shape == (2, 10)


def test_even_kernels_keep_the_size(random_net: Callable[..., ConvMixer]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: padding an even kernel may copy its input
        assert random_net(kernel_size=4).forward_features(torch.randn(1, 3, 16, 16)).shape == (1, 16, 8, 8)


def test_answers_logits_that_do_not_depend_on_the_rest_of_the_batch(random_net: Callable[..., ConvMixer]) -> None:
    net = random_net()
    images = torch.randn(5, 3, 32, 32)
    together = net(images)
    assert not torch.allclose(together.exp().sum(1), torch.ones(5)), "these would be log-probabilities"
    torch.testing.assert_close(together, torch.cat([net(image[None]) for image in images]), atol=1e-5, rtol=1e-5)


def test_config_survives_plain_values() -> None:
    config = ConvMixerConfig(32, 3, 7, 4, 5, 1)
    assert config_from_dict(dict(vars(config))) == config


def test_unknown_config_key_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown convmixer settings: dropout, width"):
        config_from_dict({"width": 8, "depth": 2, "dropout": 1})


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None])
def test_config_values_must_be_positive_integers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"ConvMixerConfig.depth must be a positive integer, not"):
        config_from_dict({"depth": value})


def test_residuals_are_where_the_configuration_says(random_net: Callable[..., ConvMixer]) -> None:
    x = torch.randn(2, 16, 6, 6)
    for residual, spatial, channels in (("spatial", 1, 0), ("both", 1, 1), ("none", 0, 0)):
        block = random_net(depth=1, residual=residual).blocks[0]
        mixed = block.depthwise_norm(F.gelu(block.depthwise(x))) + spatial * x
        expected = block.pointwise_norm(F.gelu(block.pointwise(mixed))) + channels * mixed
        torch.testing.assert_close(block(x), expected)


def test_layer_normalisation_is_over_the_channels_of_each_position(random_net: Callable[..., ConvMixer]) -> None:
    net = random_net(norm="layernorm", depth=1)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    features = net.forward_features(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-2, rtol=0)


def test_relu_takes_the_place_of_gelu_everywhere(random_net: Callable[..., ConvMixer], monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = random_net(activation="relu"), torch.randn(2, 3, 8, 8)
    expected = net(images)
    gelu = random_net()
    gelu.load_state_dict(net.state_dict())
    assert not torch.allclose(gelu(images), expected, atol=1e-2)
    for module in gelu.modules():
        if hasattr(module, "act"):
            monkeypatch.setattr(module, "act", torch.relu)
    assert torch.equal(gelu(images), expected)


@pytest.mark.parametrize("settings", [{"kernel_size": k} for k in (3, 5, 7, 9)] + [{"patch_size": p} for p in (1, 2, 4)])
def test_kernels_and_patches_of_the_study(random_net: Callable[..., ConvMixer], settings: dict[str, int]) -> None:
    p = settings.get("patch_size", 2)
    assert random_net(**settings).forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 16, 32 // p, 32 // p)
