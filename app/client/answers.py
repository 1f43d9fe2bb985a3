"""What the client gives back: frozen dataclasses for answers, one class a kind of failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ClassProbability:
    """One class with its calibrated probability."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Where in the picture the evidence for `label` lies: rows from top to bottom, 0 the weakest and 1 the strongest."""

    label: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model answered."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image.

    Attributes:
        index: position among the images given, from 0.
        filename: the path, if a path was given.
        label: the most probable class.
        confidence: its probability, 0 to 1.
        top_k: the most probable classes, best first.
        in_distribution: False if the picture probably shows none of the classes; None if the model cannot tell.
        in_distribution_score: what that was decided by; its scale and threshold are in `Client.model().metadata`.
        warnings: how the picture had to be changed to be read.
        heat_map: if it was asked for.
        model: which one answered.
        request_id: as in the server's log.
    """

    index: int
    filename: str | None
    label: str
    confidence: float
    top_k: tuple[ClassProbability, ...]
    in_distribution: bool | None
    in_distribution_score: float | None
    warnings: tuple[str, ...]
    heat_map: HeatMap | None
    model: ModelRef
    request_id: str

    @classmethod
    def from_wire(cls, answer: dict[str, Any], model: ModelRef, request_id: str, index: int, filename: str | None) -> Prediction:
        """Reads one entry of `predictions` (docs/api.md).

        Args:
            answer: the entry.
            model: of the whole answer, as `request_id`.
            request_id: of the whole answer.
            index: position among all images given, which the server does not know.
            filename: the same.

        Raises:
            KeyError: a field is missing.
        """
        heat_map = answer.get("heat_map")
        return cls(
            index=index,
            filename=filename,
            label=answer["label"],
            confidence=answer["confidence"],
            top_k=tuple(ClassProbability(entry["label"], entry["probability"]) for entry in answer["top_k"]),
            in_distribution=answer.get("in_distribution"),
            in_distribution_score=answer.get("in_distribution_score"),
            warnings=tuple(answer["warnings"]),
            heat_map=HeatMap(heat_map["label"], tuple(map(tuple, heat_map["values"]))) if heat_map else None,
            model=model,
            request_id=request_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class ClassificationError:
    """Stands in the place of an image that was not classified.

    Attributes:
        index: position among the images given, from 0.
        filename: the path, if a path was given.
        code: as in docs/api.md, or `unreadable` if the image could not even be sent.
        detail: one sentence.
        request_id: as in the server's log; None if nothing was sent.
    """

    index: int
    filename: str | None
    code: str
    detail: str
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Health:
    """What the probes say.

    Attributes:
        live: False: the process is worth nothing any more and should be restarted.
        ready: False: send requests elsewhere.
        reason: why not, or None.
    """

    live: bool
    ready: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """What is served, and how (`GET /model`).

    Attributes:
        name: of the model.
        version: of the model.
        sha256: of its artifact.
        classes: names, in the order of the logits.
        input_size: side in pixels of what the model takes.
        provider: where it computes: `cpu`, `cuda` or `openvino`.
        workers: inference threads.
        max_batch: largest batch.
        metadata: everything the artifact says of itself.
    """

    name: str
    version: str
    sha256: str
    classes: tuple[str, ...]
    input_size: int
    provider: str
    workers: int
    max_batch: int
    metadata: dict[str, Any]

    @classmethod
    def from_wire(cls, card: dict[str, Any]) -> Model:
        """Reads the answer of `/model`.

        Args:
            card: the JSON object.

        Raises:
            KeyError: a field is missing.
        """
        known = {name: card[name] for name in cls.__slots__}
        return cls(**(known | {"classes": tuple(card["classes"])}))


class ClientError(Exception):
    """Base of all failures below."""


class Unreachable(ClientError):
    """No connection, or no answer within the deadline."""


class ClientClosed(ClientError):
    """This client was closed, or was made before a fork: no service was asked, and trying again is of no use."""


class RequestFailed(ClientError):
    """The server answered that it failed (RFC 9457).

    Attributes:
        status: of HTTP.
        code: as in docs/api.md; from a proxy without such a document the status in words.
        detail: one sentence.
        request_id: as in the server's log, if it sent one.
        retry_after_s: seconds after which trying again makes sense, if it said so.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, request_id: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, code, detail)  # as pickle gives them back, e.g. out of a process of a pool
        self.status, self.code, self.detail = status, code, detail
        self.request_id, self.retry_after_s = request_id, retry_after_s

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class ImageRejected(RequestFailed):
    """The image is damaged, too large, or of a type that is not read."""


class Unauthorized(RequestFailed):
    """The service asks for a key, and this one is none of its own (401)."""


class Overloaded(RequestFailed):
    """Too busy, or shutting down, until the deadline (429, 503)."""


class DeadlineExceeded(RequestFailed):
    """Accepted, but its turn did not come before the deadline (504)."""
