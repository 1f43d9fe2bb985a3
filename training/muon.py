"""Muon for the matrices of a network, AdamW for everything else, in one optimizer.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024):
a matrix does not follow its momentum but the nearest matrix whose singular values are all one, so that directions in
which gradients are small are learnt as fast as the others. `torch.optim.Muon` does this in bf16 alone, which a CPU
without it emulates at a fortieth of the speed, and takes no convolution; hence our own, which uses bf16 where training does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients and count of the iteration are the authors': singular values end between 0.7 and 1.2, which is enough."""
_NEWTON_SCHULZ_STEPS = 5

_RMS_OF_ADAM = 0.2
"""Size of an update's elements, so that one learning rate fits both kinds (arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.AdamW):
    """AdamW, except for some matrices.

    Args:
        parameters: all of the network's, in its order.
        matrices: those of them that Muon moves, [out, in] or [out, in, k, k], which is one of [out, in·k²].
        ratio: their learning rate, in multiples of the others'.
        momentum: of Muon, with Nesterov's correction.
        dtype: in which updates are orthogonalised; the authors use bfloat16.
        **adamw: arguments of `torch.optim.AdamW`; `weight_decay` counts for both.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        matrices: Iterable[Tensor],
        *,
        ratio: float,
        momentum: float,
        dtype: torch.dtype = torch.float32,
        **adamw: Any,
    ) -> None:
        super().__init__(parameters, **adamw)
        self._step_supports_amp_scaling = False  # fused AdamW looks after scaled and infinite gradients of its own alone
        self.matrices, self.ratio, self.momentum, self.dtype = list(matrices), ratio, momentum, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; the matrices' gradients are consumed.

        Args:
            closure: never used; the signature of an optimizer.
        """
        (group,) = self.param_groups
        rate = self.ratio * group["lr"]
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix in self.matrices:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if not state:
                state["step"] = torch.zeros(())  # AdamW, when it loads its state, looks for one with every parameter
                state["momentum_buffer"] = torch.zeros_like(matrix)
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(matrix.grad, 1 - self.momentum)
            alike[matrix.shape].append((matrix, matrix.grad.lerp(average, self.momentum).flatten(1)))
            matrix.grad = None  # AdamW passes over what has none
        for pairs in alike.values():
            updates = orthogonalize(torch.stack([u for _, u in pairs]), self.dtype)
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update.view_as(matrix), alpha=-rate * _RMS_OF_ADAM * math.sqrt(max(update.shape)))
        super().step()


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same singular vectors with singular values of about 1.

    Args:
        matrices: float32 [B, m, n].
        dtype: of the iteration.

    Returns:
        float32 [B, m, n].
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x: Tensor = (wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if wide is not matrices else x).float()


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers and ungrouped convolutions between a network's first layer and its head."""
    layers = [
        module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and not name.startswith(("stem", "head"))
    ]
    return [layer.weight for layer in layers]
