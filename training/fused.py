"""A ConvMixer block's training step, and a teacher's answer, on a CPU in few passes over memory.

The library's step spends more time between the matrix products than in them: each of GELU, batch normalisation, the
residual sum, the depthwise convolution and their gradients reads and writes whole feature maps. Here a block is one
autograd function around `training/kernels.cpp`, where what meets in a feature map is computed together. Matrix products
remain the library's; parameters, statistics and results (to rounding) are those of the block. Figures:
docs/decisions/0010-fused-training-step.md.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor, nn

from model.convmixer import ConvMixer, ConvMixerBlock, PatchEmbedding
from training import convolution
from training.kernels import DTYPES, VECTOR, Kernels, available, keep_freed_memory


def use_cpu_kernels(model: ConvMixer, processes: int) -> None:
    """Swaps the classes of a network's modules in place for the fastest that compute the same on a CPU.

    Args:
        model: whose parameters and state-dict keys stay as they are.
        processes: how many train it; with several, statistics are those of all their batches, which a fused block has not.
    """
    if processes == 1 and use_fused_blocks(model):
        return
    if model.config.kernel_size % 2 and shutil.which("c++") and convolution.available():
        convolution.use_fast_weight_gradients(model)


def use_fused_blocks(model: ConvMixer) -> bool:
    """Swaps the classes of the stem and of every block in place; parameters and state-dict keys stay as they are.

    Returns:
        Whether it did: only the paper's block, with an odd kernel, is written here, and it needs a C++ compiler.
    """
    config = model.config
    written = (config.residual, config.norm, config.activation) == ("spatial", "batchnorm", "gelu")
    if not written or config.kernel_size % 2 == 0 or config.hidden_dim % VECTOR:
        return False
    if not available(config.kernel_size, config.hidden_dim):
        return False
    keep_freed_memory()
    model.stem.__class__ = _FusedPatchEmbedding
    assert isinstance(model.stem, _FusedPatchEmbedding)
    model.stem.kernel_size = config.kernel_size
    for block in model.blocks:
        block.__class__ = _FusedBlock
    return True


class _FusedPatchEmbedding(PatchEmbedding):
    kernel_size: int

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not self.training or x.dtype not in DTYPES:
            out: Tensor = self.norm(self.act(x))
        else:
            out = _gelu_norm(x, self.norm.weight, self.norm.bias, self.norm, self.kernel_size)
        return out


class _FusedBlock(ConvMixerBlock):
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype not in DTYPES or (not self.training and torch.is_grad_enabled()):
            return super().forward(x)
        # autocast would convert a library convolution's argument; it does not know these functions
        x = x.to(dtype)
        modules = (self.depthwise, self.depthwise_norm, self.pointwise, self.pointwise_norm)
        parameters = (p for module in modules for p in (module.weight, module.bias))
        block = _block if self.training else _block_of_teacher
        out: Tensor = block(x, *parameters, self.depthwise_norm, self.pointwise_norm)
        return out


class _GeluNorm(torch.autograd.Function):
    """batch_norm(gelu(z)): maps [N, h, H, W] → the same."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, shift: Tensor, norm: nn.BatchNorm2d, kernel_size: int) -> Tensor:
        kernels = Kernels(z, kernel_size)
        z = z.contiguous(memory_format=torch.channels_last)
        mean, rate = _statistics(kernels, z, norm)
        ctx.save_for_backward(z, scale, mean, rate)
        ctx.kernel_size = kernel_size
        return _scale_and_shift(kernels, z, None, mean, scale * rate, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, scale, mean, rate = ctx.saved_tensors
        grad_z, _, grad_scale, grad_shift = _gelu_norm_backward(Kernels(z, ctx.kernel_size), grad, z, scale, mean, rate)
        return grad_z, grad_scale, grad_shift, None, None


class _Block(torch.autograd.Function):
    """One block: maps [N, h, H, W] → the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depthwise: Tensor, *others: Any) -> Tensor:
        ctx.kernel_size = depthwise.shape[-1]
        out, saved = _forward(x, depthwise, *others, training=True)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z1, mixed, z2, taps, matrix, scale1, scale2, mean1, rate1, mean2, rate2 = ctx.saved_tensors
        kernels = Kernels(x, ctx.kernel_size)
        grad_z2, grad_bias2, grad_scale2, grad_shift2 = _gelu_norm_backward(kernels, grad, z2, scale2, mean2, rate2)
        grad_pointwise = (_rows(grad_z2).t() @ _rows(mixed)).float()[:, :, None, None]
        grad_mixed = _maps(_rows(grad_z2) @ matrix, x)

        rows, grad_scale1, grad_shift1 = _norm_backward(kernels, grad_mixed, z1, scale1, mean1, rate1)
        grad_x, grad_bias1 = kernels.maps(), kernels.per_image()
        grad_taps = x.new_empty(len(x), *taps.shape, dtype=torch.float32)  # [N, k², h]
        kernels("depthwise_backward", grad_mixed, z1, x, rows, taps, grad_x, grad_taps, grad_bias1)
        grad_depthwise = grad_taps.sum(0).t().reshape(-1, 1, ctx.kernel_size, ctx.kernel_size)
        first = (grad_x, grad_depthwise, grad_bias1.sum(0), grad_scale1, grad_shift1)
        return *first, grad_pointwise, grad_bias2, grad_scale2, grad_shift2, None, None


def _forward(
    x: Tensor,
    depthwise: Tensor,
    bias1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    pointwise: Tensor,
    bias2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    norm1: nn.BatchNorm2d,
    norm2: nn.BatchNorm2d,
    *,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A block's output, and what its gradients are made of.

    A name ending in 1 belongs to the depthwise half, in 2 to the pointwise half; z is what GELU sees.
    """
    kernels = Kernels(x, depthwise.shape[-1])
    x = x.contiguous(memory_format=torch.channels_last)
    taps = depthwise.flatten(1).t().contiguous()  # [k², h]
    z1, sums1 = kernels.maps(), kernels.per_image(3)
    kernels("depthwise_forward", x, taps, bias1, z1, sums1)
    mean1, rate1 = _track(kernels, sums1, norm1) if training else _tracked(norm1)
    mixed = _scale_and_shift(kernels, z1, x, mean1, scale1 * rate1, shift1)

    matrix = pointwise.flatten(1).to(x.dtype)  # [h_out, h_in]
    z2 = _maps(torch.addmm(bias2.to(x.dtype), _rows(mixed), matrix.t()), x)
    mean2, rate2 = _statistics(kernels, z2, norm2) if training else _tracked(norm2)
    out = _scale_and_shift(kernels, z2, None, mean2, scale2 * rate2, shift2)
    return out, (x, z1, mixed, z2, taps, matrix, scale1, scale2, mean1, rate1, mean2, rate2)


def _infer(x: Tensor, *others: Any) -> Tensor:
    """As `_Block`, with the statistics that training has left, and without a gradient: a teacher's."""
    return _forward(x, *others, training=False)[0]


# their calls of machine code cannot be traced: a compiled network goes around them
_gelu_norm = torch.compiler.disable(_GeluNorm.apply)
_block = torch.compiler.disable(_Block.apply)
_block_of_teacher = torch.compiler.disable(_infer)


def _statistics(kernels: Kernels, z: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    sums = kernels.per_image(3)
    kernels("gelu_statistics", z, sums)
    return _track(kernels, sums, norm)


def _track(kernels: Kernels, sums: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + ε) of every channel, [h] each; the running statistics follow as in nn.BatchNorm2d.

    Args:
        kernels: of the maps.
        sums: per image a value v of the channel near all others, Σ (a - v) and Σ (a - v)², [3, N, h]: without v a
            variance much smaller than the mean's square would be lost in float32.
        norm: whose statistics they are.
    """
    count = kernels.positions * sums.shape[1]
    near, total, square = sums.double()
    means = near + total / kernels.positions  # [N, h]
    mean = means.mean(0)
    within = square - total.square() / kernels.positions
    variance = (within.sum(0) + kernels.positions * (means - mean).square().sum(0)) / count
    mean, rate = mean.float(), (variance + norm.eps).rsqrt().float()
    tracked = dict(norm.named_buffers())  # the attributes are typed as maybe missing
    tracked["num_batches_tracked"] += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(tracked["num_batches_tracked"])
    tracked["running_mean"].lerp_(mean, momentum)
    tracked["running_var"].lerp_((variance * (count / (count - 1))).float(), momentum)
    return mean, rate


def _tracked(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The running mean and 1/√(variance + ε) of every channel, [h] each."""
    tracked = dict(norm.named_buffers())  # the attributes are typed as maybe missing
    return tracked["running_mean"], (tracked["running_var"] + norm.eps).rsqrt()


def _scale_and_shift(kernels: Kernels, z: Tensor, residual: Tensor | None, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Computes residual + (gelu(z) - mean) · scale + shift."""
    out = kernels.maps()
    kernels("gelu_scale_shift", z, residual, torch.stack([scale, shift - mean * scale]), out)
    return out


def _norm_backward(
    kernels: Kernels, grad: Tensor, z: Tensor, scale: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation's backward pass, as far as sums over all positions are needed.

    Returns:
        What a position's gradient is made of (`Coefficients` in kernels.cpp), [4, h], and the gradients of scale and shift.
    """
    sums = kernels.per_image(2)
    kernels("norm_gradients", grad, z, mean, sums)
    grad_shift, grad_scale = sums.sum(1)
    grad_scale = grad_scale * rate
    count = kernels.positions * sums.shape[1]
    slope = scale * rate
    rows = torch.stack([mean, slope, -slope * rate * grad_scale / count, -slope * grad_shift / count])
    return rows, grad_scale, grad_shift


def _gelu_norm_backward(
    kernels: Kernels, grad: Tensor, z: Tensor, scale: Tensor, mean: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of z, of a bias added to it, of scale and of shift."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    rows, grad_scale, grad_shift = _norm_backward(kernels, grad, z, scale, mean, rate)
    grad_z, grad_bias = kernels.maps(), kernels.per_image()
    kernels("gelu_norm_backward", grad, z, rows, grad_z, grad_bias)
    return grad_z, grad_bias.sum(0), grad_scale, grad_shift


def _rows(maps: Tensor) -> Tensor:
    """Maps [N, h, H, W] in channels_last as a matrix [N·H·W, h], without a copy."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    images, channels, height, width = like.shape
    return rows.view(images, height, width, channels).permute(0, 3, 1, 2)
