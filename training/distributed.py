"""One model trained by several processes that `torchrun` started: the same global batch, the same result.

Every process holds the whole network and all images, augments the whole global batch from the same random numbers (so
mixup's pairs may cross processes) and computes its share of it. Gradients are averaged by DistributedDataParallel and
batch normalisation sees the global batch, so what comes out is, up to the order of sums, what one process computes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """The processes that train together; `Group()` is one that trains alone.

    Attributes:
        rank: number of this process; 0 writes files and shows progress.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """This process's part of a global batch.

        Raises:
            ConfigError: the batch cannot be cut into equal parts.
        """
        if batch_size % self.size:
            raise ConfigError(f"batch_size {batch_size} is not a multiple of the {self.size} processes that torchrun started")
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process; all must ask at the same step."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), device=device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def mean(self, value: Tensor) -> Tensor:
        """A scalar's mean over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module to call in training: averages gradients after each backward pass."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:  # torch's own refuses to run on a CPU
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.__class__ = _GlobalBatchNorm2d
        return DistributedDataParallel(model)


def leads() -> bool:
    """Whether this process, by torchrun's environment, is the one that tells people what happened."""
    return os.environ.get("RANK", "0") == "0"


def local_device(device: str) -> str:
    """`cuda` becomes this process's own GPU under torchrun; anything else stays as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's environment describes, for as long as the context lasts; alone without one.

    Args:
        device: of this process; CUDA means NCCL, else gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        dims = (0, 2, 3)
        mean: Tensor = _SumOverProcesses.apply(x.float().sum(dims)) / count
        # around the mean, at the cost of a second exchange: a variance much smaller than the mean's square would be lost
        variance: Tensor = _SumOverProcesses.apply((x.float() - mean.view(1, -1, 1, 1)).square().sum(dims)) / count
        with torch.no_grad():
            statistics = dict(self.named_buffers())  # the attributes are typed as maybe missing
            statistics["running_mean"].lerp_(mean, self.momentum or 0.0)
            statistics["running_var"].lerp_(variance * count / (count - 1), self.momentum or 0.0)
            statistics["num_batches_tracked"] += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        out: Tensor = x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)
        return out
