"""The relatives are the published networks, and everything that takes a ConvMixer takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from timm.models.mlp_mixer import MlpMixer as TimmMixer
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from model.architectures import ModelConfig, build_network, config_from_dict
from model.checkpoint import Checkpoint, build_model, load_checkpoint
from model.convmixer import ConvMixerConfig
from model.export import export
from model.mlp_mixer import MLPMixer, MLPMixerConfig
from model.resnet import ResNet, ResNetConfig
from model.vit import ViT, ViTConfig

MIXER = MLPMixerConfig(hidden_dim=24, depth=2, token_mlp_dim=12, channel_mlp_dim=96, patch_size=4, num_classes=7)
VIT = ViTConfig(hidden_dim=24, depth=2, heads=3, mlp_dim=40, patch_size=8, num_classes=7)
RESNET = ResNetConfig(hidden_dim=8, depth=2, stages=2, patch_size=2, num_classes=7)
CONVMIXER = ConvMixerConfig(
    hidden_dim=16, depth=2, kernel_size=3, patch_size=4, residual="both", norm="layernorm", activation="relu"
)
EVERY = pytest.mark.parametrize("config", [CONVMIXER, MIXER, VIT, RESNET], ids=lambda config: config.name)


def shaken(net: nn.Module) -> nn.Module:
    """Every parameter random, so that none of them can be left out unnoticed; evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return net.eval()


def test_mlp_mixer_gives_timms_logits_from_timms_weights_and_back() -> None:
    """timm's names are ours; its widths are D_S = h/2 and D_C = 4h."""
    theirs, ours = shaken(TimmMixer(7, 32, 3, 4, 2, 24)), MLPMixer(MIXER)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, 3, 32, 32)
    assert theirs(images).abs().max() > 0.1
    torch.testing.assert_close(ours.eval()(images), theirs(images), atol=1e-5, rtol=1e-5)
    theirs.load_state_dict(shaken(MLPMixer(MIXER)).state_dict())
    torch.testing.assert_close(theirs(images), shaken(MLPMixer(MIXER))(images), atol=1e-5, rtol=1e-5)


def test_vit_is_torchvisions_without_the_class_token() -> None:
    """torchvision's encoder on torchvision's patches; positions of its class token left out, the average in its place."""
    ours = shaken(ViT(VIT))
    theirs = VisionTransformer(32, 8, 2, 3, 24, 40, num_classes=7).eval()
    state = {name: tensor for name, tensor in ours.state_dict().items() if name.startswith("encoder.")}
    positions = state.pop("encoder.pos_embedding")
    theirs.load_state_dict(state, strict=False)
    theirs.conv_proj.load_state_dict(ours.stem[0].state_dict())
    images = torch.randn(3, 3, 32, 32)
    tokens = theirs._process_input(images) + positions
    expected = ours.head(theirs.encoder.ln(theirs.encoder.layers(tokens)).mean(1))
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)


def test_resnet_is_torchvisions_behind_a_patch_embedding() -> None:
    ours = shaken(ResNet(ResNetConfig(hidden_dim=64, depth=2, stages=4, patch_size=2)))
    theirs = resnet18(num_classes=10).eval()
    for number, block in enumerate(ours.blocks):
        getattr(theirs, f"layer{number // 2 + 1}")[number % 2].load_state_dict(block.state_dict())
    theirs.conv1, theirs.bn1, theirs.relu = ours.stem  # type: ignore[assignment]
    theirs.maxpool = nn.Identity()  # type: ignore[assignment]
    theirs.fc.load_state_dict(ours.head.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = theirs(images)
    torch.testing.assert_close(ours(images) / expected.abs().max(), expected / expected.abs().max(), rtol=1e-5, atol=1e-5)


def test_blocks_of_a_new_resnet_change_nothing() -> None:
    """As arXiv 1706.02677 begins: a block without a shortcut is the identity on what a ReLU has left."""
    network = ResNet(ResNetConfig(hidden_dim=8, depth=3, stages=1)).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network.forward_features(images), network.stem(images))


@EVERY
def test_features_keep_the_places_of_the_image(config: ModelConfig) -> None:
    """Only one cell changes when the network mixes nothing and one patch of the image changes: heat maps are not shuffled."""
    network = build_network(config).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            nn.init.zeros_(module.weight)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.zeros_(module.out_proj.weight)
    if isinstance(network, MLPMixer):
        for block in network.blocks:
            nn.init.zeros_(block.mlp_tokens.fc2.weight)  # type: ignore[union-attr,arg-type]
    images = torch.zeros(2, 3, 32, 32)
    p = 32 // network.forward_features(images).shape[-1]
    images[1, :, 2 * p : 3 * p, p : 2 * p] = torch.randn(3, p, p)
    before, after = network.forward_features(images)
    changed = (before - after).abs().amax(0) > 1e-5
    assert changed.nonzero().tolist() == [[2, 1]]


def test_checkpoints_from_before_the_field_are_convmixers() -> None:
    old = {"hidden_dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 2, "num_classes": 3, "in_channels": 3}
    assert config_from_dict(old) == ConvMixerConfig(16, 2, 3, 2, 3)


@pytest.mark.parametrize("newer", [(), ("architecture", "residual", "norm", "activation")])
def test_the_released_checkpoint_builds_and_keeps_its_name(repository: Path, newer: tuple[str, ...]) -> None:
    """Checkpoints from before there were other architectures say nothing of them."""
    released = load_checkpoint(repository / "releases" / "fast" / "model.safetensors")
    described = {name: value for name, value in released.description["model"].items() if name not in newer}
    checkpoint = Checkpoint(released.tensors, {**released.description, "model": described})
    assert build_model(checkpoint).config.name == released.description["name"] == "convmixer-256-8-k7-p2"


def test_names_tell_what_is_not_the_papers() -> None:
    assert CONVMIXER.name == "convmixer-16-2-k3-p4-residual-both-layernorm-relu"
    assert MIXER.name == "mlp-mixer-24-2-t12-c96-p4"
    assert VIT.name == "vit-24-2-h3-m40-p8"
    assert RESNET.name == "resnet-8-2-s2-p2"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "swin"}, "unknown architecture 'swin'; known: convmixer, mlp-mixer, resnet, vit"),
        ({"architecture": "resnet", "stages": 0}, "ResNetConfig.stages must be a positive integer"),
        ({"architecture": "vit", "kernel_size": 3}, "unknown vit settings: kernel_size"),
        ({"architecture": "vit", "heads": 3}, "hidden_dim 128 must be a multiple of heads 3"),
        ({"architecture": "vit", "patch_size": 5}, "image_size 32 must be a multiple of patch_size 5"),
        ({"architecture": "mlp-mixer", "patch_size": 5}, "image_size 32 must be a multiple of patch_size 5"),
        ({"architecture": "mlp-mixer", "token_mlp_dim": 0}, "MLPMixerConfig.token_mlp_dim must be a positive integer"),
        ({"residual": "channels"}, "ConvMixerConfig.residual must be one of spatial, both, none"),
        ({"norm": "groupnorm"}, "ConvMixerConfig.norm must be one of batchnorm, layernorm"),
        ({"activation": "tanh"}, "ConvMixerConfig.activation must be one of gelu, relu"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(values)


@EVERY
def test_every_architecture_is_exported_with_exact_class_maps(
    config: ModelConfig,
    released: Callable[..., Checkpoint],
    photos: Callable[[int, int], NDArray[np.uint8]],
    tmp_path: Path,
) -> None:
    """`export` refuses unless logits, top-1, similarity and mean(class maps) + bias are PyTorch's, for every image."""
    classes = ["a", "b", "c", "d", "e", "f", "g"]
    settings = {name: value for name, value in vars(config).items() if name not in ("num_classes", "image_size")}
    checkpoint = released(classes, 32, **settings)
    images, path = photos(20, 32), tmp_path / "net.onnx"
    assert export(checkpoint, images, path, {}).top1_equal == 20
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits, maps = session.run(["logits", "class_maps"], {"images": images[:5]})
    cells = build_network(config).eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[-1]
    assert maps.shape == (5, 7, cells, cells)
    np.testing.assert_allclose(maps.mean((2, 3)) + checkpoint.tensors["head.bias"].numpy(), logits, atol=1e-4)
    assert np.ptp(logits, axis=0).max() > 0.1, "it looks at its input"
