"""What goes over the wire: requests and answers of `/classify`, `/model` and the probes, with the examples of /docs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]


class ClassifyJson(BaseModel):
    """JSON body of `/classify`."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(min_length=1, description="Whole image files, base64 (RFC 4648, standard alphabet).")


class ModelRef(BaseModel):
    """Which model answered."""

    name: str
    version: str


class ClassProbability(BaseModel):
    """One class with its calibrated probability."""

    label: str
    probability: Probability


class HeatMap(BaseModel):
    """Where in the picture the evidence for `label` lies.

    The head applied to every position before pooling: the mean of the raw maps plus the bias is the logit. Scaled so
    that 0 is the weakest and 1 the strongest position.
    """

    label: str
    values: list[list[Probability]] = Field(description="Rows from top to bottom, columns from left to right.")


class ItemError(BaseModel):
    """Why this image of a request of several was not classified."""

    code: str
    detail: str


class Prediction(BaseModel):
    """The answer for one image. Either `error` is there, or everything else."""

    index: int = Field(description="Position in the request, from 0.")
    filename: str | None = Field(None, description="As sent in multipart/form-data.")
    label: str | None = None
    confidence: Probability | None = Field(None, description="Probability of `label`.")
    in_distribution: bool | None = Field(None, description="False: the picture probably shows none of the classes.")
    in_distribution_score: float | None = Field(
        None, description="Below the threshold of the model's `out_of_distribution` rule (`/model`), `in_distribution` is false."
    )
    top_k: list[ClassProbability] | None = None
    warnings: list[str] | None = None
    heat_map: HeatMap | None = None
    error: ItemError | None = None


class ClassifyAnswer(BaseModel):
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
    batch_ms: dict[int, float] = Field(description="Measured at start: a batch on one worker by its size, in milliseconds.")
    images_per_second: dict[int, float] = Field(description="Measured at start: images a second by number of workers.")
