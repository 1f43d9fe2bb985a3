"""The average of a network's weights over its last steps, which is what is validated and released."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from model.architectures import Network

_WARM_UP = 10
"""Steps: until about ten times as many were taken, the average forgets faster than it will, or a short run would release
mostly what it began with."""


class MovingAverage:
    """An exponential moving average of parameters and buffers; counts follow as they are.

    `torch.optim.swa_utils.AveragedModel` keeps its number of steps on the CPU and asks for it on the device in each of them, for
    which a GPU is waited for; here the loop says which step it is.

    Args:
        model: whose weights are averaged.
        decay: per step, in the end; 0: nothing is averaged.

    Attributes:
        module: the average, a network of its own.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.module = copy.deepcopy(model)
        self._decay = decay
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averaged = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        self._counts = [(ours, theirs) for ours, theirs in pairs if not ours.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are now.

        Args:
            step: of the run, counted from 0.
        """
        if not self._decay:
            return
        share = max(1 - self._decay, (_WARM_UP - 1) / (_WARM_UP + step))
        ours, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(ours, theirs, share)
        for count, now in self._counts:
            count.copy_(now)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
