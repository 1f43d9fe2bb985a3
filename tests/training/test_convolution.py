"""The fast weight gradients are the library's, in float32 and under bf16 autocast."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from model.convmixer import ConvMixer, ConvMixerConfig
from training.convolution import available, use_fast_weight_gradients
from training.fused import use_cpu_kernels

Gradients = dict[str, torch.Tensor]


def gradients(net: ConvMixer, images: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Gradients]:
    net.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = net(images)
    F.cross_entropy(logits.float(), torch.arange(16) % 10).backward()
    assert images.grad is not None
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return logits.detach().float(), {**found, "images": images.grad}


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)


def pair(kernel_size: int, **variant: str) -> tuple[ConvMixer, ConvMixer]:
    torch.manual_seed(0)
    plain = ConvMixer(ConvMixerConfig(hidden_dim=16, depth=2, kernel_size=kernel_size, patch_size=2, **variant))
    plain = plain.to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    use_fast_weight_gradients(fast)
    return plain, fast


@pytest.mark.parametrize(
    ("kernel_size", "variant"),
    [(3, {}), (5, {}), (3, {"residual": "both", "norm": "layernorm", "activation": "relu"}), (3, {"residual": "none"})],
    ids=str,
)
def test_float32_gradients_are_the_librarys(images: torch.Tensor, kernel_size: int, variant: dict[str, str]) -> None:
    plain, fast = pair(kernel_size, **variant)
    expected_logits, expected = gradients(plain, images, torch.float32)
    logits, found = gradients(fast, images, torch.float32)
    torch.testing.assert_close(logits, expected_logits, atol=1e-6, rtol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.shape == expected[name].shape
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_bf16_gradients_are_as_close_to_float32_as_the_librarys(images: torch.Tensor) -> None:
    plain, fast = pair(3)
    _, exact = gradients(plain, images, torch.float32)
    _, theirs = gradients(plain, images, torch.bfloat16)
    _, ours = gradients(fast, images, torch.bfloat16)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        scale = exact[name].abs().max()
        if scale < 1e-6:  # a bias before BatchNorm's mean: mathematically almost zero
            continue
        error, their_error = ((g - exact[name]).norm() / exact[name].norm() for g in (gradient, theirs[name]))
        assert error < max(0.1, 1.5 * their_error), name


def test_names_values_and_evaluation_stay_as_they_are(images: torch.Tensor) -> None:
    plain, fast = pair(3)
    assert list(fast.state_dict()) == list(plain.state_dict())
    fast.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        assert torch.equal(fast.eval()(images), plain.eval()(images))
    assert type(copy.deepcopy(fast).blocks[0].depthwise) is type(fast.blocks[0].depthwise)


def test_where_torch_compile_fails_the_library_trains(images: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """As without Python's headers, or where nothing in /tmp may be executed."""
    net = ConvMixer(ConvMixerConfig(hidden_dim=16, depth=1, kernel_size=3, patch_size=2, norm="layernorm"))
    torch._dynamo.reset()
    available.cache_clear()
    try:
        with torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": ("/no/such/compiler",)}):
            use_cpu_kernels(net, processes=1)
        assert "torch.compile does not work here" in capsys.readouterr().err
        assert type(net.blocks[0].depthwise) is torch.nn.Conv2d
        gradients(net, images, torch.float32)
    finally:
        available.cache_clear()
