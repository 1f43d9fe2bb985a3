"""onnxruntime behind one call, `infer`. Chooses the provider, checks the graph, warms up."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engine.artifact import ArtifactMetadata, VerifiedBytes, parse_metadata
from app.errors import StartupError

# onnxruntime reports its use to its maker by default; it reads this when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

Provider = Literal["cpu", "cuda"]
_PROVIDER_NAMES: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Answers(NamedTuple):
    """What the model says of a batch.

    Attributes:
        logits: float32 [N, C].
        similarity: float32 [N], to the training images; None if the artifact's score needs none.
        class_maps: float32 [N, C, h, w]; None if not asked for.
    """

    logits: NDArray[np.float32]
    similarity: NDArray[np.float32] | None
    class_maps: NDArray[np.float32] | None


class Session:
    """One loaded model. Thread-safe: onnxruntime sessions may run on several threads at once.

    Args:
        model: verified model file.
        provider: `auto`, `cpu` or `cuda`.
        lone_threads: on a CPU, threads for a batch that has the machine to itself; 1 keeps no second copy of the model.

    Attributes:
        metadata: what the artifact says of itself.
        provider: where it computes.
        warm_up_ms: duration of the first runs, in milliseconds.

    Raises:
        StartupError: CUDA was asked for and does not work, or the file is not a model of contract 2.
    """

    def __init__(self, model: VerifiedBytes, provider: Literal["auto", "cpu", "cuda"] = "auto", *, lone_threads: int = 1) -> None:
        self.provider, self._session = _open(model, provider)
        self._lone = _create(model, "cpu", lone_threads) if self.provider == "cpu" and lone_threads > 1 else self._session
        self.metadata: ArtifactMetadata = parse_metadata(self._session.get_modelmeta().custom_metadata_map)
        rule = self.metadata.out_of_distribution
        self._outputs = ["logits", "similarity"] if rule and rule.score == "feature_similarity" else ["logits"]
        _check_graph(self._session, self.metadata, {*self._outputs, "class_maps"})
        # without this the class maps would be computed, and thrown away, on every plain request
        self._plain = onnxruntime.RunOptions()
        self._plain.only_execute_path_to_fetches = True
        self.warm_up_ms = self._warm_up()

    def infer(self, images: NDArray[np.uint8], *, explain: bool = False, alone: bool = False) -> Answers:
        """Runs the model on a batch.

        Args:
            images: uint8 [N, S, S, 3], RGB, of the model's input size.
            explain: with class maps.
            alone: no other batch runs now, so this one may use every core.
        """
        session = self._lone if alone else self._session
        wanted = [*self._outputs, "class_maps"] if explain else self._outputs
        found = dict(zip(wanted, session.run(wanted, {"images": images}, self._plain), strict=True))
        return Answers(found["logits"], found.get("similarity"), found.get("class_maps"))

    def _warm_up(self) -> float:
        side = self.metadata.input_size
        begin = time.perf_counter()
        blank = np.zeros((1, side, side, 3), np.uint8)
        logits = self.infer(blank, explain=True).logits
        again = [self.infer(blank).logits, self.infer(blank, alone=True).logits]
        if not np.isfinite(logits).all() or not np.allclose(logits, again, atol=1e-4):
            raise StartupError("the model's answer to a blank image is not finite or not repeatable; export it again")
        return (time.perf_counter() - begin) * 1000


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, or the cgroup quota (rounded up) where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cgroup = Path("/sys/fs/cgroup")
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2, v1
        with suppress(OSError, ValueError):  # no such file, or no quota ("max", -1)
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
            if int(quota) > 0:
                cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _open(model: VerifiedBytes, wanted: Literal["auto", "cpu", "cuda"]) -> tuple[Provider, onnxruntime.InferenceSession]:
    has_cuda = _PROVIDER_NAMES["cuda"] in onnxruntime.get_available_providers()
    if wanted == "cuda" and not has_cuda:
        raise StartupError(
            "CONVMIXER_PROVIDER=cuda, but the installed onnxruntime has no CUDA provider; "
            "install the [cuda] extra as README.md says, or set CONVMIXER_PROVIDER=cpu"
        )
    if wanted == "cpu" or not has_cuda:
        return "cpu", _create(model, "cpu")
    # CUDA's libraries from PyPI lie where the loader does not look; "" means there, and not where PyTorch has its own
    onnxruntime.preload_dlls(directory="")
    session = _create(model, "cuda")
    # onnxruntime falls back to the CPU silently when CUDA's libraries or the device are missing
    if _PROVIDER_NAMES["cuda"] in session.get_providers():
        return "cuda", session
    if wanted == "cuda":
        raise StartupError("CONVMIXER_PROVIDER=cuda, but CUDA could not be started (driver, device or libraries missing)")
    return "cpu", _create(model, "cpu")


def _create(model: VerifiedBytes, provider: Provider, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # One thread a run under load: workers run side by side, and on two cores two single-threaded
    # runs gave 920 images/s, one two-threaded 800 (design, Zen 5).
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # helpers spin while a run lasts, which is what makes them fast, and sleep the moment it ends
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model.content, options, providers=[_PROVIDER_NAMES[provider]])
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise StartupError(f"{model.path.name} is no model that onnxruntime can load: {error}") from error


def _check_graph(session: onnxruntime.InferenceSession, metadata: ArtifactMetadata, needed: set[str]) -> None:
    inputs = [(i.name, i.type, list(i.shape[1:])) for i in session.get_inputs()]
    side = metadata.input_size
    if inputs != [("images", "tensor(uint8)", [side, side, 3])]:
        raise StartupError(f"the model must have one input 'images', uint8 [N, {side}, {side}, 3]; it has {inputs}")
    outputs = {o.name: list(o.shape) for o in session.get_outputs()}
    classes = len(metadata.classes)
    if not needed <= set(outputs) or outputs["logits"][1] != classes or outputs["class_maps"][1] != classes:
        raise StartupError(f"the model must have outputs {sorted(needed)}, for {classes} classes; it has {outputs}")
