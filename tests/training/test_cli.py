"""`convmixer-train` from data to model card, and one line on standard error where a person can mend it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_checkpoint
from model.export import read_metadata
from tests.training.conftest import CIFAR10, Outcome
from training.presets import PRESETS

CommandLine = Callable[..., Outcome]
TINY_NET = ["--set=model.hidden_dim=16", "--set=model.depth=2", "--set=model.kernel_size=3", "--set=batch_size=16"]


def assert_one_line_failure(outcome: Outcome, message: str) -> None:
    assert outcome.code == 1, outcome
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("no_compiler")
def test_from_images_to_model_card(command_line: CommandLine, tmp_path: Path, repository: Path) -> None:
    run = tmp_path / "run"
    checkpoint, artifact, card = run / "model.safetensors", tmp_path / "tiny.onnx", tmp_path / "docs" / "card.md"
    released = repository / "app" / "artifacts" / "fast.onnx"
    steps = [
        ["train", "--preset=small", "--epochs=1", *TINY_NET, "--data", CIFAR10, "--output", run, "--device=cpu"],
        ["evaluate", checkpoint, "--data", CIFAR10, "--device=cpu"],
        ["export", checkpoint, artifact, "--data", CIFAR10, "--name=tiny", "--version=2.0.0", "--command=make train"],
        ["card", checkpoint, artifact, "--data", CIFAR10, "--output", card],
        ["calibrate", checkpoint, "--data", CIFAR10, "--view-size=34", "--device=cpu"],
        ["average", checkpoint, checkpoint, "--output", tmp_path / "mean.safetensors", "--data", CIFAR10, "--device=cpu"],
        ["quantize", released, tmp_path / "int8.onnx", "--data", CIFAR10, "--name=eight"],
    ]
    said = []
    for step in steps:
        outcome = command_line(*step)
        assert outcome.code == 0, outcome
        said.append(outcome.out)
    assert said[0] == f"released {checkpoint}\n"
    report = json.loads((run / "evaluation.json").read_text())
    assert said[1].startswith(f"top-1 {report['top1']:.2%}  top-5 {report['top5']:.2%}")
    assert "top-1 equal to PyTorch on 200 of 200 images" in said[2]
    assert said[3] == f"wrote {card} and {artifact.with_name('tiny.card.html')}\n"
    calibration = load_checkpoint(checkpoint).description["calibration"]
    assert said[4] == (
        f"validation {calibration['accuracy']:.2%}, negative log-likelihood {calibration['after']['nll']:.4f} at temperature "
        f"{calibration['temperature']:.3f}; evaluate and export {checkpoint} again\n"
    )
    assert said[5] == f"validation {calibration['accuracy']:.2%}  released {tmp_path / 'mean.safetensors'}; evaluate it\n"
    assert said[6].startswith(f"wrote {tmp_path / 'int8.onnx'}; accuracy ")
    assert read_metadata(tmp_path / "int8.onnx")["name"] == "eight"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pictures = {f"docs/images/tiny-{kind}.png" for kind in ("curves", "confusion", "reliability", "mistakes")}
    assert pictures | {"docs/card.md", "tiny.onnx", "tiny.onnx.sha256", "tiny.card.html"} < files
    assert {
        "run/evaluation.json",
        "run/evaluation-answers.safetensors",
        "run/model.json",
        "run/model.safetensors",
        "run/last.safetensors",
    } < files
    assert any(name.startswith("run/tensorboard/events") for name in files)
    assert command_line(*steps[0], "--resume").code == 0


@pytest.mark.usefixtures("no_compiler")
def test_a_run_of_so_many_minutes_is_saved_and_goes_on(command_line: CommandLine, tmp_path: Path) -> None:
    command = ["train", "--epochs=1", *TINY_NET, "--data", CIFAR10, "--output", tmp_path / "run", "--device=cpu"]
    outcome = command_line(*command, "--minutes=0.00001")
    assert outcome.code == 143
    assert outcome.err.splitlines()[-1] == "stopped at step 1 at its deadline; continue with --resume"
    assert command_line(*command, "--layout=channels-first", "--minutes=5", "--resume").code == 0


def test_help_lists_the_commands(command_line: CommandLine) -> None:
    outcome = command_line("--help")
    assert outcome.code == 0
    commands = ["train", "evaluate", "compare", "average", "calibrate", "export", "quantize", "card", "study", "presets"]
    assert re.findall(r"^[│ ]*([a-z]+)  +[A-Z]", outcome.out, re.MULTILINE) == commands
    for name in commands:
        assert command_line(name, "--help").code == 0


def test_python_dash_m_training(repository: Path) -> None:
    command = [sys.executable, "-m", "training", "presets"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("cpu: ")


def test_python_dash_m_training_train(repository: Path) -> None:
    command = [sys.executable, "-m", "training.train", "--set", "lr"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, "error: --set takes NAME=VALUE, not 'lr'\n")


def test_presets_are_listed_with_their_evidence(command_line: CommandLine) -> None:
    outcome = command_line("presets")
    assert outcome.code == 0
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.config.model.name}, {preset.config.epochs} epochs" in outcome.out
        assert preset.source in outcome.out
        assert preset.result in outcome.out


@pytest.mark.usefixtures("no_compiler")
def test_a_run_may_begin_with_a_checkpoint_learn_from_others_and_be_compiled(
    command_line: CommandLine, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    compile_with = torch.compile

    def compile_eagerly(network: Any, **options: Any) -> Any:
        compiled.append(network)
        return compile_with(network, **options | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    options = ["--init", trained, "--teacher", trained, "--teacher", trained, "--compile", "--device=cpu", "--precision=float32"]
    net = [*TINY_NET, "--set=model.patch_size=2"]
    outcome = command_line("train", "--epochs=1", *net, "--data", CIFAR10, "--output", tmp_path, *options)
    assert outcome.code == 0, outcome
    training = load_checkpoint(tmp_path / "model.safetensors").description["training"]
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    assert training["init"]["sha256"] == digest
    assert [teacher["sha256"] for teacher in training["teachers"]] == [digest] * 2
    assert len(compiled) == 3, "the network and its teachers"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        *(["train", f"--minutes={minutes}"] for minutes in ("0", "-1", "nan", "inf")),
        ["train", "--epoch", "3"],
        ["train", "--epochs", "three"],
        ["evaluate"],
        ["export", "model.safetensors"],
    ],
)
def test_wrong_usage_exits_2(command_line: CommandLine, arguments: list[str]) -> None:
    outcome = command_line(*arguments)
    assert outcome.code == 2
    assert "Usage:" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=huge"], f"unknown preset 'huge'; known: {', '.join(PRESETS)}"),
        (["--set=lr"], "--set takes NAME=VALUE, not 'lr'"),
        (["--set=rate=1"], "unknown setting 'rate'; known: "),
        (["--set=lr=fast"], "lr='fast' is not a number"),
        (["--set=warmup=2"], "warmup must be in [0, 1)"),
        (["--epochs=0"], "epochs, batch_size and image_size must be at least 1"),
        (["--precision=int8"], "--precision must be float32, bf16 or fp16, not 'int8'"),
        (["--layout=sideways"], "--layout must be channels-last or channels-first, not 'sideways'"),
        (["--device=abacus"], "--device abacus cannot be used here: "),
        (["--device=meta"], "--device takes cpu, cuda or cuda:N, not meta"),
        (["--data=nowhere"], "nowhere is not a folder"),
        (["--set=batch_size=500"], "190 training images do not fill one batch of 500"),
        (["--resume"], "last.safetensors; start without --resume"),
    ],
)
@pytest.mark.usefixtures("no_compiler")
def test_training_failures_are_one_line(command_line: CommandLine, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = command_line("train", *TINY_NET, "--data", CIFAR10, "--output", tmp_path / "run", *arguments)
    assert_one_line_failure(outcome, message)


def test_failures_after_training_are_one_line(command_line: CommandLine, evaluated: Path, trained: Path, tmp_path: Path) -> None:
    data = ["--data", CIFAR10]
    assert_one_line_failure(command_line("evaluate", tmp_path / "none.safetensors", *data), "no checkpoint at")
    unfinished = trained.with_name("last.safetensors")
    assert_one_line_failure(command_line("evaluate", unfinished, *data), f"{unfinished} describes no network")
    assert_one_line_failure(command_line("evaluate", trained, *data, "--output", tmp_path / "no" / "x.json"), "x.json")
    assert_one_line_failure(command_line("evaluate", trained, "--data", tmp_path), "must hold one sub-folder per class")
    assert_one_line_failure(command_line("export", trained, tmp_path / "x.onnx", *data), "evaluation.json is missing")
    assert_one_line_failure(command_line("export", evaluated, tmp_path / "no" / "x.onnx", *data), str(tmp_path / "no"))
    assert_one_line_failure(command_line("card", evaluated, tmp_path / "none.onnx"), "none.onnx")
    assert not list(tmp_path.iterdir())
