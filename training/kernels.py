"""Compiles `training/kernels.cpp` for this processor and calls it on tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
VECTOR = 8
"""A network's channels must be a multiple of it: the kernels have no code for a remainder."""


def available(kernel_size: int, channels: int) -> bool:
    """Whether the kernels for depthwise convolutions of this odd size and that many channels can be made here."""
    return shutil.which("c++") is not None and _library(kernel_size, _lanes(channels)) is not None


def _lanes(channels: int) -> int:
    """Channels taken together: as many floats as a register of this processor holds, if they divide the channels."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" and channels % 16 == 0 else VECTOR


@functools.cache
def _library(kernel_size: int, lanes: int) -> ctypes.CDLL | None:
    """Compiled anew by every process, in a second or two: a file kept for later might meet another processor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.so")
        command = ["c++", "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        sizes = [f"-DKERNEL={kernel_size}", f"-DLANES={lanes}"]
        done = subprocess.run([*command, *sizes, SOURCE, "-o", path], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            print(f"{SOURCE.name} could not be compiled; the library's kernels are used:\n{done.stderr}", file=sys.stderr)
            return None
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # e.g. a /tmp from which nothing may be executed
            print(f"{SOURCE.name} was compiled, but cannot be loaded; the library's kernels are used: {error}", file=sys.stderr)
            return None


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next step, where else every feature map comes in new, zeroed pages."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, largest = -1, -3, 2**30
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, largest)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("images", "height", "width", "channels", "threads")]


class Kernels:
    """The kernels for feature maps of one shape and type.

    Args:
        like: maps of that shape and type, [N, h, H, W].
        kernel_size: k, of the depthwise convolution.
    """

    def __init__(self, like: Tensor, kernel_size: int) -> None:
        images, channels, height, width = like.shape
        self.positions = height * width
        self._like = like
        self._shape = _Shape(images, height, width, channels, torch.get_num_threads())
        self._library = _library(kernel_size, _lanes(channels))

    def __call__(self, name: str, *tensors: Tensor | None) -> None:
        """Calls a kernel: maps are in channels_last, all else is float32 and contiguous."""
        pointers = [ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None) for tensor in tensors]
        getattr(self._library, f"{name}_{DTYPES[self._like.dtype]}")(self._shape, *pointers)

    def maps(self) -> Tensor:
        """Feature maps to be written, [N, h, H, W]."""
        return torch.empty_like(self._like, memory_format=torch.channels_last)

    def per_image(self, *sizes: int) -> Tensor:
        """Room for what is summed per image: float32 [*sizes, N, h]."""
        return self._like.new_empty(*sizes, *self._like.shape[:2], dtype=torch.float32)
