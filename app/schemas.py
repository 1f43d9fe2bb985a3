"""What goes over the wire: requests and answers of `/classify`, `/model` and the probes.

The answer to `/classify` is made of typed dictionaries: the same schema in /docs as models would give, and nothing to
build or validate for each request.
"""

from __future__ import annotations

from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs these on Python 3.11
)

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from app.errors import ServiceError

Probability = Annotated[float, Field(ge=0, le=1)]


class ClassifyJson(BaseModel):
    """JSON body of `/classify`."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(
        min_length=1, description="Whole image files, base64 (RFC 4648, standard alphabet), also as data URLs."
    )


class ModelRef(TypedDict):
    """Which model answered."""

    name: str
    version: str


class ClassProbability(TypedDict):
    """One class with its calibrated probability."""

    label: str
    probability: Probability


class HeatMap(TypedDict):
    """Where in the picture the evidence for `label` lies.

    The head applied to every position before pooling: the mean of the raw maps plus the bias is the logit. Scaled so
    that 0 is the weakest and 1 the strongest position.
    """

    label: str
    values: Annotated[list[list[Probability]], Field(description="Rows from top to bottom, columns from left to right.")]
    png: Annotated[str, Field(description="The same as a grey PNG of that size, base64; white is 1.")]


class ItemError(TypedDict):
    """Why this image of a request of several was not classified."""

    code: str
    detail: str


class Prediction(TypedDict):
    """The answer for one image. Either `error` is there, or everything else."""

    index: Annotated[int, Field(description="Position in the request, from 0.")]
    filename: NotRequired[Annotated[str, Field(description="As sent in multipart/form-data.")]]
    label: NotRequired[str]
    confidence: NotRequired[Annotated[Probability, Field(description="Probability of `label`.")]]
    in_distribution: NotRequired[
        Annotated[
            bool, Field(description="False: the picture probably shows none of the classes. Absent: the model cannot tell.")
        ]
    ]
    in_distribution_score: NotRequired[
        Annotated[
            float,
            Field(description="Below the threshold of the model's `out_of_distribution` rule (`/model`) the flag is false."),
        ]
    ]
    top_k: NotRequired[list[ClassProbability]]
    warnings: NotRequired[list[str]]
    heat_map: NotRequired[HeatMap]
    error: NotRequired[ItemError]


def item_error(index: int, filename: str | None, error: ServiceError) -> Prediction:
    """What stands in the place of an image that was not classified."""
    prediction: Prediction = {"index": index, "error": {"code": error.code, "detail": error.detail}}
    if filename is not None:
        prediction["filename"] = filename
    return prediction


class ClassifyAnswer(TypedDict):
    """Predictions in the order sent."""

    model: ModelRef
    predictions: list[Prediction]
    request_id: str


class Problem(BaseModel):
    """RFC 9457 problem document, `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    predictions: list[Prediction] | None = Field(None, description="Each image's reason, when several were sent and all failed.")


class ProbeAnswer(BaseModel):
    """Answer of `/livez` and `/readyz`."""

    status: str
    reason: str | None = None


class ModelCard(BaseModel):
    """What is served, and how: the artifact's own metadata and the engine's choices."""

    name: str
    version: str
    sha256: str
    classes: list[str]
    input_size: int
    metadata: dict[str, Any] = Field(description="Everything the artifact says of itself.")
    provider: str
    workers: int
    max_batch: int
    warm_up_ms: float
    batch_ms: dict[int, float] = Field(description="Measured at start: a batch by its size, every worker having one, in ms.")
    images_per_second: dict[int, float] = Field(
        description="Images a second by number of workers, measured at start where there is a choice."
    )
