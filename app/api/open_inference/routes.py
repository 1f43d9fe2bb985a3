"""`/v2`: the Open Inference Protocol over HTTP, on the same engine and within the same limits as `/classify`.

Of Triton's extensions: binary tensor data, classification, model configuration, schedule policy (`timeout`; there is one
priority), statistics. Models are not loaded or unloaded here: what is served is decided where the service is started.

A model's metadata names the tensors it requires, and clients that make up their requests from it (perf_analyzer) send every
one of them. So `encoded_images`, which stands in the place of `images`, and `class_maps`, which cost extra, are told of in
the configuration's parameters and in /docs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from app import __version__
from app.api.codings import coding_of, compress, decompress
from app.api.inference import LONG_ANSWER, SHORT_JSON, CountedResponse, DeadlineHeader, infer, read_body
from app.api.open_inference import tensors
from app.api.open_inference.schemas import (
    FAILURES,
    INFER_RESPONSES,
    INFER_SCHEMA,
    UNAVAILABLE,
    UNKNOWN,
    BatchStatistics,
    DurationStatistics,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
    StatisticsAnswer,
)
from app.api.open_inference.statistics import Duration
from app.api.problems import problem_response
from app.deadline import deadline_ms, time_left_s
from app.engine.artifact import ArtifactMetadata
from app.engine.outcome import Outcome
from app.errors import MalformedRequest, NotServing, ServiceError, UnknownModel
from app.schemas import Prediction
from app.service import Service
from app.telemetry.exchange import Exchange
from app.verdict import judge

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "schedule_policy", "statistics"]

_HEADER_LENGTH = "inference-header-content-length"


def _service(request: Request) -> Service:
    """The running service, if the model and the version in the path are the ones it serves.

    Raises:
        UnknownModel: they are not.
    """
    service: Service = request.state.service
    name, version = service.metadata.name, service.metadata.version
    asked = request.path_params
    if asked.get("model", name) != name:
        raise UnknownModel(f"no model {asked['model'][:100]!r} here; {name!r} is served")
    if asked.get("version", version) != version:
        raise UnknownModel(f"no version {asked['version'][:100]!r} of {name!r} here; {version!r} is served")
    return service


router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])


async def infer_tensors(request: Request, x_deadline_ms: DeadlineHeader = None) -> Response:
    """Pixels of the model's input size (`images`), or whole image files (`encoded_images`), as JSON or as bytes after it.

    If one image of a request fails, the request does: a tensor has no place for an error.
    """
    service = _service(request)
    exchange: Exchange = request.state.exchange
    try:
        return await _infer(service, request, x_deadline_ms, exchange)
    except Exception:
        service.statistics.record_failure(time.monotonic() - exchange.begin)
        raise


async def _infer(service: Service, request: Request, asked_ms: int | None, exchange: Exchange) -> Response:
    settings, metadata = service.settings, service.metadata
    body = await read_body(request)
    encoding = coding_of(request.headers)
    with service.bodies.loan() as take:
        if encoding:
            zeros = 2 * settings.max_images * metadata.input_size**2 * 3  # as JSON; what benchmarks send
            body = await decompress(body, encoding, settings.max_body_bytes, take, zeros)
        header_length = _header_length(request.headers, len(body))
        parse = functools.partial(tensors.parse_call, side=metadata.input_size, max_images=settings.max_images)
        json_bytes = len(body) if header_length is None else header_length
        if json_bytes < SHORT_JSON:
            call = parse(body, header_length)
        else:
            async with service.long_json:
                time_left_s(settings.max_deadline_ms / 1000, exchange.begin)  # waiting may have taken long
                call = await run_in_threadpool(parse, body, header_length)
        default_s = deadline_ms(asked_ms, settings) / 1000
        deadline_s = min(call.timeout_s, settings.max_deadline_ms / 1000) if call.timeout_s else default_s
        results = await infer(request, call.images, explain=call.explain, deadline_s=deadline_s, begin=exchange.begin)
    exchange.timings = [result.timing for result in results if isinstance(result, Outcome | ServiceError) and result.timing]
    outcomes = [_outcome(call, index, result) for index, result in enumerate(results)]
    output_begin = time.monotonic()
    accepted = ",".join(request.headers.getlist("accept-encoding"))
    # megabytes of numbers, written and compressed in the loop, would hold up everybody
    write = functools.partial(_write, call, outcomes, metadata, accepted)
    is_long = call.explain or len(outcomes) * len(metadata.classes) > LONG_ANSWER
    answer, coding, length, predictions = await run_in_threadpool(write) if is_long else write()
    headers = {} if length is None else {_HEADER_LENGTH: str(length)}
    if coding:
        headers["Content-Encoding"] = coding
    end = time.monotonic()

    def told(accepted: bool) -> None:
        if accepted:
            service.statistics.record_success(outcomes, seconds=end - exchange.begin, output_s=end - output_begin)
            service.metrics.observe_answer(end - exchange.begin, predictions)
        else:
            service.statistics.record_failure(end - exchange.begin)

    media_type = "application/json" if length is None else "application/octet-stream"
    return CountedResponse(service, answer, told, headers=headers, media_type=media_type)


def _write(
    call: tensors.InferenceCall, outcomes: list[Outcome], metadata: ArtifactMetadata, accepted: str
) -> tuple[bytes, str | None, int | None, list[Prediction]]:
    """The answer, its content coding, the length of the JSON at its beginning if tensors follow it as bytes, what it says."""
    answer, length = tensors.build_answer(call, outcomes, metadata)
    answer, coding = compress(answer, accepted)
    plain = [replace(outcome, class_maps=None) for outcome in outcomes]  # a heat map would be drawn, for nobody
    predictions = [judge(outcome, metadata, index=i, filename=None, top_k=1) for i, outcome in enumerate(plain)]
    return answer, coding, length, predictions


@router.get("", summary="What this server is")
@router.get("/", include_in_schema=False)
async def server_metadata() -> ServerMetadata:
    """Name, version and the protocol's extensions that are spoken here."""
    return {"name": "convmixer-serve", "version": __version__, "extensions": EXTENSIONS}


@router.get("/health/live", response_model=ServerLive, responses=UNAVAILABLE, summary="Is the process worth keeping?")
async def server_live(request: Request) -> Response | ServerLive:
    """As `/livez`."""
    return _unless(_service(request).scheduler.failure(), request) or {"live": True}


@router.get("/health/ready", response_model=ServerReady, responses=UNAVAILABLE, summary="Should requests be sent here?")
async def server_ready(request: Request) -> Response | ServerReady:
    """As `/readyz`."""
    return _unless(_service(request).not_ready(), request) or {"ready": True}


async def model_ready(request: Request) -> Response | ModelReady:
    """As `/readyz`, for the one model there is."""
    service = _service(request)
    return _unless(service.not_ready(), request) or {"name": service.metadata.name, "ready": True}


async def model_metadata(request: Request) -> ModelMetadata:
    """Names, types and shapes; -1 is the number of images."""
    metadata = _service(request).metadata
    side, classes = metadata.input_size, len(metadata.classes)
    return {
        "name": metadata.name,
        "versions": [metadata.version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": tensors.PIXELS, "datatype": "UINT8", "shape": [-1, side, side, 3]}],
        "outputs": [
            {"name": name, "datatype": "FP32", "shape": [-1, classes]} for name in (tensors.LOGITS, tensors.PROBABILITIES)
        ],
    }


async def model_config(request: Request) -> dict[str, Any]:
    """The fields of Triton's `ModelConfig` (model_config.proto) that mean something here."""
    service = _service(request)
    metadata, scheduler, settings = service.metadata, service.scheduler, service.settings
    side, classes = metadata.input_size, len(metadata.classes)
    return {
        "name": metadata.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": settings.max_images,
        "input": [{"name": tensors.PIXELS, "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [side, side, 3]}],
        "output": [
            {"name": name, "data_type": "TYPE_FP32", "dims": [classes]} for name in (tensors.LOGITS, tensors.PROBABILITIES)
        ],
        "instance_group": [
            {"name": metadata.name, "kind": f"KIND_{_KINDS[service.session.provider]}", "count": scheduler.workers},
        ],
        "dynamic_batching": {
            "preferred_batch_size": [scheduler.max_batch],
            "max_queue_delay_microseconds": 0,
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": settings.deadline_ms * 1000,
                "allow_timeout_override": True,
                "max_queue_size": scheduler.admission.max_queue,
            },
        },
        "parameters": {
            tensors.ENCODED: {"string_value": f"input BYTES [N] or [N, 1] in place of `{tensors.PIXELS}`: whole image files"},
            tensors.CLASS_MAPS: {"string_value": f"output FP32 [N, {classes}, h, w], only if named: evidence by position"},
        },
    }


_KINDS = {"cpu": "CPU", "cuda": "GPU", "openvino": "CPU"}


@router.get("/models/stats", responses={401: FAILURES[401]}, summary="Counters of every model: of the one")
async def model_statistics(request: Request) -> StatisticsAnswer:
    """Of this protocol's requests since the start. Nothing is cached here, so the cache's counters stay 0."""
    service = _service(request)
    statistics = service.statistics
    never = Duration()
    batches: list[BatchStatistics] = [
        {
            "batch_size": size,
            "compute_input": _nanoseconds(Duration(statistics.executions(size), batch.input_s)),
            "compute_infer": _nanoseconds(Duration(statistics.executions(size), batch.infer_s)),
            "compute_output": _nanoseconds(Duration(statistics.executions(size))),  # logits are taken as they come
        }
        for size, batch in sorted(statistics.batches.items())
    ]
    return {
        "model_stats": [
            {
                "name": service.metadata.name,
                "version": service.metadata.version,
                "last_inference": statistics.last_inference_ms,
                "inference_count": statistics.images,
                "execution_count": sum(map(statistics.executions, statistics.batches)),
                "inference_stats": {
                    "success": _nanoseconds(statistics.success),
                    "fail": _nanoseconds(statistics.fail),
                    "queue": _nanoseconds(statistics.queue),
                    "compute_input": _nanoseconds(statistics.compute_input),
                    "compute_infer": _nanoseconds(statistics.compute_infer),
                    "compute_output": _nanoseconds(statistics.compute_output),
                    "cache_hit": _nanoseconds(never),
                    "cache_miss": _nanoseconds(never),
                },
                "batch_stats": batches,
            }
        ]
    }


def _outcome(call: tensors.InferenceCall, index: int, result: Outcome | BaseException) -> Outcome:
    if isinstance(result, Outcome):
        return result
    if isinstance(result, ServiceError) and result.per_item:
        raise type(result)(f"{call.input_name}[{index}]: {result.detail}") from result
    raise result


def _header_length(headers: Headers, body_length: int) -> int | None:
    text = headers.get(_HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or not text.isascii() or len(text) > 18 or int(text) > body_length:
        raise MalformedRequest(
            f"Inference-Header-Content-Length is {text[:100]!r}, but the body has {body_length:,} bytes; "
            "it must be the length of the JSON in bytes"
        )
    return int(text)


def _unless(reason: str | None, request: Request) -> Response | None:
    """A probe's no, if there is a reason for one; it is no refused request, and not counted as one."""
    return problem_response("/v2", NotServing(reason, retry_after_s=1), request.state.request_id) if reason else None


def _nanoseconds(duration: Duration) -> DurationStatistics:
    return {"count": duration.count, "ns": round(duration.seconds * 1e9)}


def _add_model_routes(prefix: str, in_path: Sequence[str]) -> None:
    """What there is of a model; with and without its version in the path.

    `_service` reads the path: as parameters of the functions its parts would cost more than everything else done there.
    """
    path = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path]
    infer_schema = {**INFER_SCHEMA, "parameters": [*path, *INFER_SCHEMA["parameters"]]}
    router.add_api_route(
        f"{prefix}/infer",
        infer_tensors,
        methods=["POST"],
        summary="Classify images sent as tensors",
        response_class=Response,
        responses=INFER_RESPONSES,
        openapi_extra=infer_schema,
    )
    for name, endpoint, answer, summary in (
        ("", model_metadata, ModelMetadata, "The model's tensors"),
        ("/ready", model_ready, ModelReady, "Does the model answer?"),
        ("/config", model_config, dict[str, Any], "The model's configuration"),
        ("/stats", model_statistics, StatisticsAnswer, "Counters of the model"),
    ):
        router.add_api_route(
            prefix + name,
            endpoint,
            response_model=answer,
            summary=summary,
            responses=UNKNOWN | (UNAVAILABLE if name == "/ready" else {}),
            openapi_extra={"parameters": path},
        )


_add_model_routes("/models/{model}", ["model"])
_add_model_routes("/models/{model}/versions/{version}", ["model", "version"])
