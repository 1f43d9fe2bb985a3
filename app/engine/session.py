"""onnxruntime behind one call, `infer`. Chooses the provider, checks the graph, warms up."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import redirect_stdout
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engine.artifact import ArtifactMetadata, VerifiedBytes, parse_metadata
from app.errors import StartupError
from app.memory import return_free_pages

# onnxruntime reports its use to its maker by default; it reads this when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

logger = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda", "openvino"]
Precision = Literal["f32", "bf16"]
_PROVIDER_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_REPEATABLE: dict[Precision, float] = {"f32": 1e-4, "bf16": 0.1}
"""Most that logits of the same image may differ by from run to run: other threads sum, and round, in another order."""


class Outputs(NamedTuple):
    """What the model says of a batch.

    Attributes:
        logits: float32 [N, C].
        similarity: float32 [N], cosine of the whitened features and the nearest class mean; None if the score needs none.
        class_maps: float32 [N, C, h, w]; None if not asked for.
    """

    logits: NDArray[np.float32]
    similarity: NDArray[np.float32] | None
    class_maps: NDArray[np.float32] | None


class Session:
    """One loaded model. Thread-safe: onnxruntime sessions may run on several threads at once.

    Args:
        model: verified model file.
        provider: `auto`, `cpu`, `cuda` or `openvino`. `auto` is CUDA if it works, else `cpu`, never `openvino`: that is
            no faster in float32 (docs/performance.md), and bf16, which rounds, is for the operator to choose.
        precision: of what OpenVINO computes; the other providers have float32 alone (on CUDA convolutions round their inputs to
            TF32, onnxruntime's default).
        cores: this process may use. On a CPU a batch that has the machine to itself takes them all, in a second session; 1
            keeps none.

    Attributes:
        metadata: what the artifact says of itself.
        sha256: of the model file, hexadecimal.
        provider: where it computes.
        cores: as given.
        warm_up_ms: duration of the first runs, in milliseconds.

    Raises:
        StartupError: what was asked for is not installed or does not work, or the file is not a model of contract 2.
    """

    def __init__(
        self,
        model: VerifiedBytes,
        provider: Literal["auto", "cpu", "cuda", "openvino"] = "auto",
        *,
        precision: Precision = "f32",
        cores: int = 1,
    ) -> None:
        self.provider, self._session = _open(model, provider, precision, cores)
        self.sha256, self.cores, self._precision = model.sha256, cores, precision
        shares = self.provider != "cuda" and cores > 1
        self._lone = _create(model, self.provider, precision, threads=cores) if shares else self._session
        self.metadata: ArtifactMetadata = parse_metadata(self._session.get_modelmeta().custom_metadata_map)
        rule = self.metadata.out_of_distribution
        self._outputs = ["logits", "similarity"] if rule and rule.score == "feature_similarity" else ["logits"]
        _check_graph(self._session, self.metadata, {*self._outputs, "class_maps"})
        # without this the class maps would be computed, and thrown away, on every plain request (OpenVINO does so anyway)
        self._plain = onnxruntime.RunOptions()
        self._plain.only_execute_path_to_fetches = True
        self.warm_up_ms = self._warm_up()
        if precision != "f32":
            self._check_precision(model)

    def infer(self, images: NDArray[np.uint8], *, explain: bool = False, alone: bool = False) -> Outputs:
        """Runs the model on a batch.

        Args:
            images: uint8 [N, S, S, 3], RGB, of the model's input size.
            explain: with class maps.
            alone: no other batch runs now, so this one may use every core.
        """
        session = self._lone if alone else self._session
        wanted = [*self._outputs, "class_maps"] if explain else self._outputs
        found = dict(zip(wanted, session.run(wanted, {"images": images}, self._plain), strict=True))
        return Outputs(found["logits"], found.get("similarity"), found.get("class_maps"))

    def release_memory(self) -> None:
        """Gives back what batches needed, 8 MiB a worker and more; the next takes it again.

        On CUDA and with OpenVINO what the runtime holds stays.
        """
        if self.provider == "cpu":
            self._shrink_arenas()
        return_free_pages()

    def _shrink_arenas(self) -> None:
        last = onnxruntime.RunOptions()
        last.only_execute_path_to_fetches = True
        last.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        side = self.metadata.input_size
        for session in {self._session, self._lone}:
            session.run(["logits"], {"images": np.zeros((1, side, side, 3), np.uint8)}, last)

    def _warm_up(self) -> float:
        side = self.metadata.input_size
        begin = time.perf_counter()
        blank = np.zeros((1, side, side, 3), np.uint8)
        logits = self.infer(blank, explain=True).logits
        again = [self.infer(blank).logits, self.infer(blank, alone=True).logits]
        if not np.isfinite(logits).all() or not np.allclose(logits, again, atol=_REPEATABLE[self._precision]):
            raise StartupError("the model's answer to a blank image is not finite or not repeatable; export it again")
        return (time.perf_counter() - begin) * 1000

    def _check_precision(self, model: VerifiedBytes) -> None:
        """OpenVINO says nothing when the CPU lacks a precision, and takes float32; but then nothing is rounded, either."""
        side = self.metadata.input_size
        noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
        (exact,) = _create(model, "cpu", "f32").run(["logits"], {"images": noise})
        # of the largest: a network with small logits is rounded by little, too
        if np.allclose(self.infer(noise).logits, exact, rtol=0, atol=_REPEATABLE["f32"] * np.abs(exact).max()):
            raise StartupError(
                f"CONVMIXER_PRECISION={self._precision}, but on this CPU, which lacks it, OpenVINO computes in f32; "
                "set CONVMIXER_PRECISION=f32"
            )


def _open(
    model: VerifiedBytes, wanted: Literal["auto", "cpu", "cuda", "openvino"], precision: Precision, cores: int
) -> tuple[Provider, onnxruntime.InferenceSession]:
    installed = onnxruntime.get_available_providers()
    if wanted != "auto" and _PROVIDER_NAMES[wanted] not in installed:
        raise StartupError(
            f"CONVMIXER_PROVIDER={wanted}, but the installed onnxruntime has no "
            f"{_PROVIDER_NAMES[wanted].removesuffix('ExecutionProvider')} provider; "
            f"install the [{wanted}] extra as README.md says, or set CONVMIXER_PROVIDER=cpu"
        )
    if precision != "f32" and wanted != "openvino":
        raise StartupError(f"CONVMIXER_PRECISION={precision} is for CONVMIXER_PROVIDER=openvino; {wanted} computes in f32")
    if wanted == "openvino":
        return "openvino", _create(model, "openvino", precision, runs=cores)
    if wanted == "cpu" or _PROVIDER_NAMES["cuda"] not in installed:
        return "cpu", _create(model, "cpu")
    try:
        return "cuda", _create_on_gpu(model)
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        on_cpu = _create(model, "cpu")  # if it is the model's fault, this says so
        if wanted == "cuda":
            raise StartupError(f"CONVMIXER_PROVIDER=cuda, but CUDA cannot be used: {error}") from error
        logger.warning("CUDA cannot be used, the CPU computes: %s", error)
        return "cpu", on_cpu


def _create_on_gpu(model: VerifiedBytes) -> onnxruntime.InferenceSession:
    """As `_create`, and sees that it computes: cuDNN is loaded, and memory taken, by the first run."""
    # CUDA's libraries from PyPI lie where the loader does not look; "" means there, and not where PyTorch has its own
    with redirect_stdout(sys.stderr):  # where it says what it cannot load; standard output may be a table of answers
        onnxruntime.preload_dlls(directory="")
    session = _create(model, "cuda")
    # onnxruntime goes on without CUDA, and says so in its log alone, if the provider's library cannot be loaded
    if _PROVIDER_NAMES["cuda"] not in session.get_providers():
        raise StartupError("its libraries, or a driver that is new enough for them (CUDA 13: 580), are missing")
    images = session.get_inputs()[0]
    session.run(None, {images.name: np.zeros((1, *images.shape[1:]), np.uint8)})
    return session


def _create(
    model: VerifiedBytes, provider: Provider, precision: Precision = "f32", *, threads: int = 1, runs: int = 1
) -> onnxruntime.InferenceSession:
    """A session whose runs take `threads` threads each, and of which `runs` may run side by side (OpenVINO alone asks)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # One thread a run under load: workers run side by side, and on two cores two single-threaded
    # runs gave 920 images/s, one two-threaded 800 (design, Zen 5).
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # helpers spin while a run lasts, which is what makes them fast, and sleep the moment it ends
    options.add_session_config_entry("session.force_spinning_stop", "1")
    choices = {}
    if provider == "cuda":
        # batches have many sizes, and cuDNN plans a convolution anew for each other one: the default, a search, would take longer
        # than what it finds can save (microsoft/onnxruntime issue 23006). Without TF32, as answers are said to be float32; and
        # memory is taken as it is needed, not by powers of two. (Not measured: no GPU was there)
        choices = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    elif provider == "openvino":
        # a part of the graph that OpenVINO cannot take would else go to onnxruntime's own kernels, without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # OpenVINO computes in threads of its own, one stream a run, while the worker that asked waits: never more than cores
        streams = {"NUM_STREAMS": str(runs), "INFERENCE_NUM_THREADS": str(runs * threads), "INFERENCE_PRECISION_HINT": precision}
        choices = {"device_type": "CPU", "load_config": json.dumps({"CPU": streams})}
    try:
        chosen = [(_PROVIDER_NAMES[provider], choices)]
        # without the fallback, which hides why a provider could not be started
        session = onnxruntime.InferenceSession(model.content, options, providers=chosen, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise StartupError(f"{model.path.name} cannot be loaded by onnxruntime: {error}") from error
    session.disable_fallback()  # a failed run would make it one of the CPU's, under the workers and without a word
    return session


def _check_graph(session: onnxruntime.InferenceSession, metadata: ArtifactMetadata, needed: set[str]) -> None:
    inputs = [(i.name, i.type, list(i.shape[1:])) for i in session.get_inputs() if not isinstance(i.shape[0], int)]
    side = metadata.input_size
    if inputs != [("images", "tensor(uint8)", [side, side, 3])]:
        raise StartupError(f"the model must have one input 'images', uint8 [N, {side}, {side}, 3], for any N; it has {inputs}")
    outputs = {o.name: list(o.shape) for o in session.get_outputs()}
    classes = len(metadata.classes)
    ranks = {"logits": 2, "similarity": 1, "class_maps": 4}
    fits = all(len(outputs.get(name, ())) == ranks[name] for name in needed)
    if not fits or outputs["logits"][1] != classes or outputs["class_maps"][1] != classes:
        raise StartupError(f"the model must have outputs {sorted(needed)}, for {classes} classes; it has {outputs}")
