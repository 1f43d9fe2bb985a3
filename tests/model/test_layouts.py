"""Weights of the paper's code, timm and labml answer the same in our network, and ours in theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from model.convmixer import ConvMixer, ConvMixerConfig
from model.layouts import ForeignLayout, detect_layout, from_layout, infer_config, to_layout
from tests.model.conftest import randomize

CONFIG = ConvMixerConfig(hidden_dim=16, depth=3, kernel_size=5, patch_size=2, num_classes=7)
LAYOUTS = get_args(ForeignLayout)


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def _paper(c: ConvMixerConfig) -> nn.Module:
    """The network as the paper's appendix builds it: one `nn.Sequential` without names."""

    def activation() -> list[nn.Module]:
        return [nn.GELU(), nn.BatchNorm2d(c.hidden_dim)]

    layers: list[nn.Module] = [nn.Conv2d(3, c.hidden_dim, c.patch_size, stride=c.patch_size), *activation()]
    for _ in range(c.depth):
        depthwise = nn.Conv2d(c.hidden_dim, c.hidden_dim, c.kernel_size, groups=c.hidden_dim, padding="same")
        mix_space = _Residual(nn.Sequential(depthwise, *activation()))
        layers.append(nn.Sequential(mix_space, nn.Conv2d(c.hidden_dim, c.hidden_dim, 1), *activation()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c.hidden_dim, c.num_classes))


class _LabmlStem(nn.Module):
    def __init__(self, c: ConvMixerConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, c.hidden_dim, c.patch_size, stride=c.patch_size)
        self.norm = nn.BatchNorm2d(c.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(nn.functional.gelu(self.conv(x)))
        return out


class _LabmlLayer(nn.Module):
    def __init__(self, c: ConvMixerConfig) -> None:
        super().__init__()
        self.depth_wise_conv = nn.Conv2d(
            c.hidden_dim, c.hidden_dim, c.kernel_size, groups=c.hidden_dim, padding=(c.kernel_size - 1) // 2
        )
        self.norm1 = nn.BatchNorm2d(c.hidden_dim)
        self.point_wise_conv = nn.Conv2d(c.hidden_dim, c.hidden_dim, 1)
        self.norm2 = nn.BatchNorm2d(c.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(nn.functional.gelu(self.depth_wise_conv(x)))
        out: Tensor = self.norm2(nn.functional.gelu(self.point_wise_conv(x)))
        return out


class _Labml(nn.Module):
    """A network with the annotated implementation's names."""

    def __init__(self, c: ConvMixerConfig) -> None:
        super().__init__()
        self.patch_emb = _LabmlStem(c)
        self.conv_mixer_layers = nn.ModuleList(_LabmlLayer(c) for _ in range(c.depth))
        self.classification = nn.ModuleDict({"linear": nn.Linear(c.hidden_dim, c.num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_emb(x)
        for layer in self.conv_mixer_layers:
            x = layer(x)
        out: Tensor = self.classification["linear"](x.mean((2, 3)))
        return out


def _timm(c: ConvMixerConfig) -> nn.Module:
    net: nn.Module = TimmConvMixer(
        dim=c.hidden_dim, depth=c.depth, kernel_size=c.kernel_size, patch_size=c.patch_size, num_classes=c.num_classes
    )
    return net


FOREIGN: dict[str, Callable[[ConvMixerConfig], nn.Module]] = {"paper": _paper, "timm": _timm, "labml": _Labml}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> ForeignLayout:
    name: ForeignLayout = request.param
    return name


@pytest.fixture
def theirs(layout: ForeignLayout) -> nn.Module:
    torch.manual_seed(1)
    return randomize(FOREIGN[layout](CONFIG), seed=1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 20, 20, generator=torch.Generator().manual_seed(2))


def test_their_weights_answer_the_same_here(layout: ForeignLayout, theirs: nn.Module, images: Tensor) -> None:
    ours = ConvMixer(CONFIG)
    ours.load_state_dict(from_layout(theirs.state_dict(), layout))
    torch.testing.assert_close(ours.eval()(images), theirs(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.train()(images), theirs.train()(images), atol=1e-5, rtol=1e-5)


def test_our_weights_answer_the_same_there(
    layout: ForeignLayout, theirs: nn.Module, images: Tensor, random_net: Callable[..., ConvMixer]
) -> None:
    ours = random_net(seed=3, **vars(CONFIG))
    assert not torch.allclose(ours(images), theirs(images), atol=1e-2)
    theirs.load_state_dict(to_layout(ours.state_dict(), layout))
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)


def test_there_and_back_is_the_same(layout: ForeignLayout, random_net: Callable[..., ConvMixer]) -> None:
    state = random_net(**vars(CONFIG)).state_dict()
    back = from_layout(to_layout(state, layout), layout)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_layout_is_recognised(layout: ForeignLayout, theirs: nn.Module) -> None:
    assert detect_layout(theirs.state_dict()) == layout
    assert detect_layout(from_layout(theirs.state_dict(), layout)) == "native"


@pytest.mark.parametrize("state", [{}, {"features.0.weight": torch.zeros(1), "classifier.bias": torch.zeros(1)}])
def test_other_networks_are_not_recognised(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"no ConvMixer layout has keys like (features\.0\.weight|\(none\))"):
        detect_layout(state)


@pytest.mark.parametrize(
    "config",
    [CONFIG, ConvMixerConfig(8, 1, 3, 1, 2), ConvMixerConfig(8, 11, 9, 4, 10, in_channels=1)],
    ids=lambda config: config.name,
)
def test_configuration_is_read_from_the_shapes(config: ConvMixerConfig) -> None:
    assert infer_config(ConvMixer(config).state_dict()) == config


@pytest.mark.parametrize("removed", [0, 9, -1])
def test_a_missing_key_is_named(layout: ForeignLayout, theirs: nn.Module, removed: int) -> None:
    state = theirs.state_dict()
    key = list(state)[removed]
    del state[key]
    with pytest.raises(ValueError, match=f"not a state dict of the {layout} layout .* missing {key}; unexpected none"):
        from_layout(state, layout)


def test_an_unexpected_key_is_named(layout: ForeignLayout, theirs: nn.Module) -> None:
    state = {**theirs.state_dict(), "module.scale": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing none; unexpected module\.scale"):
        from_layout(state, layout)


def test_the_wrong_layout_is_refused(layout: ForeignLayout, theirs: nn.Module) -> None:
    with pytest.raises(ValueError, match="not a state dict of the native layout"):
        to_layout(theirs.state_dict(), layout)
    with pytest.raises(ValueError, match="not a state dict of the native layout"):
        infer_config(theirs.state_dict())


def test_a_network_without_blocks_is_refused(random_net: Callable[..., ConvMixer]) -> None:
    state = {key: tensor for key, tensor in random_net().state_dict().items() if not key.startswith("blocks")}
    with pytest.raises(ValueError, match="with 0 blocks"):
        infer_config(state)


def test_an_unknown_layout_is_refused(random_net: Callable[..., ConvMixer]) -> None:
    with pytest.raises(ValueError, match="unknown layout 'keras'; known: native, paper, timm, labml"):
        to_layout(random_net().state_dict(), "keras")  # type: ignore[arg-type]
