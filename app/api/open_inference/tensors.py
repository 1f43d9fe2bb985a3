"""Tensors on the wire: a request's bytes → images, outcomes → an answer's bytes.

A body is JSON, or JSON of the length that `Inference-Header-Content-Length` says followed by tensors as little-endian bytes
without padding (Triton's binary tensor data extension). Everything a client says of a tensor is checked against what it sent
before anything of that size is made.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from app.api import encoded
from app.api.open_inference.schemas import (
    InferenceRequest,
    InferenceResponse,
    InputParameters,
    RequestedOutput,
    RequestInput,
    RequestParameters,
    ResponseOutput,
)
from app.engine.artifact import ArtifactMetadata
from app.engine.outcome import Outcome
from app.errors import MalformedRequest, TooManyImages
from app.images import DecodedImage
from app.verdict import softmax

PIXELS, ENCODED = "images", "encoded_images"
LOGITS, PROBABILITIES, CLASS_MAPS = "logits", "probabilities", "class_maps"

_MOST_OBJECTS = 100
"""In a request's JSON; with every output and parameter there are about ten."""

_OTHER_MARKS = 1000
"""Commas and brackets of a request's JSON that are not the tensor's."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class InferenceCall:
    """A request, checked.

    Attributes:
        id: of the client, for the answer.
        images: in order.
        input_name: the tensor they came in, to say which one is bad.
        outputs: at least one.
        binary: whether outputs come as bytes unless they say otherwise themselves.
        timeout_s: seconds the request may take; 0 if it says nothing of it.
    """

    id: str | None
    images: Sequence[bytes | DecodedImage]
    input_name: str
    outputs: Sequence[RequestedOutput]
    binary: bool
    timeout_s: float

    @property
    def explain(self) -> bool:
        """Whether class maps are wanted."""
        return any(output.name == CLASS_MAPS for output in self.outputs)


def parse_call(body: bytes, header_length: int | None, *, side: int, max_images: int) -> InferenceCall:
    """Reads a request.

    Args:
        body: decompressed.
        header_length: bytes of the JSON at its beginning; None: all of it; 0: no JSON, the body is the pixels of one image.
        side: S, the model's input size in pixels.
        max_images: in one request.

    Raises:
        MalformedRequest: no valid request, or not what this model takes.
        TooManyImages: over `max_images`.
    """
    if header_length == 0:
        pixels = RequestInput(
            name=PIXELS, datatype="UINT8", shape=[1, side, side, 3], parameters=InputParameters(binary_data_size=len(body))
        )
        request = InferenceRequest(inputs=[pixels], parameters=RequestParameters(binary_data_output=True))
        binary = memoryview(body)
    else:
        request = _parse_json(body if header_length is None else body[:header_length], side, max_images)
        binary = memoryview(body)[len(body) if header_length is None else header_length :]
    _check_outputs(request.outputs)
    if len(request.inputs) != 1:
        raise MalformedRequest(f"{len(request.inputs)} inputs; send one, `{PIXELS}` or `{ENCODED}`")
    tensor = request.inputs[0]
    if binary and tensor.parameters.binary_data_size is None:
        raise MalformedRequest(f"{len(binary):,} bytes follow the JSON, but `{tensor.name[:100]}` has no `binary_data_size`")
    images: Sequence[bytes | DecodedImage]
    if tensor.name == PIXELS:
        images = _read_pixels(tensor, binary, side, max_images)
    elif tensor.name == ENCODED:
        images = _read_encoded(tensor, binary, max_images)
    else:
        raise MalformedRequest(f"no input {tensor.name[:100]!r}; this model takes `{PIXELS}` or `{ENCODED}`")
    return InferenceCall(
        request.id,
        images,
        tensor.name,
        request.outputs or [RequestedOutput(name=LOGITS), RequestedOutput(name=PROBABILITIES)],
        request.parameters.binary_data_output,
        request.parameters.timeout / 1e6,
    )


def build_answer(call: InferenceCall, outcomes: Sequence[Outcome], metadata: ArtifactMetadata) -> tuple[bytes, int | None]:
    """The answer's body, and the length of the JSON at its beginning if tensors follow it as bytes.

    Args:
        call: the request.
        outcomes: one an image.
        metadata: name, classes, temperature.
    """
    outputs: list[ResponseOutput] = []
    binary: list[bytes] = []
    for wanted in call.outputs:
        values = _values(wanted.name, outcomes, metadata)
        count = wanted.parameters.classification
        labelled = _classify(values, count, metadata.classes) if count else None
        shape = list(values.shape) if labelled is None else [len(outcomes), len(labelled) // len(outcomes)]
        output: ResponseOutput = {"name": wanted.name, "datatype": "FP32" if labelled is None else "BYTES", "shape": shape}
        as_bytes = wanted.parameters.binary_data
        if call.binary if as_bytes is None else as_bytes:
            data = values.tobytes() if labelled is None else b"".join(map(_with_length, labelled))
            output["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            output["data"] = values.ravel().tolist() if labelled is None else labelled
        outputs.append(output)
    answer: InferenceResponse = {"model_name": metadata.name, "model_version": metadata.version, "outputs": outputs}
    if call.id is not None:
        answer["id"] = call.id
    header = to_json(answer)
    return (b"".join([header, *binary]), len(header)) if binary else (header, None)


def _parse_json(text: bytes, side: int, max_images: int) -> InferenceRequest:
    max_values, max_lists = max_images * side * side * 3, max_images * (1 + side + side * side)
    # an empty list weighs 56 bytes and is two on the wire, an object 184 and five, so what would be built is bounded before it is
    if text.count(b"{") > _MOST_OBJECTS:
        raise MalformedRequest(f"no valid inference request: it has more than {_MOST_OBJECTS} objects")
    if text.count(b",") > max_values + _OTHER_MARKS or text.count(b"[") > max_lists + _OTHER_MARKS:
        raise TooManyImages(
            f"the JSON holds more than {max_values:,} values, the pixels of as many images as one request may have "
            "(CONVMIXER_MAX_IMAGES); send several requests"
        )
    try:
        return InferenceRequest.model_validate(from_json(text, allow_inf_nan=False))
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in reason["loc"]) or "the body"
        raise MalformedRequest(f"no valid inference request: {where}: {reason['msg']}") from error
    except ValueError as error:  # jiter's
        raise MalformedRequest(f"the inference request is no valid JSON: {error}") from error


def _check_outputs(outputs: Sequence[RequestedOutput]) -> None:
    names = [output.name for output in outputs]
    for output in outputs:
        if output.name not in {LOGITS, PROBABILITIES, CLASS_MAPS}:
            raise MalformedRequest(f"no output {output.name[:100]!r}; there are {LOGITS}, {PROBABILITIES} and {CLASS_MAPS}")
        if output.name == CLASS_MAPS and output.parameters.classification:
            raise MalformedRequest(f"`classification` is for {LOGITS} and {PROBABILITIES}; {CLASS_MAPS} has no order of classes")
    if len(set(names)) < len(names):
        raise MalformedRequest("an output is named twice")


def _read_pixels(tensor: RequestInput, binary: memoryview, side: int, max_images: int) -> list[DecodedImage]:
    """`images`, uint8 [N, S, S, 3]: views into the request's bytes."""
    expected = f"`{PIXELS}` must be UINT8 [N, {side}, {side}, 3]"
    if tensor.datatype != "UINT8" or len(tensor.shape) != 4 or tensor.shape[1:] != [side, side, 3]:
        found = f"{tensor.datatype[:20]} {tensor.shape}"
        raise MalformedRequest(f"{expected}, not {found}; send pictures of other sizes as files, in `{ENCODED}`")
    _check_count(tensor.shape[0], max_images)
    size = math.prod(tensor.shape)
    if tensor.parameters.binary_data_size is None:
        values = _flat(tensor)
        try:
            data: bytes | memoryview = bytes(values)
        except (TypeError, ValueError) as error:
            raise MalformedRequest(f"{expected}: every value an integer from 0 to 255") from error
    else:
        data = _whole_binary(tensor, binary)
        if len(data) != size:
            raise MalformedRequest(f"{expected}: {tensor.shape} is {size:,} bytes, {len(data):,} were sent")
    pixels: NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(tensor.shape)
    return [DecodedImage(image) for image in pixels]


def _read_encoded(tensor: RequestInput, binary: memoryview, max_images: int) -> list[bytes]:
    """`encoded_images`, BYTES [N] or [N, 1]: each element a whole image file."""
    if tensor.datatype != "BYTES" or tensor.shape[1:] not in ([], [1]) or not tensor.shape:
        raise MalformedRequest(f"`{ENCODED}` must be BYTES [N] or [N, 1], not {tensor.datatype[:20]} {tensor.shape}")
    count = tensor.shape[0]
    _check_count(count, max_images)
    if tensor.parameters.binary_data_size is None:
        return [_from_base64(index, text) for index, text in enumerate(_flat(tensor))]
    images = list(itertools.islice(_with_lengths_removed(_whole_binary(tensor, binary)), count + 1))
    if len(images) != count:
        found = "more" if len(images) > count else f"{len(images)}"
        raise MalformedRequest(f"`{ENCODED}` has shape {tensor.shape}, but its bytes hold {found} elements")
    return images


def _check_count(count: int, max_images: int) -> None:
    if count > max_images:
        raise TooManyImages(f"{count} images; one request may have {max_images} (CONVMIXER_MAX_IMAGES); send several requests")
    if not count:
        raise MalformedRequest("the shape says 0 images; send at least one")


def _whole_binary(tensor: RequestInput, binary: memoryview) -> memoryview:
    """The bytes after the JSON: as there is one input, all of them are its own."""
    if tensor.data is not None:
        raise MalformedRequest(f"`{tensor.name}` has both `data` and `binary_data_size`; send one of them")
    size = tensor.parameters.binary_data_size
    if size != len(binary):
        raise MalformedRequest(
            f"`{tensor.name}` has binary_data_size {size}, but {len(binary):,} bytes follow the JSON; "
            "Inference-Header-Content-Length must be the length of the JSON in bytes"
        )
    return binary


def _flat(tensor: RequestInput) -> list[Any]:
    """`data` row by row; nested lists must have the tensor's shape."""
    if not isinstance(tensor.data, list):
        raise MalformedRequest(f"`{tensor.name}` has neither a list `data` nor `binary_data_size`")
    values, shape = tensor.data, tensor.shape
    if values and isinstance(values[0], list):
        if len(values) != shape[0]:
            raise MalformedRequest(f"`{tensor.name}`: `data` has {len(values)} rows, its shape says {shape[0]}")
        for size in shape[1:]:
            if any(type(row) is not list or len(row) != size for row in values):
                raise MalformedRequest(f"`{tensor.name}`: nested `data` does not have the shape {shape}")
            values = list(itertools.chain.from_iterable(values))
    if len(values) != math.prod(shape):
        raise MalformedRequest(f"`{tensor.name}`: `data` has {len(values):,} values, its shape {shape} says {math.prod(shape):,}")
    return values


def _from_base64(index: int, text: Any) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError("it is no string")
        return encoded.decode(text)
    except ValueError as error:
        what = f"{ENCODED}[{index}] is no base64 (RFC 4648) of an image file"
        raise MalformedRequest(f"{what}: {error}; or send it as bytes") from error


def _with_lengths_removed(data: memoryview) -> Iterator[bytes]:
    """The elements of a BYTES tensor, each after its length in four bytes."""
    begin = 0
    while begin < len(data):
        if begin + _LENGTH.size > len(data):
            raise MalformedRequest(f"`{ENCODED}` ends within an element's length")
        (length,) = _LENGTH.unpack_from(data, begin)
        begin += _LENGTH.size
        if begin + length > len(data):
            raise MalformedRequest(f"`{ENCODED}`: an element says {length:,} bytes, {len(data) - begin:,} are left")
        yield bytes(data[begin : begin + length])
        begin += length


def _with_length(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data


def _values(name: str, outcomes: Sequence[Outcome], metadata: ArtifactMetadata) -> NDArray[np.float32]:
    """float32 [N, C], or [N, C, h, w] for class maps; little-endian, row-major."""
    if name == LOGITS:
        rows: list[Any] = [outcome.logits for outcome in outcomes]
    elif name == PROBABILITIES:
        rows = [softmax(outcome.logits.tolist(), metadata.temperature) for outcome in outcomes]
    else:
        rows = [outcome.class_maps for outcome in outcomes]
    return np.array(rows, "<f4")


def _classify(values: NDArray[np.float32], count: int, classes: Sequence[str]) -> list[str]:
    """The best classes of each image, as Triton's classification extension writes them: "value:index:label"."""
    labelled: list[str] = []
    for row in values.tolist():
        best = sorted(range(len(classes)), key=row.__getitem__, reverse=True)[:count]
        labelled += [f"{row[index]:f}:{index}:{classes[index]}" for index in best]
    return labelled
