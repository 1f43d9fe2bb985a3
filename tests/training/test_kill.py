"""`kill -9` at ten random moments of one run: what lies on the disk can always be continued, and the end is the same."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from tests.training.conftest import CIFAR10, QUIET, TINY
from training import train as train_module
from training.config import TrainConfig
from training.data import load_images

KILLS = 10
CONFIG = replace(TINY, epochs=16)
STEPS = 16 * 11
KILLED_WITHIN = STEPS // (KILLS + 6)
"""Steps of a life, at most, so that those of a slow killer do not come to all."""


def run(config: TrainConfig, output: Path) -> None:
    """The whole life of a process that trains; it saves after every step, so that many kills hit a write."""
    torch.set_num_threads(1)
    os.environ["PATH"] = ""  # no compiler
    train_module.CHECKPOINT_INTERVAL_S = 0.0
    resume = (output / "last.safetensors").exists()
    train_module.train(config, load_images(CIFAR10, "train", 32), output, QUIET, resume=resume)


def saved_step(output: Path) -> int:
    """The step on the disk; fails if what lies there cannot be loaded."""
    last = output / "last.safetensors"
    return int(load_checkpoint(last).description["step"]) if last.exists() else 0


def test_killed_ten_times_it_ends_with_the_weights_of_an_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("COVERAGE_PROCESS")]:
        monkeypatch.delenv(name)  # the fork server outlives pytest, and would leave a report that nobody collects
    processes = multiprocessing.get_context("forkserver")  # imports torch once
    processes.set_forkserver_preload(["tests.training.test_kill"])
    chance = random.Random(0)  # noqa: S311 - not a secret
    undisturbed = processes.Process(target=run, args=(CONFIG, tmp_path / "whole"))
    undisturbed.start()
    undisturbed.join()
    assert undisturbed.exitcode == 0

    output = tmp_path / "killed"
    for _ in range(KILLS):
        before = saved_step(output)
        process = processes.Process(target=run, args=(CONFIG, output))
        process.start()
        target = before + chance.randint(1, KILLED_WITHIN)
        while saved_step(output) < target:
            assert process.is_alive(), "it ended before it could be killed"
        process.join(chance.uniform(0, 0.03))  # somewhere within the next steps
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert target <= saved_step(output) < STEPS
    last = processes.Process(target=run, args=(CONFIG, output))
    last.start()
    last.join()
    assert last.exitcode == 0
    found, expected = (load_checkpoint(tmp_path / name / "model.safetensors").tensors for name in ("killed", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
