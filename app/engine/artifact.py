"""The model file: verified byte for byte before anything parses it, then described by its own metadata.

Contract 2 of docs/architecture.md. The expected SHA-256 comes from `CONVMIXER_MODEL_SHA256` or from `FILE.sha256`
beside the artifact, in the format of sha256sum(1).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.errors import StartupError
from app.images import ResizeRule

CONTRACT = "convmixer-artifact/1"
METADATA_KEY = "convmixer"
"""The one ONNX metadata property, a JSON object."""


class OutOfDistribution(BaseModel):
    """How "none of my classes" is decided: `score` below `threshold`.

    `max_probability` is the largest probability (arXiv 1610.02136), `energy` the log of the sum of the exponentials of
    the logits after temperature scaling (arXiv 2010.03759, with the sign turned), `feature_similarity` the model's output
    `similarity`: the cosine of the picture's whitened features to the nearest class's mean (model/similarity.py).
    """

    score: Literal["max_probability", "energy", "feature_similarity"]
    threshold: float


class ArtifactMetadata(BaseModel):
    """What the service needs to know of a model. Further keys are kept and shown at `/model`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    contract: str
    name: str
    version: str
    classes: list[str] = Field(min_length=2)
    input_size: int = Field(ge=1)
    resize: ResizeRule
    temperature: float = Field(gt=0)
    out_of_distribution: OutOfDistribution | None = None

    @model_validator(mode="before")
    @classmethod
    def _resize_needs_the_side(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("resize"), dict) and "input_size" in values:
            values = {**values, "resize": {**values["resize"], "side": values["input_size"]}}
        return values


@dataclass(frozen=True)
class VerifiedBytes:
    """A model file whose hash is the expected one.

    Attributes:
        content: the ONNX protobuf.
        sha256: its hash, hexadecimal.
        path: where it came from.
    """

    content: bytes
    sha256: str
    path: Path


def read_verified(path: Path, expected_sha256: str | None = None) -> VerifiedBytes:
    """Reads a model file and checks its hash.

    Args:
        path: the .onnx file.
        expected_sha256: hexadecimal; None takes it from `path` + `.sha256`.

    Raises:
        StartupError: the file or its hash is missing, they do not match, or it is a link out of its folder.
    """
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise StartupError(f"model {path} is a link out of its folder; name the file it leads to")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupError(f"model {path} cannot be read: {error.strerror}; set CONVMIXER_MODEL") from error
    if expected_sha256 is None:
        sums = path.with_name(path.name + ".sha256")
        try:
            expected_sha256 = sums.read_text(encoding="utf-8-sig").split()[0]  # Windows writes a mark before it, or UTF-16
        except (OSError, UnicodeDecodeError, IndexError) as error:
            raise StartupError(
                f"no hash to verify {path} with: write {sums} (UTF-8: sha256sum FILE > FILE.sha256) or set CONVMIXER_MODEL_SHA256"
            ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256.lower():  # and capitals
        raise StartupError(f"model {path} has SHA-256 {found}, expected {expected_sha256}: damaged or not the released file")
    return VerifiedBytes(content, found, path)


def parse_metadata(properties: dict[str, str]) -> ArtifactMetadata:
    """Typed metadata of an opened model.

    Args:
        properties: the ONNX metadata properties.

    Raises:
        StartupError: the model was not exported to the contract this service speaks.
    """
    try:
        metadata = ArtifactMetadata.model_validate_json(properties[METADATA_KEY])
    except KeyError as error:
        raise StartupError("the model has no 'convmixer' metadata; export it with `convmixer-train export`") from error
    except ValidationError as error:
        raise StartupError(f"the model's metadata is not valid: {error}") from error
    if metadata.contract != CONTRACT:
        raise StartupError(f"the model speaks {metadata.contract}, this service {CONTRACT}; export it again")
    return metadata
