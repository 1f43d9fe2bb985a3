"""Muon moves matrices along their momentum with equal singular values, and leaves the rest to AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from model.architectures import build_network
from model.convmixer import ConvMixer, ConvMixerConfig
from model.resnet import ResNetConfig
from model.vit import ViTConfig
from training.muon import Muon, hidden_matrices, orthogonalize

NET = ConvMixerConfig(hidden_dim=16, depth=3, kernel_size=3, patch_size=2)


@pytest.mark.parametrize("shape", [(5, 24, 24), (2, 8, 40), (2, 40, 8)])
def test_singular_vectors_stay_and_singular_values_become_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices) @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.1, "the smallest of a square matrix are still on their way"
    assert 0.6 < values.median() < values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < 1e-3


def test_its_matrices_are_the_pointwise_convolutions() -> None:
    net = build_network(NET)
    assert isinstance(net, ConvMixer)
    expected = [block.pointwise.weight for block in net.blocks]  # type: ignore[union-attr]
    found = hidden_matrices(net)
    assert len(found) == 3
    assert all(a is b for a, b in zip(found, expected, strict=True))


def test_a_stem_of_single_pixels_is_none_of_its_matrices() -> None:
    net = build_network(ConvMixerConfig(hidden_dim=16, depth=3, kernel_size=3, patch_size=1))
    assert not any(matrix is net.stem.conv.weight for matrix in hidden_matrices(net))  # type: ignore[union-attr]
    assert len(hidden_matrices(net)) == 3


def test_a_step_is_that_of_adamw_but_for_the_matrices() -> None:
    nets = [build_network(NET) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    settings = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3, "fused": True}
    matrices = hidden_matrices(nets[0])
    optimizers = [
        Muon(nets[0].parameters(), matrices, ratio=2.0, momentum=0.9, **settings),
        torch.optim.AdamW(nets[1].parameters(), **settings),
    ]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = [matrix.detach().clone() for matrix in matrices]
    for net, optimizer in zip(nets, optimizers, strict=True):
        nn.functional.cross_entropy(net(images), torch.arange(8)).backward()
        optimizer.step()
    chosen = {id(matrix) for matrix in matrices}
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs) != (id(ours) in chosen)
    for matrix, old in zip(matrices, before, strict=True):
        update = (matrix.detach() - old * (1 - 0.02 * 0.1)).flatten(1) / (0.02 * 0.2 * 4)  # rate, size of Adam's, sqrt(16)
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_other_architectures_have_matrices_too() -> None:
    net = build_network(ViTConfig(hidden_dim=24, depth=2, heads=2, patch_size=4))
    shapes = [tuple(matrix.shape) for matrix in hidden_matrices(net)]
    assert shapes
    assert all(min(shape) >= 24 for shape in shapes), "the head is not one of them"


def test_a_dense_convolution_is_a_matrix_from_all_that_it_reads() -> None:
    """[out, in, 3, 3] is moved as [out, 9 · in], and its elements as far as Adam's."""
    net = build_network(ResNetConfig(hidden_dim=8, depth=1, stages=2, patch_size=2))
    matrices = hidden_matrices(net)
    assert [tuple(m.shape) for m in matrices] == [(8, 8, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (16, 8, 1, 1)]
    optimizer = Muon(net.parameters(), matrices, ratio=2.0, momentum=0.9, lr=0.01, weight_decay=0.0)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # in the first, blocks are the identity: their first convolutions have no gradient
        before = [matrix.detach().clone() for matrix in matrices]
        nn.functional.cross_entropy(net(images), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for matrix, old in zip(matrices, before, strict=True):
        update = (matrix.detach() - old).flatten(1)
        values = torch.linalg.svdvals(update / (0.02 * 0.2 * math.sqrt(max(update.shape))))
        assert values.max() < 1.3
        assert values.median() > 0.6
