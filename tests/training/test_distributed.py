"""Two processes under torchrun train the network that one process trains."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from training.distributed import Group
from training.errors import ConfigError

RUN = ["-m", "training", "train", "--preset=small", "--epochs=3", "--device=cpu", "--precision=float32"]
RUN += ["--set=model.hidden_dim=16", "--set=model.depth=2", "--set=model.kernel_size=3", "--set=batch_size=16"]
RUN += ["--set=augment.mixup=0.5", "--set=ema_decay=0.9"]


def test_shares_cover_the_batch() -> None:
    assert [Group(rank, 4).share(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ConfigError, match="batch_size 9 is not a multiple of the 4 processes"):
        Group(0, 4).share(9)


NEARLY_CONSTANT = """
import torch
from torch import nn
from training.distributed import Group, join
with join(torch.device("cpu")) as group:
    torch.manual_seed(0)
    whole = torch.stack([torch.full((8, 2, 2), 37.3), 30 + 1e-3 * torch.randn(8, 2, 2)], 1)
    expected = nn.BatchNorm2d(2).double()(whole.double()).float()
    model = nn.Sequential(nn.BatchNorm2d(2))
    out = group.wrap(model, torch.device("cpu"))(whole[group.share(8)])
    torch.testing.assert_close(out, expected[group.share(8)], atol=0.02, rtol=0)
"""


def test_channels_that_hardly_vary_are_normalised_as_by_one_process(repository: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", NEARLY_CONSTANT]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_train_the_model_of_one(folder_of: Callable[..., Path], tmp_path: Path, repository: Path) -> None:
    data = ["--data", str(folder_of("cat", "frog", "horse"))]
    # without a compiler on the PATH both use the library's gradients
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for launcher, output in (([], alone), (torchrun, together)):
        command = [sys.executable, *launcher, *RUN, *data, "--output", str(output)]
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch   3 ") == 1, "one process speaks"
    assert done.stdout.count("released ") == 1
    found, expected = (load_checkpoint(folder / "model.safetensors") for folder in (together, alone))
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(
            found.tensors[name], tensor, atol=2e-3, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    losses = [[row["train_loss"] for row in c.description["training"]["history"]] for c in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_sigterm_to_torchrun_saves_what_is_continued(folder_of: Callable[..., Path], tmp_path: Path, repository: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        sys.executable,
        *torchrun,
        *RUN,
        "--data",
        str(folder_of("cat", "frog", "horse")),
        "--output",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": ""}
    with subprocess.Popen(
        [*command, "--set=epochs=100000"], cwd=repository, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        said = "".join(itertools.takewhile(lambda line: not line.startswith("epoch   2 "), process.stderr))
        process.terminate()  # torchrun tells its processes, and fails
        said += process.communicate(timeout=120)[1]
    stops = re.findall(r"stopped at step (\d+) by a signal; continue with --resume", said)
    assert len(stops) == 1, said
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").description["step"] == int(stops[0])
