"""`POST /classify`: images in, calibrated predictions out.

Three kinds of body: one image raw, `multipart/form-data` with one or many files, JSON with base64 strings. Content-Type
chooses between these three; what kind of image it is, the bytes say.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api import encoded
from app.api.codings import coding_of
from app.api.inference import LONG_ANSWER, SHORT_JSON, CountedResponse, DeadlineHeader, infer, read_body
from app.api.problems import problem_response
from app.deadline import deadline_ms
from app.engine.outcome import Outcome, Timing
from app.errors import MalformedRequest, ServiceError, TooManyImages, UndecodableImage, UnsupportedMediaType
from app.schemas import ClassifyAnswer, ClassifyJson, Prediction, Problem, item_error
from app.service import Service
from app.telemetry.exchange import Exchange
from app.verdict import answer_body, judge

router = APIRouter()

_OTHER_MARKS = 100
"""Commas and brackets that a JSON body may have besides two an image (a data URL has one)."""

_JSON_CONTAINER = re.compile(rb"[ \t\r\n]*[\[{]")
_SHOWN = 100
"""Characters of a client's own key that an error repeats."""

_CHARSETS = {b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1", b"latin-1"}
_NAMED = re.compile(rb";[ \t]*filename\*?[ \t]*=", re.IGNORECASE)
_PADDED = re.compile(rb"\r\n[^:\r\n]*:  ")
_LONGEST_PART_HEAD = 64 * 1024
"""The parser gives up before: at eight headers of 4 KiB."""
_MOST_TEXT = 1024
"""Bytes of a part that is no file, which is none that is read here."""
_NO_FILE = "every part of the form must be a file: it has a filename, or the Content-Type of an image (curl: -F images=@cat.png)"

_ANY_BYTES = ("application/octet-stream", "binary/octet-stream")
RAW_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "application/octet-stream")


@dataclass(frozen=True)
class Parameters:
    """A request's parameters.

    Attributes:
        top_k: classes listed for each image.
        explain: whether to add heat maps.
        deadline_ms: time the request may take.
    """

    top_k: int
    explain: bool
    deadline_ms: int


@dataclass(frozen=True)
class Upload:
    """One image as it was sent; `error` if not even its bytes could be had."""

    data: bytes
    filename: str | None = None
    error: ServiceError | None = None


_EXAMPLE_ANSWER = {
    "model": {"name": "fast", "version": "1.11.0"},
    "predictions": [
        {
            "index": 0,
            "label": "cat",
            "confidence": 0.9998,
            "in_distribution": True,
            "in_distribution_score": 0.2388,
            "top_k": [{"label": "cat", "probability": 0.9998}, {"label": "dog", "probability": 0.00005}],
            "warnings": [],
        }
    ],
    "request_id": "0f8c1d6d8a5b4f0f9d0f6a1f1f0a9a3e",
}

_BODY_SCHEMA: dict[str, Any] = {
    "required": True,
    "content": {
        **{media_type: {"schema": {"type": "string", "format": "binary", "minLength": 1}} for media_type in RAW_TYPES},
        "multipart/form-data": {
            "schema": {
                "title": "ClassifyForm",
                "type": "object",
                "properties": {"images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}},
                "required": ["images"],
                "additionalProperties": False,
            }
        },
        "application/json": {"schema": ClassifyJson.model_json_schema()},
    },
}

# FastAPI would call it application/json; the models it refers to are components of the document through ClassifyAnswer
_PROBLEM_SCHEMA = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
del _PROBLEM_SCHEMA["$defs"]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    int(status): {"description": text, "content": {"application/problem+json": {"schema": _PROBLEM_SCHEMA}}}
    for status, text in {
        HTTPStatus.BAD_REQUEST: "The request cannot be read.",
        HTTPStatus.UNAUTHORIZED: "Keys are set, and none of them was sent.",
        HTTPStatus.REQUEST_TIMEOUT: "The body did not arrive in time.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "Too many bytes, pixels or images.",
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "Not a type of body or image that is read here.",
        HTTPStatus.UNPROCESSABLE_ENTITY: "The image cannot be decoded, or a parameter is out of range.",
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "More or longer headers than are taken.",
        HTTPStatus.INTERNAL_SERVER_ERROR: "A defect of the service or the model.",
        HTTPStatus.SERVICE_UNAVAILABLE: "Overloaded or shutting down; see Retry-After.",
        HTTPStatus.GATEWAY_TIMEOUT: "The deadline passed.",
    }.items()
}


@router.post(
    "/classify",
    summary="Classify one or many images",
    responses={200: {"model": ClassifyAnswer, "content": {"application/json": {"example": _EXAMPLE_ANSWER}}}, **_PROBLEMS},
    openapi_extra={"requestBody": _BODY_SCHEMA},
    response_class=Response,
)
async def classify(
    request: Request,
    top_k: Annotated[int, Query(ge=1, le=1000, description="Classes listed for each image, at most all.")] = 5,
    explain: Annotated[bool, Query(description="Add a heat map of the evidence for the predicted class.")] = False,
    x_deadline_ms: DeadlineHeader = None,
) -> Response:
    """Send one image as the raw body, one or many as `multipart/form-data`, or base64 strings as JSON.

    Predictions come in the order sent. In a request of several images a bad one has `error` in its place and the others
    are answered; if all are bad, the request fails.
    """
    service: Service = request.state.service
    uploads = await _read_uploads(request, service.settings.max_images)
    parameters = Parameters(top_k, explain, deadline_ms(x_deadline_ms, service.settings))
    good = [upload.data for upload in uploads if upload.error is None]
    exchange: Exchange = request.state.exchange
    results = await infer(request, good, explain=explain, deadline_s=parameters.deadline_ms / 1000, begin=exchange.begin)
    if explain or len(good) * len(service.metadata.classes) > LONG_ANSWER:  # it takes a while to write
        return await run_in_threadpool(_answer, service, uploads, results, parameters, exchange)
    return _answer(service, uploads, results, parameters, exchange)


def _answer(
    service: Service,
    uploads: list[Upload],
    results: list[Outcome | BaseException],
    parameters: Parameters,
    exchange: Exchange,
) -> Response:
    """Puts what the engine said of the good uploads among the errors of the others."""
    predictions: list[Prediction] = []
    answered = False
    timings: list[Timing] = []
    errors: list[ServiceError] = []
    done = iter(results)
    for index, upload in enumerate(uploads):
        result = upload.error or next(done)
        if isinstance(result, Outcome):
            answered = True
            timings.append(result.timing)
            predictions.append(judge(result, service.metadata, index=index, filename=upload.filename, top_k=parameters.top_k))
        elif isinstance(result, ServiceError) and (result.per_item or len(uploads) == 1):
            errors.append(result)
            service.metrics.count_failure(result.code, result.reason)
            if result.timing:
                timings.append(result.timing)
            predictions.append(item_error(index, upload.filename, result))
        else:
            raise result
    exchange.timings = timings
    if not answered:
        exchange.code, exchange.error = errors[0].code, errors[0]
        return _all_failed(service, errors, predictions, exchange.request_id)
    content = answer_body(service.metadata, predictions, exchange.request_id)

    def told(accepted: bool) -> None:
        if accepted:
            service.metrics.observe_answer(time.monotonic() - exchange.begin, predictions)

    return CountedResponse(service, content, told, media_type="application/json")


class _FormParser(MultiPartParser):
    """Starlette's, which passes over a last part that is cut off, and takes what has no filename for text.

    Attributes:
        ended: the last boundary has come.
    """

    ended = False

    def on_headers_finished(self) -> None:
        """A part's headers (python-multipart): with the type of an image it is a file, named or not (RFC 7578, 4.2)."""
        part = self._current_part
        disposition = part.content_disposition or b""
        kind = next((value for name, value in part.item_headers if name == b"content-type"), b"")
        nameless = _may_be_image(_media_type(kind.decode("latin-1"))) and not _NAMED.search(disposition)
        if nameless and disposition:
            part.content_disposition = disposition + b'; filename="nameless"'
        super().on_headers_finished()
        if nameless and part.file:
            part.file.filename = None

    def on_end(self) -> None:
        """The last boundary (python-multipart)."""
        self.ended = True


async def _read_uploads(request: Request, max_images: int) -> list[Upload]:
    if coding := coding_of(request.headers):
        raise UnsupportedMediaType(
            f"Content-Encoding {coding[:_SHOWN]!r} is not read here; send the body as it is",
            headers={"Accept-Encoding": "identity"},
        )
    media_type = _media_type(request.headers.get("content-type", ""))
    if media_type == "multipart/form-data":
        uploads = await _read_multipart(request, max_images)
    elif media_type == "application/json":
        body = await read_body(request)
        short = len(body) < SHORT_JSON
        uploads = _read_json(body, max_images) if short else await run_in_threadpool(_read_json, body, max_images)
    elif _may_be_image(media_type) or not media_type:
        uploads = [Upload(await read_body(request))]
        if not uploads[0].data:
            empty = "the body is empty; send an image"
            raise UndecodableImage(empty) if media_type else MalformedRequest(empty)
    else:
        hint = "; with curl: -H 'Content-Type: image/png'" if media_type == "application/x-www-form-urlencoded" else ""
        raise UnsupportedMediaType(
            f"Content-Type {media_type[:_SHOWN]!r} is not read here; send image/…, application/octet-stream, "
            f"multipart/form-data or application/json{hint}",
            headers={"Accept": "image/*, application/octet-stream, multipart/form-data, application/json"},
        )
    return uploads


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _may_be_image(media_type: str) -> bool:
    """Whether the bytes are to be looked at: they alone say what they are, under whatever name (image/jpg, image/x-png)."""
    return media_type.startswith("image/") or media_type in _ANY_BYTES


async def _read_multipart(request: Request, max_images: int) -> list[Upload]:
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:  # Python has some that take minutes
        raise MalformedRequest("the form's charset must be UTF-8, ASCII or Latin-1; leave it out")
    body = await read_body(request)
    if (boundary := options.get(b"boundary")) is not None:
        line = b"\r\n--" + boundary
        # Python looks at each of them, and at each byte of padding behind one, or behind the colon of a part's header
        if body.count(line) > max_images + _OTHER_MARKS:
            raise _too_many(max_images)
        if line + b" " in body or line + b"\t" in body:
            raise MalformedRequest("a boundary of the form is padded; send it without spaces behind it")
        if any(_PADDED.search(head) for head in _part_heads(body, line)):
            raise MalformedRequest("a header in the form is padded; send it with one space behind its colon")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _FormParser(request.headers, whole(), max_files=max_images, max_fields=max_images, max_part_size=_MOST_TEXT)
    parser.spool_max_size = len(body)  # what is in memory needs no file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise _too_many(max_images) from error
        if "Part exceeded" in error.message:
            raise MalformedRequest(_NO_FILE) from error
        raise MalformedRequest(f"the multipart body cannot be read: {error.message}") from error
    if not parser.ended:
        raise MalformedRequest("the form ends before its last boundary; send it whole")
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) < len(form.multi_items()):
        raise MalformedRequest(_NO_FILE)
    files = [file for file in files if file.size or file.filename != ""]  # as browsers send a field that nobody has filled in
    if not files:
        raise MalformedRequest("the form holds no file; send at least one image")
    return [Upload(await file.read(), file.filename) for file in files]


def _part_heads(body: bytes, line: bytes) -> Iterator[bytes]:
    """The headers of each part, or as much of them as the parser would read."""
    begin = body.find(line.lstrip())  # the first may have no line before it
    while begin >= 0:
        end = body.find(b"\r\n\r\n", begin, begin + _LONGEST_PART_HEAD)
        yield body[begin : end if end >= 0 else begin + _LONGEST_PART_HEAD]
        begin = body.find(line, begin + 1)


def _read_json(body: bytes, max_images: int) -> list[Upload]:
    # millions of items would be built before they could be counted; base64 has none of these bytes
    if _JSON_CONTAINER.match(body) and body.count(b",") + body.count(b"[") + body.count(b"{") > 2 * max_images + _OTHER_MARKS:
        raise _too_many(max_images)
    try:
        texts = ClassifyJson.model_validate_json(body).images
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in reason["loc"])[:_SHOWN] or "body"
        raise MalformedRequest(f'the JSON body must be {{"images": ["<base64>", …]}}; {where}: {reason["msg"]}') from error
    if len(texts) > max_images:
        raise _too_many(max_images)
    return [_from_base64(text) for text in texts]


def _too_many(max_images: int) -> TooManyImages:
    return TooManyImages(f"more than {max_images} images in one request (CONVMIXER_MAX_IMAGES); send several requests")


def _from_base64(text: str) -> Upload:
    try:
        return Upload(encoded.decode(text))
    except ValueError as error:
        return Upload(b"", error=UndecodableImage(f"the string is not base64 (RFC 4648) of an image file: {error}"))


def _all_failed(service: Service, errors: list[ServiceError], predictions: list[Prediction], request_id: str) -> Response:
    """A problem document with the status of the failure if there is one kind of it, else 422, and each image's reason."""
    if len(errors) == 1:
        return problem_response("/classify", errors[0], request_id)
    same = len({type(error) for error in errors}) == 1
    summary = errors[0] if same else UndecodableImage("")
    summary = type(summary)(f"all {len(errors)} images failed; `predictions` has each one's reason")
    problem = problem_response("/classify", summary, request_id, predictions)  # with the names of all files, it may be long
    return CountedResponse(service, bytes(problem.body), status_code=problem.status_code, headers=dict(problem.headers))
