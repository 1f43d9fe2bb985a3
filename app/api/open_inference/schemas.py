"""The JSON of the Open Inference Protocol v2, for validation and for /docs.

Sources: `specification/protocol/inference_rest.md` of kserve/open-inference-protocol, and the binary data, classification,
statistics, schedule policy and model configuration extensions in `docs/protocol` of triton-inference-server/server.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs this on Python 3.11
)

from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, model_validator
from typing_extensions import TypedDict

TensorData = Annotated[
    Any, Field(json_schema_extra={"type": "array"}, description="Row by row, flat or nested. BYTES: base64 strings.")
]


class _Wire(BaseModel):
    """What a client sends: no conversions; keys that are not ours are let through, as the protocol asks; null is absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, sent: Any) -> Any:
        """As serializers of typed languages write a field that nobody has set."""
        if isinstance(sent, dict) and None in sent.values():
            return {key: value for key, value in sent.items() if value is not None}
        return sent


class InputParameters(_Wire):
    """Of one input tensor."""

    binary_data_size: int | None = Field(None, ge=0, description="Bytes of this tensor after the JSON, instead of `data`.")


class RequestInput(_Wire):
    """One input tensor."""

    name: str = Field(description="`images`, or `encoded_images`.")
    datatype: str = Field(description="UINT8 for `images`, BYTES for `encoded_images`.")
    shape: Annotated[list[Annotated[int, Field(ge=0)]], FailFast(), Field(max_length=8)] = Field(
        description="`images`: [N, S, S, 3], RGB, S as in the model's metadata; `encoded_images`: [N] or [N, 1]."
    )
    parameters: InputParameters = InputParameters()
    data: TensorData = None


class OutputParameters(_Wire):
    """Of one output tensor."""

    binary_data: bool | None = Field(None, description="After the JSON and not in it; unset: as `binary_data_output` says.")
    classification: int = Field(0, ge=0, description='The n best classes as BYTES "value:index:label" in place of all values.')


_MOST_TENSORS = 16
"""More than there are, so that a request with a tensor too many is told which."""


class RequestedOutput(_Wire):
    """One output tensor."""

    name: str = Field(description="`logits`, `probabilities`, or `class_maps`, which are returned only if named.")
    parameters: OutputParameters = OutputParameters()


class RequestParameters(_Wire):
    """Of the whole request."""

    binary_data_output: bool = Field(False, description="Outputs come after the JSON unless they say otherwise themselves.")
    timeout: int = Field(
        0, ge=0, le=3_600_000_000, description="Time this request may take, in microseconds; 0: X-Deadline-Ms or the default."
    )


class InferenceRequest(_Wire):
    """Body of an inference request; tensors may follow it as bytes."""

    id: str | None = Field(None, max_length=1024, description="Returned in the answer.")
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[RequestInput], FailFast()] = Field(max_length=_MOST_TENSORS, description="One tensor.")
    outputs: Annotated[list[RequestedOutput], FailFast()] = Field(
        [], max_length=_MOST_TENSORS, description="None: logits and probabilities."
    )


class ResponseOutput(TypedDict):
    """One output tensor."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[Annotated[dict[str, int], Field(description="`binary_data_size`, if its bytes follow the JSON.")]]
    data: NotRequired[Annotated[list[float] | list[str], Field(description="Row by row, flat.")]]


class InferenceResponse(TypedDict):
    """Answer to an inference request."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[ResponseOutput]


class InferenceError(TypedDict):
    """Every answer under /v2 that is not 200."""

    error: str


class ServerLive(TypedDict):
    """Answer of `/v2/health/live`."""

    live: bool


class ServerReady(TypedDict):
    """Answer of `/v2/health/ready`."""

    ready: bool


class ModelReady(TypedDict):
    """Whether the model answers."""

    name: str
    ready: bool


class ServerMetadata(TypedDict):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """One tensor; -1 is a size the client chooses."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """The tensors a model needs and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class DurationStatistics(TypedDict):
    """How often, and for how long in all."""

    count: int
    ns: int


class InferStatistics(TypedDict):
    """By request; of several images the one that waited longest counts."""

    success: DurationStatistics
    fail: DurationStatistics
    queue: DurationStatistics
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics
    cache_hit: DurationStatistics
    cache_miss: DurationStatistics


class BatchStatistics(TypedDict):
    """By size of the batches that ran."""

    batch_size: int
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics


class ModelStatistics(TypedDict):
    """Of this model, since the start, counting the requests of this protocol."""

    name: str
    version: str
    last_inference: Annotated[int, Field(description="Milliseconds since 1970.")]
    inference_count: Annotated[int, Field(description="Images in answered requests.")]
    execution_count: Annotated[int, Field(description="Batches.")]
    inference_stats: InferStatistics
    batch_stats: list[BatchStatistics]


class StatisticsAnswer(TypedDict):
    """One entry a model: one."""

    model_stats: list[ModelStatistics]


# not as models: FastAPI would build a validator for each status of each route, at every start
_ERROR_SCHEMA = TypeAdapter(InferenceError).json_schema()
FAILURES: dict[int | str, dict[str, Any]] = {
    int(status): {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, text in {
        HTTPStatus.BAD_REQUEST: "No valid request, or not what the model takes.",
        HTTPStatus.UNAUTHORIZED: "Keys are set, and none of them was sent.",
        HTTPStatus.NOT_FOUND: "No such model or version.",
        HTTPStatus.REQUEST_TIMEOUT: "The body did not arrive in time.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Too many bytes, pixels or images.",
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "Not a type of image, or a Content-Encoding, that is read here.",
        HTTPStatus.UNPROCESSABLE_ENTITY: "An image cannot be decoded, or a header is out of range.",
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "More or longer headers than are taken.",
        HTTPStatus.INTERNAL_SERVER_ERROR: "A defect of the service or the model.",
        HTTPStatus.SERVICE_UNAVAILABLE: "Overloaded, shutting down or dead; see Retry-After.",
        HTTPStatus.GATEWAY_TIMEOUT: "The deadline passed.",
    }.items()
}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: FAILURES[503]}
UNKNOWN: dict[int | str, dict[str, Any]] = {status: FAILURES[status] for status in (401, 404)}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema without references: what stands in `openapi_extra` cannot have components of its own; null is absent."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        inlined = {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}
        if schema.get("type") == "object" and "properties" in schema:
            for name, value in inlined["properties"].items():
                if name not in schema.get("required", ()) and "anyOf" not in value:
                    told = {key: value[key] for key in ("description", "default") if key in value}
                    inlined["properties"][name] = {"anyOf": [value, {"type": "null"}], **told}
        return inlined
    return [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema


_REQUEST_SCHEMA = InferenceRequest.model_json_schema()
INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": InferenceResponse,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "description": "JSON; or JSON of the length in Inference-Header-Content-Length, followed by tensors as bytes.",
        "headers": {
            "Inference-Header-Content-Length": {
                "description": "Bytes of the JSON, if tensors follow it.",
                "schema": {"type": "integer", "minimum": 0},
            }
        },
    },
    **FAILURES,
}

INFER_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _inlined(_REQUEST_SCHEMA, _REQUEST_SCHEMA["$defs"])},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of the JSON, if tensors follow it; 0: the body is the pixels of one image.",
            "schema": {"type": "integer", "minimum": 0},
        },
    ],
}
