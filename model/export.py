"""Checkpoint → artifact: one ONNX file with preprocessing inside and its whole description in its metadata.

Normalisation is folded into the stem's weights, which is exact because no architecture's patch embedding has padding. Nothing is
published unless onnxruntime answers as PyTorch does.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor, nn

from model.architectures import Network, count_macs
from model.checkpoint import Checkpoint, build_model, build_similarity
from model.enlarge import Enlarge
from model.errors import ExportError
from model.similarity import FeatureSimilarity

CONTRACT = "convmixer-artifact/1"
METADATA_KEY = "convmixer"
OPSET = 20
"""The first with Gelu as one operator: onnxruntime then keeps its own layout throughout (docs/performance.md)."""
PARITY_BATCHES = (1, 2, 7)
LOGIT_TOLERANCE = 1e-3
_PARITY_CHUNK, _PARITY_SIDE = 200, 52
"""Images compared at once, up to so many pixels a side; of larger ones fewer, for their feature maps' sake."""


class Servable(nn.Module):
    """The network as the service calls it: uint8 pixels in, logits, class maps and similarity out.

    Args:
        model: a trained network.
        similarity: of its features.
        mean: per-channel mean of pixels in [0, 1] that the network was trained with.
        std: per-channel standard deviation, likewise.
        enlarge: what the network does with pixels in 0..255 before it looks at them.
    """

    def __init__(
        self, model: Network, similarity: FeatureSimilarity, mean: list[float], std: list[float], enlarge: nn.Module
    ) -> None:
        super().__init__()
        self.model = model
        self.enlarge = enlarge
        self.similarity = similarity
        # conv(w, (x/255 - mean)/std) = conv(w/(255·std), x) - Σ w·mean/std, since a stride-p patch has no padding
        scale = 1 / torch.tensor(std).view(1, -1, 1, 1)
        shift = torch.tensor(mean).view(1, -1, 1, 1)
        (conv,) = (module for module in model.stem.modules() if isinstance(module, nn.Conv2d))
        assert conv.bias is not None  # noqa: S101 - for mypy
        with torch.no_grad():
            conv.bias -= (conv.weight * scale * shift).sum((1, 2, 3))
            conv.weight *= scale / 255

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [N, S, S, 3], RGB → logits float32 [N, C], class maps float32 [N, C, V/p, V/p], similarity float32 [N].

        logits = mean over positions of class maps + bias.
        """
        features = self.model.forward_features(self.enlarge(images.permute(0, 3, 1, 2).float()))
        class_maps = nn.functional.conv2d(features, self.model.head.weight[:, :, None, None])
        pooled = features.mean((2, 3))
        return self.model.head(pooled), class_maps, self.similarity(pooled)


@dataclass(frozen=True)
class ParityReport:
    """How far onnxruntime is from PyTorch.

    Attributes:
        max_logit_difference: largest absolute difference of any logit.
        images: images compared.
        top1_equal: images with the same top-1 class.
    """

    max_logit_difference: float
    images: int
    top1_equal: int


def export(
    checkpoint: Checkpoint, images: NDArray[np.uint8], output: Path, metadata: dict[str, Any], score: str = "feature_similarity"
) -> ParityReport:
    """Writes the artifact and its `.sha256`, if it answers as PyTorch does.

    Args:
        checkpoint: a released checkpoint.
        images: uint8 [N, S, S, 3], RGB, to check with; the whole test set for a release.
        output: path of the .onnx file.
        score: tells pictures of none of the classes, a key of the checkpoint's calibration thresholds.
        metadata: what the checkpoint does not know: name, version, resize rule, date, test results, ….

    Returns:
        The parity that was measured; it is part of the artifact's metadata too.

    Raises:
        CheckpointError: the checkpoint was calibrated before there was a `model.similarity`; nothing is written.
        ExportError: the answers differ; nothing is written.
    """
    similarity = build_similarity(checkpoint)
    description = checkpoint.description
    view = _view(description)
    reference = build_model(checkpoint)
    complete = {
        "contract": CONTRACT,
        **metadata,
        "classes": description["classes"],
        "input_size": description["image_size"],
        "view_size": view,
        "temperature": description["calibration"]["temperature"],
        "out_of_distribution": {"score": score, "threshold": description["calibration"]["thresholds"][score]},
        "architecture": description["name"],
        "parameters": description["parameters"],
        "macs": count_macs(reference.config, view),
        "code_version": description["code_version"],
    }
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        draft = Path(folder) / output.name
        _write_graph(build_model(checkpoint), similarity, description, draft)
        parity = check_parity(draft, reference, similarity, description, images)
        complete["parity"] = asdict(parity)
        publish(draft, complete, output)
    return parity


def publish(draft: Path, metadata: dict[str, Any], output: Path) -> None:
    """Makes a graph an artifact: with its description, and its hash beside it.

    Args:
        draft: an .onnx file on the same file system; it is moved.
        metadata: the description, in place of what it may have.
        output: path of the artifact.
    """
    proto = onnx.load(draft)
    del proto.metadata_props[:]
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata))
    content = proto.SerializeToString()
    draft.write_bytes(content)
    draft.replace(output)
    output.with_name(output.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {output.name}\n")


def read_metadata(artifact: Path) -> dict[str, Any]:
    """The description that `publish` has put into an artifact.

    Raises:
        ExportError: the file is none.
        OSError: it cannot be read.
    """
    try:
        properties = {p.key: p.value for p in onnx.load(artifact).metadata_props}
        metadata: dict[str, Any] = json.loads(properties[METADATA_KEY])
    except (DecodeError, KeyError) as error:
        raise ExportError(f"{artifact} is not an artifact of this project") from error
    return metadata


def _view(description: dict[str, Any]) -> int:
    view: int = description.get("view_size", description["image_size"])  # checkpoints of before networks enlarged have none
    return view


def _enlargement(description: dict[str, Any], white: float) -> nn.Module:
    side, view = description["image_size"], _view(description)
    return nn.Identity() if view == side else Enlarge(side, view, description["resample"], white)


def _write_graph(model: Network, similarity: FeatureSimilarity, description: dict[str, Any], path: Path) -> None:
    side = description["image_size"]
    mean, std = description["normalize_mean"], description["normalize_std"]
    servable = Servable(model, similarity, mean, std, _enlargement(description, white=255.0)).eval()
    example = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    program = torch.onnx.export(
        servable,
        (example,),
        input_names=["images"],
        output_names=["logits", "class_maps", "similarity"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # noqa: S101 - for mypy
    proto = program.model_proto
    for node in proto.graph.node:  # source locations of the exporter: five times the size of the graph
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.graph.metadata_props[:]
    onnx.checker.check_model(proto, full_check=True)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ExportError("the graph keeps weights outside the file")
    if any(opset.domain not in ("", "ai.onnx") for opset in proto.opset_import):
        raise ExportError(f"the graph needs operators beyond ONNX: {[o.domain for o in proto.opset_import]}")
    path.write_bytes(proto.SerializeToString())


@torch.inference_mode()
def check_parity(
    path: Path, reference: Network, similarity: FeatureSimilarity, description: dict[str, Any], images: NDArray[np.uint8]
) -> ParityReport:
    """Compares onnxruntime with PyTorch on small batches and on every image given.

    Raises:
        ExportError: a logit or similarity differs by more than `LOGIT_TOLERANCE`, a top-1 class differs, or
            logits ≠ mean(class maps) + bias.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(description[k]).view(1, 3, 1, 1) for k in ("normalize_mean", "normalize_std"))
    enlarge = _enlargement(description, white=1.0)
    chunks = [images[:n] for n in PARITY_BATCHES]
    at_once = max(1, _PARITY_CHUNK * _PARITY_SIDE**2 // max(_PARITY_SIDE, _view(description)) ** 2)
    chunks += [images[i : i + at_once] for i in range(0, len(images), at_once)]
    difference, similarity_difference, equal, compared = 0.0, 0.0, 0, 0
    for number, chunk in enumerate(chunks):
        outputs = session.run(["logits", "class_maps", "similarity"], {"images": chunk})
        logits, class_maps, cosines = (np.asarray(output) for output in outputs)
        pixels = enlarge(torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 255)
        features = reference.forward_features((pixels - mean) / std)
        expected = reference.forward_head(features).numpy()
        apart = float(np.abs(cosines - similarity(features.mean((2, 3))).numpy()).max())
        similarity_difference = max(similarity_difference, apart)
        difference = max(difference, float(np.abs(logits - expected).max()))
        from_maps = class_maps.mean((2, 3)) + reference.head.bias.numpy()
        if not np.allclose(from_maps, logits, atol=LOGIT_TOLERANCE):
            raise ExportError("logits are not the mean of the class maps plus the bias")
        if number >= len(PARITY_BATCHES):
            equal += int((logits.argmax(1) == expected.argmax(1)).sum())
            compared += len(chunk)
    if difference > LOGIT_TOLERANCE or equal != compared:
        raise ExportError(
            f"onnxruntime differs from PyTorch: logits by up to {difference:.2e} (allowed {LOGIT_TOLERANCE:.0e}), "
            f"top-1 equal on {equal} of {compared} images; no artifact was written"
        )
    if similarity_difference > LOGIT_TOLERANCE:
        raise ExportError(f"the similarity differs from PyTorch's by up to {similarity_difference:.2e}")
    return ParityReport(difference, compared, equal)
