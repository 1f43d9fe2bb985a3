"""Real CIFAR-10 images, a configuration that trains in a second, and one finished run that many tests look at.

The kernels are compiled once per process and size of the depthwise kernel, which takes a second; variants of the block have
a weight gradient that is compiled once per shape and takes several. Where neither matters, the compiler is switched off
(`no_compiler`).
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from model.convmixer import ConvMixer, ConvMixerConfig
from training.config import AugmentConfig, TrainConfig
from training.data import ImageSet, load_images
from training.evaluate import evaluate
from training.runtime import Runtime
from training.train import train

CIFAR10 = Path(__file__).parent.parent / "data" / "cifar10"
TINY = TrainConfig(
    model=ConvMixerConfig(hidden_dim=16, depth=2, kernel_size=3, patch_size=2),
    augment=AugmentConfig(crop_scale=0.75, flip=0.5, erase=0.25),
    epochs=2,
    batch_size=16,
    ema_decay=0.9,
)
QUIET = Runtime(device="cpu", precision="float32", tensorboard=False)


class Outcome(NamedTuple):
    """How a command line ended."""

    code: int | str | None
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny nets gain nothing from threads, and a subprocess must compute in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a C++ compiler trains with the library's own kernels."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def photos() -> ImageSet:
    """All 200 images."""
    return load_images(CIFAR10, "train", 32)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A data folder with some of the ten classes."""

    def copy(*classes: str) -> Path:
        folder = tmp_path_factory.mktemp("data")
        for name in classes:
            shutil.copytree(CIFAR10 / name, folder / name)
        return folder

    return copy


@pytest.fixture(scope="session")
def trained(photos: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.safetensors` of a finished tiny run on all ten classes. Read only."""
    return train(TINY, photos, tmp_path_factory.mktemp("run"), QUIET)


@contextmanager
def signal_at(steps: Collection[int], signum: signal.Signals = signal.SIGTERM) -> Iterator[list[int]]:
    """Sends a signal to this process in each of these steps that `train` takes from now; gives the steps taken."""
    taken: list[int] = []
    before = signal.getsignal(signum)  # an earlier test's library may have left its own

    def stop(module: torch.nn.Module, *_: object) -> None:
        if isinstance(module, ConvMixer) and module.training and signal.getsignal(signum) is not before:
            taken.append(len(taken) + 1)
            if len(taken) in steps:
                signal.raise_signal(signum)

    hook = torch.nn.modules.module.register_module_forward_hook(stop)
    try:
        yield taken
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `trained` with `evaluation.json` beside it. Read only."""
    path = Path(shutil.copy(trained, tmp_path_factory.mktemp("evaluated")))
    evaluate(path, CIFAR10, path.with_name("evaluation.json"), "cpu")
    return path


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `convmixer-train ARGUMENTS` in this process."""
    from training.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["convmixer-train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Outcome(end.value.code, *capsys.readouterr())

    return run
