"""The same convolutions with a faster weight gradient on a CPU.

Half of a ConvMixer training step on a CPU is weight gradients: the library computes the depthwise one far below memory
speed and the pointwise one at half the speed of the matrix product it is. Both are rewritten here; forward passes,
input gradients and results (to rounding) are the library's. Figures: docs/decisions/0003-growing-images-on-a-cpu.md.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.convmixer import ConvMixer, ConvMixerBlock


@functools.cache
def available() -> bool:
    """Whether torch.compile works here; it needs more than a C++ compiler, e.g. Python's headers."""
    try:
        _depthwise_weight_gradient(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4), 3)
    except Exception as error:  # whatever it is: the library's gradient needs no compiler
        print(f"torch.compile does not work here; the library's gradients are used: {error}", file=sys.stderr)
        return False
    return True


def use_fast_weight_gradients(model: ConvMixer) -> None:
    """Swaps the convolutions of every block in place; parameters and state-dict keys stay as they are."""
    for block in model.blocks:
        assert isinstance(block, ConvMixerBlock)
        block.depthwise.__class__ = _DepthwiseConv2d
        block.pointwise.__class__ = _PointwiseConv2d


class _DepthwiseConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Depthwise.apply(*_autocast(x, self.weight, self.bias))
        return out


class _PointwiseConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Pointwise.apply(*_autocast(x, self.weight, self.bias))
        return out


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to a library convolution's arguments and cannot do to a custom function's."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(t if t is None else t.to(torch.get_autocast_dtype("cpu")) for t in tensors)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    low = (weight.shape[-1] - 1) // 2
    out: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [low, low], [1, 1], False, [0, 0], groups, [True, False, False]
    )[0]
    return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = _depthwise_weight_gradient(x.detach(), grad, weight.shape[-1]).view_as(weight)
        return _input_gradient(grad, x, weight, x.shape[1]), grad_weight, grad.sum((0, 2, 3))


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.permute(0, 2, 3, 1).flatten(0, 2)  # [N·H·W, h_out], a view in channels_last
        x_rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # [N·H·W, h_in]
        grad_weight = (grad_rows.t() @ x_rows).view_as(weight)
        return _input_gradient(grad, x, weight, 1), grad_weight, grad_rows.sum(0)


@torch.compile(dynamic=False)
def _depthwise_weight_gradient(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """dW[c, i, j] = Σ_n,y,x  padded[n, c, y+i, x+j] · grad[n, c, y, x], as k² shifted products: float [h, k, k].

    Sums run per image first: the operands then stay in the cache for all k² products, 4 × faster than one long sum.
    """
    height, width = grad.shape[2:]
    pad = kernel_size // 2
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1).contiguous()  # [N, H+2p, W+2p, h]
    grad = grad.permute(0, 2, 3, 1)  # [N, H, W, h]
    shifts = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
    products = [(padded[:, i : i + height, j : j + width] * grad).sum((1, 2), dtype=torch.float32) for i, j in shifts]
    return torch.stack(products).sum(1).t()  # [k², N, h] -> [h, k²]
