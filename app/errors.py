"""One class per failure a client can see: HTTP status, machine-readable code, and when it is raised.

Everything that goes wrong with a request is one of these. `api.problems` turns them into RFC 9457 problem documents; in
a request of several images those with `per_item = True` stand in the place of the image they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from app.engine.outcome import Timing

PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""What RFC 9110 calls them; Python before 3.13 has the names of earlier RFCs."""

CLIENT_LEFT = 499
"""No status of HTTP, but nginx's for a client that closed its connection before the answer."""


class ServiceError(Exception):
    """Base of all failures below.

    Args:
        detail: one sentence: what is wrong, which limit or value, what to do. Shown to the client.
        retry_after_s: seconds after which trying again makes sense; becomes `Retry-After`.
        reason: which of `reasons` it was; None is the first of them.
        headers: what the answer says in headers, besides `Retry-After`.

    Attributes:
        timing: of the image that failed, as far as it came; None if it never was in the queue.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    code: ClassVar[str] = "internal_error"
    per_item: ClassVar[bool] = False
    reasons: ClassVar[tuple[str, ...]] = ()
    """Why a request was refused before any work on it: labels of the metric `convmixer_refused_total`."""

    timing: Timing | None = None

    def __init__(
        self,
        detail: str,
        *,
        retry_after_s: int | None = None,
        reason: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
        self.retry_after_s = retry_after_s
        self.reason = reason or next(iter(self.reasons), None)

    def forget_origin(self) -> None:
        """Lets go of the frames it came through, which hold pictures and bodies for as long as somebody remembers the failure."""
        self.__traceback__ = self.__cause__ = self.__context__ = None


class MalformedRequest(ServiceError):
    """The request cannot be read: no valid HTTP, JSON, form or tensors, or no image in it."""

    status = HTTPStatus.BAD_REQUEST
    code = "malformed_request"


class BodyTooLarge(ServiceError):
    """More body bytes than `CONVMIXER_MAX_BODY_BYTES`."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "body_too_large"


class TooManyImages(ServiceError):
    """More images in one request than `CONVMIXER_MAX_IMAGES`."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_many_images"


class ImageTooLarge(ServiceError):
    """More pixels than `CONVMIXER_MAX_PIXELS` or a side longer than `CONVMIXER_MAX_SIDE`; found before decoding."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "image_too_large"
    per_item = True


class UnsupportedMediaType(ServiceError):
    """The request's Content-Type, or its Content-Encoding, is none that is read here."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_media_type"


class UnsupportedImage(ServiceError):
    """The bytes are no PNG, JPEG, WebP, GIF or BMP."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    code = "unsupported_image"
    per_item = True


class UndecodableImage(ServiceError):
    """The bytes begin as an image but cannot be decoded: truncated, corrupt, or hostile."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "undecodable_image"
    per_item = True


class InvalidParameter(ServiceError):
    """A query parameter or header has a value outside its range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_parameter"


class UnknownModel(ServiceError):
    """The Open Inference Protocol's path names another model or version than the one that is served."""

    status = HTTPStatus.NOT_FOUND
    code = "unknown_model"


class Unauthorized(ServiceError):
    """API keys are set and the request has none of them."""

    status = HTTPStatus.UNAUTHORIZED
    code = "unauthorized"


class HeadersTooLarge(ServiceError):
    """More or longer headers than the server takes."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    code = "headers_too_large"


class ReceiveTimeout(ServiceError):
    """The request did not arrive within `CONVMIXER_RECEIVE_TIMEOUT_S`."""

    status = HTTPStatus.REQUEST_TIMEOUT
    code = "receive_timeout"


class Overloaded(ServiceError):
    """No room (queue, held bytes, connections), or the predicted wait passes half of the deadline. Always has `retry_after_s`."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "overloaded"
    reasons = ("queue_full", "would_be_late", "held_bytes", "connections")


class NotServing(ServiceError):
    """The service is draining, or its engine is dead."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "not_serving"
    reasons = ("draining",)


class DeadlineExceeded(ServiceError):
    """The deadline (`X-Deadline-Ms` or `CONVMIXER_DEADLINE_MS`) passed before the image's turn, or while the request arrived."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    code = "deadline_exceeded"
    per_item = True


class InferenceFailed(ServiceError):
    """onnxruntime failed on this image, or the engine has failed; a defect of the service or the model, never of the client."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    code = "inference_failed"
    per_item = True


class StartupError(Exception):
    """The service must not start: a setting, the artifact or the provider is wrong. The message says which and why."""
