"""The training checkpoint, from which a run resumes, and the released one at its end."""

from __future__ import annotations

import errno
import hashlib
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.architectures import Network, config_from_dict
from model.checkpoint import CheckpointError, build_model, load_checkpoint, network_weights, save_checkpoint
from model.convmixer import ConvMixerConfig, count_parameters
from model.grow import can_grow, grow
from training import __version__
from training.calibrate import Calibration
from training.config import TrainConfig
from training.data import ImageSet, check_held_out
from training.ema import MovingAverage
from training.errors import ConfigError, ResumeError, StorageError
from training.runtime import Runtime, hardware


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    init: dict[str, Any] | None = None  # which checkpoint's weights it began with


class TrainingState:
    """Writes and reads the training checkpoint, and the released one at the end.

    Args:
        config: of the run.
        data: all training images, held-out ones too.
        teachers: name and SHA-256 of each teacher's checkpoint.
        path: of the training checkpoint; the released one lies beside it.
        model: in training.
        ema: its moving average.
        optimizer: of the model's parameters, in their order.
        scaler: of the loss, in use with fp16.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageSet,
        teachers: list[dict[str, str]],
        path: Path,
        model: Network,
        ema: MovingAverage,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.config, self.path, self.classes = config, path, data.classes
        self.model, self.ema, self.optimizer, self.scaler = model, ema, optimizer, scaler
        self.data, self.data_sha256, self.teachers = data, data.fingerprint(), teachers
        self.code_sha256, self.code_changed = _code_sha256(), False

    def save(self, progress: Progress) -> None:
        """Writes the training checkpoint.

        Args:
            progress: where the run stands.

        Raises:
            StorageError: it could not be written; the one before it is kept.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.module.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        description = {
            "config": self.config.to_dict(),
            "data_sha256": self.data_sha256,
            "teachers": self.teachers,
            "code_version": __version__,
            "code_sha256": self.code_sha256,
            "code_changed": self.code_changed,
            "step": progress.step,
            "seconds": progress.seconds,
            "loss_sum": progress.loss_sum,
            "history": progress.history,
            "init": progress.init,
            "scaler": self.scaler.state_dict(),
        }
        _write(self.path, tensors, description)

    def load(self) -> Progress:
        """Restores model, average and optimizer in place.

        Returns:
            Where the run stood.

        Raises:
            ResumeError: there is no checkpoint, or it is of other data, settings, code or another teacher.
        """
        try:
            checkpoint = load_checkpoint(self.path)
        except CheckpointError as error:
            what_now = "remove it, or give another --output" if self.path.exists() else "start without --resume"
            raise ResumeError(f"{error}; {what_now}") from error
        found = checkpoint.description
        if found["data_sha256"] != self.data_sha256:
            raise ResumeError(f"{self.path} was trained on other data; resuming needs exactly the same images and labels")
        if found["code_version"] != __version__:
            versions = f"{self.path} is from version {found['code_version']}, this is {__version__}"
            raise ResumeError(f"{versions}; remove it to start anew, or give another --output")
        if found.get("teachers", []) != self.teachers:
            names = [
                " and ".join(f"{teacher['name']}, SHA-256 {teacher['sha256'][:12]}…" for teacher in teachers) or "none"
                for teachers in (found.get("teachers", []), self.teachers)
            ]
            raise ResumeError(
                f"{self.path} had another teacher ({names[0]}) than this run ({names[1]}); give --teacher the same files, in the "
                "same order, as they were then (`convmixer-train calibrate` rewrites one)"
            )
        self.code_changed = found.get("code_changed", False)
        if found.get("code_sha256") != self.code_sha256:
            self.code_changed = True
            print(
                f"the code in training/ or model/ is not that which wrote {self.path}: the run goes on, but will not end as one "
                "that was never stopped; the model card says so",
                file=sys.stderr,
            )
        ours, theirs = _flatten(self.config.to_dict()), _flatten(TrainConfig.from_dict(found["config"]).to_dict())
        changed = [
            f"{key} was {theirs.get(key)}, now {ours.get(key)}" for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)
        ]
        if changed:
            raise ResumeError(f"settings differ from {self.path}: {'; '.join(changed)}")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            group, _, key = name.partition(".")
            groups[group][key] = tensor
        self.model.load_state_dict(groups["model"])
        self.ema.module.load_state_dict(groups["ema"])
        parameters = list(self.model.parameters())
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in groups["optimizer"].items():
            index, slot = key.split(".")
            # files hold plain strides, but the fused optimizer walks a parameter and its moments through memory side by side
            like = torch.empty_like(parameters[int(index)]) if tensor.dim() else torch.empty_like(tensor)
            slots.setdefault(int(index), {})[slot] = like.copy_(tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        if found["scaler"] and self.scaler.is_enabled():  # the precision may be another one now
            self.scaler.load_state_dict(found["scaler"])
        return Progress(found["step"], found["seconds"], found["loss_sum"], found["history"], found.get("init"))

    @property
    def released_path(self) -> Path:
        """Where the released checkpoint lies, or will."""
        return self.path.with_name("model.safetensors")

    def has_released(self, progress: Progress) -> bool:
        """Whether what lies beside the training checkpoint was released by this very run: the history has its times in it."""
        try:
            found = load_checkpoint(self.released_path).description
        except CheckpointError:
            return False
        return bool(found.get("training", {}).get("history") == progress.history)

    def start_from(self, path: Path) -> dict[str, Any]:
        """Copies a released checkpoint's weights into model and average; the head stays new where the classes differ.

        A narrower ConvMixer, or one with a smaller kernel, is grown to this one's size first (`model.grow`).

        Returns:
            What the new checkpoint says about its origin: name, SHA-256 of the file, epochs and seconds behind it.

        Raises:
            CheckpointError: `path` is not a checkpoint.
            ConfigError: it holds another network, or one of pixels normalised differently.
        """
        found = load_checkpoint(path)
        build_model(found)  # one that is still in training describes no network
        ours, theirs = self.config.model, config_from_dict(found.description["model"])
        theirs = replace(theirs, num_classes=ours.num_classes)
        same_classes = found.description["classes"] == self.classes
        weights = {k: v for k, v in network_weights(found).items() if same_classes or not k.startswith("head.")}
        if isinstance(ours, ConvMixerConfig) and isinstance(theirs, ConvMixerConfig) and can_grow(theirs, ours):
            weights = grow(weights, theirs, ours, self.config.seed)
        elif ours != theirs:
            here, there = asdict(ours), asdict(theirs)
            changed = [
                f"{key} is {there.get(key)}, here {here.get(key)}" for key in {**here, **there} if here.get(key) != there.get(key)
            ]
            raise ConfigError(f"{path} holds another network: {'; '.join(changed)}")
        self.config.check_normalized_alike(path, found.description)
        for network in (self.model, self.ema.module):
            network.load_state_dict(weights, strict=same_classes)
        before = found.description["training"]
        check_held_out(path, found.description, self.data, self.config.val_fraction)
        return {
            "name": found.description["name"],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "epochs": len(before["history"]) + (before.get("init") or {}).get("epochs", 0),
            "seconds": before["seconds"] + (before.get("init") or {}).get("seconds", 0),
        }

    def check_start(self, path: Path, progress: Progress) -> None:
        """Refuses to go on with a run that began otherwise than it is told to now.

        Args:
            path: of the released checkpoint that it is to have begun with.
            progress: of the run.

        Raises:
            CheckpointError: `path` is not a checkpoint.
            ResumeError: it began with another, or with none.
        """
        load_checkpoint(path)
        sha256, began = hashlib.sha256(path.read_bytes()).hexdigest(), progress.init
        if began is None or began["sha256"] != sha256:
            before = f"with {began['name']}, SHA-256 {began['sha256'][:12]}…" if began else "without --init"
            raise ResumeError(
                f"{self.path} began {before}, and not with {path}, SHA-256 {sha256[:12]}…; give --init what it was then, or none "
                "(`convmixer-train calibrate` rewrites one), or another --output"
            )

    def release(
        self,
        model: nn.Module,
        progress: Progress,
        calibration: Calibration,
        n_training: int,
        n_validation: int,
        runtime: Runtime,
    ) -> Path:
        """Writes the released checkpoint, `model.safetensors`.

        Args:
            model: what is released, the average if there is one.
            progress: where the run stands.
            calibration: fitted on the held-out images.
            n_training: images it was trained with.
            n_validation: images held out.
            runtime: what it ran on.

        Returns:
            Its path.

        Raises:
            StorageError: it could not be written.
        """
        description = {
            "name": self.config.model.name,
            "model": self.config.to_dict()["model"],
            "parameters": count_parameters(model),
            "classes": self.classes,
            **self.config.described_input(),
            "calibration": calibration.figures,
            "training": {
                "config": self.config.to_dict(),
                "steps": progress.step,
                "total_steps": self.config.epochs * (n_training // self.config.batch_size),
                "images": n_training,
                "validation_images": n_validation,
                "data_sha256": self.data_sha256,
                "source_sha256": self.data.source_sha256,
                "pictures_sha256": self.data.pictures_sha256,
                "teachers": self.teachers,
                "code_changed": self.code_changed,
                "seconds": progress.seconds,
                "history": progress.history,
                "init": progress.init,
                "hardware": hardware(runtime),
                "torch": torch.__version__,
                "precision": runtime.precision,
            },
            "code_version": __version__,
        }
        _write(self.released_path, {**model.state_dict(), **calibration.tensors()}, description)
        return self.released_path


_NOT_IN_A_RUN = {
    "__init__.py",
    "__main__.py",
    "average.py",
    "cli.py",
    "compare.py",
    "errors.py",
    "export.py",
    "figures.py",
    "presets.py",
    "quantize.py",
    "release.py",
    "report.py",
    "study.py",
    "study_report.py",
}
"""Modules of which nothing that a run ends with depends; its settings are compared by themselves."""


def _code_sha256() -> str:
    """Of what a run computes with, as far as it is ours."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.iterdir(), *(here.parent / "model").iterdir()]):
        if path.suffix in {".py", ".cpp", ".h"} and path.name not in _NOT_IN_A_RUN:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _write(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    try:
        save_checkpoint(path, tensors, description)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC or "No space" in str(error) else str(error)
        raise StorageError(f"{path} could not be written: {reason}; an earlier checkpoint there is untouched") from error
