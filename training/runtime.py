"""How and on what a run is executed: device, precision, compilation; nothing here changes what is trained."""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

LAYOUTS = {"channels-last": torch.channels_last, "channels-first": torch.contiguous_format}


@dataclass(frozen=True)
class Runtime:
    """How a run is executed. Unlike `TrainConfig` it may change between a checkpoint and its resumption.

    Attributes:
        device: torch device, e.g. `cpu` or `cuda`.
        precision: `float32`, or the autocast type `bf16` or `fp16`.
        compile: run the network through torch.compile.
        tensorboard: write event files next to the checkpoints.
        layout: of feature maps in memory: `channels-last`, or `channels-first`, in which a GPU may be faster where kernels are
            large (docs/training.md). On a CPU our own kernels compute with the channels last in any case.
    """

    device: str = "cpu"
    precision: str = "float32"
    compile: bool = False
    tensorboard: bool = True
    layout: str = "channels-last"

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as torch names it."""
        return LAYOUTS[self.layout]

    @classmethod
    def detect(cls, device: str | None = None, *, compile: bool = False, tensorboard: bool = True) -> Runtime:
        """The fastest safe choice here: bf16 where the hardware computes in it, else fp16 on a GPU and float32 on a CPU.

        Args:
            device: torch device; by default the GPU, if there is one.
            compile: see the class.
            tensorboard: see the class.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if torch.device(device).type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(device, "bf16" if has_bf16 else "fp16", compile, tensorboard)
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls(device, "bf16" if has_bf16 else "float32", compile, tensorboard)


def hardware(runtime: Runtime) -> str:
    """One line that says what computed: the GPU's name, or the processor and the threads used of it."""
    if torch.device(runtime.device).type == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Computes in `bf16` or `fp16` where that is safe; in `float32` it changes nothing."""
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
