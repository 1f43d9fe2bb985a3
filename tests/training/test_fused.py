"""The fused step is the library's: outputs, gradients and statistics of real images, in float32 and under bf16 autocast."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.convmixer import ConvMixer, ConvMixerConfig
from training import kernels
from training.data import ImageSet
from training.fused import use_cpu_kernels, use_fused_blocks
from training.kernels import Kernels, available

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: then the library's kernels are used")
Images = Callable[[int, int], Tensor]


@pytest.fixture
def images(photos: ImageSet) -> Images:
    """So many images of so many pixels."""

    def prepare(count: int, size: int) -> Tensor:
        pictures = F.interpolate(photos.images[::7][:count].float() / 127.5 - 1, size=(size, size), mode="bilinear")
        return pictures.contiguous(memory_format=torch.channels_last)

    return prepare


def pair(kernel_size: int = 5, hidden_dim: int = 24) -> tuple[ConvMixer, ConvMixer]:
    """The library's network and the fused one, with every parameter away from its initial 0 or 1."""
    torch.manual_seed(0)
    plain = ConvMixer(ConvMixerConfig(hidden_dim=hidden_dim, depth=2, kernel_size=kernel_size, patch_size=2))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    plain = plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    assert use_fused_blocks(fused)
    return plain, fused


def step(net: ConvMixer, images: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients of a forward and a backward pass."""
    net.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        logits = net(images).float()
    F.cross_entropy(logits, torch.arange(len(images)) % 10, label_smoothing=0.1).backward()
    assert images.grad is not None
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "images": images.grad, **gradients}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("count", [3, 16])
@pytest.mark.parametrize("size", [20, 22, 32])
@pytest.mark.parametrize(("kernel_size", "hidden_dim"), [(3, 16), (5, 24), (9, 8)])
def test_gradients_and_statistics_are_the_librarys(
    images: Images, kernel_size: int, hidden_dim: int, size: int, count: int
) -> None:
    plain, fused = pair(kernel_size, hidden_dim)
    exact = copy.deepcopy(plain).double()
    pictures = images(count, size)
    for _ in range(3):  # statistics run over the steps
        expected, found, truth = step(plain, pictures), step(fused, pictures), step(exact, pictures.double())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape
        # a bias gradient may be a sum of cancelling terms, where rounding counts for more
        assert relative_error(value, truth[name]) < (3e-4 if name.endswith("bias") else 3e-5), name
    for (name, value), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, theirs, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.inference_mode():
        torch.testing.assert_close(fused.eval()(pictures), plain.eval()(pictures), atol=1e-5, rtol=1e-4)


def test_a_variance_much_smaller_than_the_mean_is_kept(images: Images) -> None:
    """Σ a² - (Σ a)² in float32 would have no correct digit here."""
    plain, fused = pair()
    for net in (plain, fused):
        with torch.no_grad():
            net.blocks[0].depthwise.bias += 1000.0
    exact = copy.deepcopy(plain).double()
    step(fused, images(16, 32)), step(exact, images(16, 32).double())
    found, truth = (dict(net.named_buffers())["blocks.0.depthwise_norm.running_var"] for net in (fused, exact))
    torch.testing.assert_close(found.double(), truth, atol=0, rtol=1e-3)


def test_bf16_is_as_close_to_float32_as_the_librarys(images: Images) -> None:
    plain, fused = pair()
    exact, theirs, ours = (
        step(plain, images(16, 32)),
        step(plain, images(16, 32), torch.bfloat16),
        step(fused, images(16, 32), torch.bfloat16),
    )
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert relative_error(value, exact[name]) < max(0.02, 1.5 * relative_error(theirs[name], exact[name])), name


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1.5e-4)], ids=str)
def test_gelu_and_its_slope_are_right_everywhere(dtype: torch.dtype, error: float) -> None:
    """From far below the polynomials' range to far above it; on top of `error` comes what rounding to the type costs."""
    available(3, 8)
    z = torch.linspace(-30, 30, 8 * 64 * 64).view(1, 8, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    call = Kernels(z, 3)
    values, slopes = call.maps(), call.maps()
    call("gelu_scale_shift", z, None, torch.tensor([[1.0], [0.0]]).repeat(1, 8), values)
    passed_on = torch.tensor([[0.0], [1.0], [0.0], [0.0]]).repeat(1, 8)
    call("gelu_norm_backward", torch.ones_like(z), z, passed_on, slopes, call.per_image())

    exact = z.double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(values.double(), expected.detach(), atol=error, rtol=rounding)
    torch.testing.assert_close(slopes.double(), exact.grad, atol=4 * error, rtol=rounding)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_step_gives_the_same_bits(images: Images, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = step(pair()[1], images(5, 20)), step(pair()[1], images(5, 20))
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_names_values_and_evaluation_stay_as_they_are(images: Images) -> None:
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    averaged, pictures = copy.deepcopy(fused).eval(), images(4, 32)
    expected = plain.eval()(pictures)
    assert torch.equal(averaged(pictures), expected)
    with torch.no_grad():  # where the kernels compute
        torch.testing.assert_close(averaged(pictures), expected, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = (relative_error(net(pictures).float(), expected) for net in (plain, averaged))
    assert 0 < ours < max(0.02, 1.5 * theirs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
def test_a_traced_network_goes_around_the_kernels(images: Images) -> None:
    _, fused = pair()
    expected = step(fused, images(4, 20))["logits"]
    found = torch.compile(fused, backend="eager")(images(4, 20))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        expected = fused.eval()(images(4, 20))
        torch.testing.assert_close(torch.compile(fused, backend="eager")(images(4, 20)), expected)


@pytest.mark.parametrize(
    "variant",
    [{"residual": "both"}, {"norm": "layernorm"}, {"activation": "relu"}, {"kernel_size": 4}, {"hidden_dim": 12}],
    ids=str,
)
def test_other_networks_are_not_fused(variant: dict[str, str | int]) -> None:
    net = ConvMixer(ConvMixerConfig(**{"hidden_dim": 16, "depth": 1, "kernel_size": 3, **variant}))  # type: ignore[arg-type]
    assert not use_fused_blocks(net)


def test_several_processes_do_not_fuse() -> None:
    """A fused block's statistics are of its own process's batch."""
    net = ConvMixer(ConvMixerConfig(hidden_dim=16, depth=1, kernel_size=3))
    block = type(net.blocks[0])
    use_cpu_kernels(net, processes=2)
    assert type(net.blocks[0]) is block
    use_cpu_kernels(net, processes=1)
    assert type(net.blocks[0]) is not block


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_library_trains() -> None:
    net = ConvMixer(ConvMixerConfig(hidden_dim=16, depth=1, kernel_size=3))
    assert not use_fused_blocks(net)


def test_a_compiler_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr="no -march=native")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: failed)
    assert not kernels.available(111, 16)
    assert "no -march=native" in capsys.readouterr().err
