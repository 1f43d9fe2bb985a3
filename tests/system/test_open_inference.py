"""`/v2` of the real server with Triton's own clients, and with requests no client of good will would send."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import math
import re
import socket
import struct
import threading
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from app.api.open_inference.routes import EXTENSIONS
from app.images import DecodedImage
from app.main import create_app
from app.settings import Settings
from app.verdict import softmax
from benchmarks.server import ServerProcess
from tests.waiting import wait_until
from tests.wire import metric

INFER = "/v2/models/fast/infer"
KEY = {"Authorization": "Bearer key"}
NUMBERED = b"".join(number.to_bytes(256, "little") for number in range(33 * 4096))
"""33 MiB that compress less than 200 times."""


@pytest.fixture(scope="module")
def oip(base_url):
    with triton.InferenceServerClient(urlsplit(base_url).netloc) as client:
        yield client


@pytest.fixture(scope="module")
def version(client) -> str:
    return client.get("/model").json()["version"]


@pytest.fixture(scope="module")
def tight():
    """Every limit low, and keys."""
    limits = {"max_images": 3, "max_queue": 2, "max_body_bytes": 60_000, "max_held_bytes": 100_000, "receive_timeout_s": 1}
    with ServerProcess(api_keys="key", **limits) as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="module")
def pixels(samples) -> np.ndarray:
    return np.stack([np.asarray(Image.open(s.path).convert("RGB")) for s in samples])


@pytest.fixture(scope="module")
def files(samples) -> np.ndarray:
    return np.array([s.data for s in samples], dtype=object)


@pytest.fixture(scope="module")
def classes(client) -> list[str]:
    return client.get("/model").json()["classes"]


def image_input(values: np.ndarray, *, binary: bool = True, name: str = "", kind: Any = triton) -> Any:
    datatype = "UINT8" if values.dtype == np.uint8 else "BYTES"
    tensor = kind.InferInput(name or ("images" if datatype == "UINT8" else "encoded_images"), list(values.shape), datatype)
    return tensor.set_data_from_numpy(values, binary_data=binary)


def as_json(values: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "images", "shape": list(values.shape), "datatype": "UINT8", "data": values.tolist()}],
        **more,
    }


def error_of(response: httpx.Response) -> str:
    """The message, if the answer is the protocol's error object and nothing else."""
    assert response.status_code != 200, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert body["error"]
    return body["error"]


def test_health_metadata_and_configuration(oip, client, version, classes):
    assert oip.is_server_live()
    assert oip.is_server_ready()
    assert oip.is_model_ready("fast")
    assert oip.is_model_ready("fast", version)
    assert not oip.is_model_ready("fast", "9")
    assert not oip.is_model_ready("slow")
    server = oip.get_server_metadata()
    assert server["name"] == "convmixer-serve"
    assert server["extensions"] == EXTENSIONS
    assert client.get("/v2/").json() == server  # as the protocol's own OpenAPI document writes it
    for asked in ("", version):
        model = oip.get_model_metadata("fast", asked)
        assert model["versions"] == [version]
        assert model["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
        assert [(o["name"], o["shape"]) for o in model["outputs"]] == [("logits", [-1, 10]), ("probabilities", [-1, 10])]
        config = oip.get_model_config("fast", asked)
        assert config["max_batch_size"] == 128
        assert [tensor["dims"] for tensor in config["input"] + config["output"]] == [[32, 32, 3], [10], [10]]
        assert config["instance_group"][0]["count"] == client.get("/model").json()["workers"]
        assert set(config["parameters"]) == {"encoded_images", "class_maps"}


@pytest.mark.parametrize("call", [lambda oip: oip.load_model("fast"), lambda oip: oip.unload_model("fast")])
def test_nobody_loads_or_unloads_models(oip, call):
    with pytest.raises(InferenceServerException) as failure:
        call(oip)
    assert failure.value.status() == "404"
    assert oip.is_model_ready("fast")


def test_both_inputs_give_the_classes_of_classify(oip, client, samples, pixels, files, classes):
    patient = {"X-Deadline-Ms": "600000"}  # however slow the machine
    for half in (slice(0, 100), slice(100, 200)):
        form = [("images", s.data) for s in samples[half]]
        expected = client.post("/classify", files=form, headers=patient).json()["predictions"]
        for values in (pixels[half], files[half]):
            result = oip.infer("fast", [image_input(values)], timeout=600_000_000)
            probabilities, logits = result.as_numpy("probabilities"), result.as_numpy("logits")
            assert probabilities.shape == logits.shape == (100, 10)
            assert [classes[i] for i in probabilities.argmax(1)] == [p["label"] for p in expected]
            assert probabilities.max(1) == pytest.approx([p["confidence"] for p in expected], abs=1e-5)
            assert (logits.argmax(1) == probabilities.argmax(1)).all()


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_every_way_to_send_and_to_receive_gives_the_same(oip, client, version, pixels, binary_input, compression):
    temperature = client.get("/model").json()["metadata"]["temperature"]
    outputs = [
        triton.InferRequestedOutput("class_maps"),
        triton.InferRequestedOutput("logits", binary_data=False),
        triton.InferRequestedOutput("probabilities"),
    ]
    coding = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    some = pixels[:3]
    result = oip.infer("fast", [image_input(some, binary=binary_input)], outputs=outputs, request_id="one", **coding)
    plain = oip.infer("fast", [image_input(some)], model_version=version)
    assert result.get_response()["id"] == "one"
    assert "id" not in plain.get_response()
    assert [o["name"] for o in result.get_response()["outputs"]] == ["class_maps", "logits", "probabilities"]
    assert [o["name"] for o in plain.get_response()["outputs"]] == ["logits", "probabilities"]
    logits = result.as_numpy("logits")
    assert logits == pytest.approx(plain.as_numpy("logits"), abs=1e-4)
    assert result.as_numpy("probabilities") == pytest.approx(np.array([softmax(row, temperature) for row in logits]), abs=1e-5)
    maps = result.as_numpy("class_maps")
    assert maps.shape[:2] == (3, 10)
    offsets = logits - maps.mean((2, 3))  # the head's bias: the same for every image
    assert offsets == pytest.approx(np.broadcast_to(offsets[0], offsets.shape), abs=1e-3)


def test_classification_labels_the_best(oip, pixels, classes):
    values = oip.infer("fast", [image_input(pixels[:2])]).as_numpy("logits")
    outputs = [
        triton.InferRequestedOutput("logits", class_count=3),
        triton.InferRequestedOutput("probabilities", binary_data=False, class_count=99),
    ]
    result = oip.infer("fast", [image_input(pixels[:2])], outputs=outputs)
    best = result.as_numpy("logits")
    assert best.shape == (2, 3)
    for row, labelled in zip(values, best, strict=True):
        for place, (index, text) in enumerate(zip(np.argsort(-row), labelled, strict=False)):
            value, number, label = text.decode().split(":")
            assert (int(number), label) == (index, classes[index]), place
            assert float(value) == pytest.approx(row[index], abs=1e-4)
    assert result.as_numpy("probabilities").shape == (2, 10)
    assert result.get_output("probabilities")["datatype"] == "BYTES"


def test_the_asyncio_client(base_url, version, pixels, files):
    async def talk() -> None:
        async with triton_aio.InferenceServerClient(urlsplit(base_url).netloc) as oip:
            assert await oip.is_server_live()
            assert await oip.is_model_ready("fast", version)
            failed_before = (await oip.get_inference_statistics("fast"))["model_stats"][0]["inference_stats"]["fail"]["count"]
            assert (await oip.get_model_metadata("fast"))["name"] == "fast"
            assert (await oip.get_model_config("fast"))["name"] == "fast"
            inputs = [image_input(pixels[i : i + 2], kind=triton_aio) for i in range(8)]
            coding = {"request_compression_algorithm": "deflate", "response_compression_algorithm": "gzip"}
            outputs = [triton_aio.InferRequestedOutput("logits"), triton_aio.InferRequestedOutput("class_maps")]
            together = await asyncio.gather(*(oip.infer("fast", [i], outputs=outputs, **coding) for i in inputs))
            whole = await oip.infer("fast", [image_input(files[:9], kind=triton_aio)])
            for index, result in enumerate(together):
                expected = whole.as_numpy("logits")[index : index + 2]
                assert result.as_numpy("logits") == pytest.approx(expected, abs=1e-4)
            with pytest.raises(InferenceServerException, match="no model 'slow'"):
                await oip.infer("slow", inputs[:1])
            statistics = await oip.get_inference_statistics("fast")
            assert statistics["model_stats"][0]["inference_stats"]["fail"]["count"] == failed_before

    asyncio.run(talk())


def test_statistics_count_what_happened(start, version, pixels, files):
    url = start(workers=1, max_batch=2, deadline_ms=3_600_000).wait_until_ready()
    with triton.InferenceServerClient(urlsplit(url).netloc) as oip:
        idle = oip.get_inference_statistics()["model_stats"][0]
        assert (idle["inference_count"], idle["execution_count"], idle["last_inference"], idle["batch_stats"]) == (0, 0, 0, [])
        oip.infer("fast", [image_input(pixels[:1])])
        oip.infer("fast", [image_input(files[:5])])
        with pytest.raises(InferenceServerException):
            oip.infer("fast", [image_input(pixels[:1, :16])])
        httpx.post(f"{url}/classify", content=files[0])
        (counted,) = oip.get_inference_statistics("fast", version)["model_stats"]
    spent = counted["inference_stats"]
    assert {name: s["count"] for name, s in spent.items()} == {
        **dict.fromkeys(("success", "queue", "compute_input", "compute_infer", "compute_output"), 2),
        "fail": 1,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    parts = sum(spent[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert 0 < spent["compute_infer"]["ns"] < parts <= spent["success"]["ns"]
    assert counted["inference_count"] == 6
    assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in counted["batch_stats"]) == 6
    assert counted["execution_count"] == sum(b["compute_infer"]["count"] for b in counted["batch_stats"])
    assert all(b["compute_infer"]["ns"] > 0 for b in counted["batch_stats"])
    assert counted["last_inference"] > 1_700_000_000_000
    metrics = httpx.get(f"{url}/metrics").text
    assert 'convmixer_requests_total{status="400"} 1.0' in metrics
    assert 'convmixer_requests_total{status="200"} 3.0' in metrics


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model_name": "slow"}, 404, "no model 'slow' here; 'fast' is served"),
        ({"model_version": "9"}, 404, "no version '9' of 'fast' here"),
        ({"shape": [1, 31, 32, 3]}, 400, "UINT8 [N, 32, 32, 3], not UINT8 [1, 31, 32, 3]; send pictures of other sizes as files"),
        ({"shape": [1, 3, 32, 32]}, 400, "UINT8 [N, 32, 32, 3]"),
        ({"shape": [32, 32, 3]}, 400, "UINT8 [N, 32, 32, 3]"),
        ({"shape": [0, 32, 32, 3]}, 400, "0 images"),
        ({"shape": [129, 32, 32, 3]}, 413, "129 images; one request may have 128"),
        ({"dtype": np.float32}, 400, "not FP32"),
        ({"name": "pictures"}, 400, "no input 'pictures'"),
        ({"timeout": 1}, 504, "deadline"),
        ({"timeout": -1}, 400, "parameters.timeout"),
        ({"outputs": ["softmax"]}, 400, "no output 'softmax'"),
        ({"outputs": ["logits", "logits"]}, 400, "named twice"),
        ({"outputs": ["class_maps"], "class_count": 2}, 400, "no order of classes"),
        ({"twice": True}, 400, "2 inputs"),
    ],
)
def test_clients_are_told_what_is_wrong(oip, changes, status, message):
    values = np.zeros(changes.pop("shape", [1, 32, 32, 3]), changes.pop("dtype", np.uint8))
    datatype = "UINT8" if values.dtype == np.uint8 else "FP32"
    tensor = triton.InferInput(changes.pop("name", "images"), list(values.shape), datatype).set_data_from_numpy(values)
    count = changes.pop("class_count", 0)
    outputs = [triton.InferRequestedOutput(name, class_count=count) for name in changes.pop("outputs", [])]
    inputs = [tensor] * (1 + changes.pop("twice", False))
    with pytest.raises(InferenceServerException, match=re.escape(message)) as failure:
        oip.infer(**{"model_name": "fast", "inputs": inputs, "outputs": outputs, **changes})
    assert failure.value.status() == str(status)


def test_a_bad_file_fails_its_request_and_is_named(oip, client, files):
    mixed = files[:4].copy()
    mixed[2] = b"no image"
    with pytest.raises(InferenceServerException, match=re.escape("encoded_images[2]: not an image")) as failure:
        oip.infer("fast", [image_input(mixed)])
    assert failure.value.status() == "415"
    mixed[2] = files[2][:99]
    with pytest.raises(InferenceServerException, match=re.escape("encoded_images[2]: the image is truncated")) as failure:
        oip.infer("fast", [image_input(mixed)])
    assert failure.value.status() == "422"


def test_files_as_base64_and_pixels_without_json(client, oip, pixels, files):
    expected = oip.infer("fast", [image_input(pixels[:2])]).as_numpy("logits")
    encoded = [[base64.b64encode(data).decode()] for data in files[:2]]
    tensor = {"name": "encoded_images", "shape": [2, 1], "datatype": "BYTES", "data": encoded}
    answer = client.post(INFER, json={"inputs": [tensor], "outputs": [{"name": "logits"}]}).json()
    assert answer["outputs"][0]["data"] == pytest.approx(expected.ravel().tolist(), abs=1e-4)
    wrapped = {**tensor, "data": ["data:image/webp;base64," + text for (text,) in encoded]}
    answer = client.post(INFER, json={"inputs": [wrapped], "outputs": [{"name": "logits"}]}).json()
    assert answer["outputs"][0]["data"] == pytest.approx(expected.ravel().tolist(), abs=1e-4)
    # Triton's raw binary request: no JSON at all
    response = client.post(INFER, content=pixels[0].tobytes(), headers={"Inference-Header-Content-Length": "0"})
    length = int(response.headers["Inference-Header-Content-Length"])
    result = triton.InferenceServerClient.parse_response_body(response.content, header_length=length)
    assert result.as_numpy("logits") == pytest.approx(expected[:1], abs=1e-4)


def test_null_is_a_field_that_is_not_there(client, pixels):
    plain = client.post(INFER, json=as_json(pixels[:1])).json()
    unset = {"classification": None, "binary_data": None}
    body = as_json(pixels[:1], id=None, parameters={"binary_data_output": None, "timeout": None})
    body["inputs"][0] |= {"parameters": None}
    for outputs in (None, [{"name": name, "parameters": given} for name, given in (("logits", None), ("probabilities", unset))]):
        answer = client.post(INFER, json={**body, "outputs": outputs}).json()
        assert [output["name"] for output in answer["outputs"]] == ["logits", "probabilities"]
        for found, expected in zip(answer["outputs"], plain["outputs"], strict=True):
            assert found["data"] == pytest.approx(expected["data"], abs=1e-4)
    nameless = {"inputs": [{**body["inputs"][0], "name": None}]}
    for needed, message in (({"inputs": None}, "inputs: Field required"), (nameless, "inputs.0.name: Field required")):
        assert message in error_of(client.post(INFER, json=needed))


ZEROS = np.zeros((1, 32, 32, 3), np.uint8)
TENSOR = as_json(ZEROS)["inputs"][0]
PIXELS = b"\0" * 3072


def tensor(**changes: Any) -> bytes:
    return json.dumps({"inputs": [{**TENSOR, **changes}]}).encode()


def with_values(*values: Any) -> bytes:
    return tensor(data=[*values, *[0] * (3072 - len(values))])


BINARY = {"data": None, "parameters": {"binary_data_size": 3072}}
BYTES = {"name": "encoded_images", "datatype": "BYTES"}


def elements(*sizes: int, shape: Any = (2,)) -> tuple[bytes, bytes]:
    """A BYTES tensor whose elements say these lengths and have ten bytes each."""
    data = b"".join(struct.pack("<I", size) + b"0123456789" for size in sizes)
    return tensor(**BYTES, shape=list(shape), data=None, parameters={"binary_data_size": len(data)}), data


@pytest.mark.parametrize(
    ("head", "tail", "length", "status", "message"),
    [
        # the JSON
        (b"", b"", None, 400, "no valid JSON"),
        (b"[]", b"", None, 400, "no valid inference request"),
        (b"{}", b"", None, 400, "inputs: Field required"),
        (b'{"inputs": []}', b"", None, 400, "0 inputs"),
        (b'{"inputs": [' + b"[" * 10_000, b"", None, 400, "recursion limit"),
        (b'{"inputs": ' + b"[" * 2_000_000, b"", None, 413, "CONVMIXER_MAX_IMAGES"),
        (b'{"inputs": [' + b"{}," * 2_000_000, b"", None, 400, "more than 100 objects"),
        (b'{"id": "' + b"i" * 1025 + b'", "inputs": []}', b"", None, 400, "id: String should have at most 1024"),
        (tensor().replace(b"[[[[0,", b"[[[[NaN,"), b"", None, 400, "no valid JSON"),
        (tensor().replace(b"[[[[0,", b"[[[[1e999,"), b"", None, 400, "integer from 0 to 255"),
        (tensor().replace(b"[[[[0,", b"[[[[" + b"9" * 5000 + b","), b"", None, 400, "no valid JSON"),
        (with_values(10**30), b"", None, 400, "integer from 0 to 255"),
        (with_values(256), b"", None, 400, "integer from 0 to 255"),
        (with_values(-1), b"", None, 400, "integer from 0 to 255"),
        (with_values(0.5), b"", None, 400, "integer from 0 to 255"),
        (with_values("7"), b"", None, 400, "integer from 0 to 255"),
        (with_values(None), b"", None, 400, "integer from 0 to 255"),
        (with_values({}), b"", None, 400, "integer from 0 to 255"),
        (with_values([0]), b"", None, 400, "rows"),
        (tensor(data=[0] * 3071), b"", None, 400, "3,071 values"),
        (tensor(data=[[[[0] * 3] * 32] * 31 + [[[0] * 3] * 31]]), b"", None, 400, "does not have the shape"),
        (tensor(data="0" * 3072), b"", None, 400, "neither a list"),
        (tensor(data=None), b"", None, 400, "neither a list"),
        (tensor(data=[[]] * 150_000), b"", None, 413, "more than 393,216 values"),
        (tensor(data=[{"": 1}] * 100), b"", None, 400, "more than 100 objects"),
        # shape and type
        (tensor(shape=[-1, 32, 32, 3]), b"", None, 400, "inputs.0.shape.0: Input should be greater than or equal to 0"),
        (tensor(shape=[2**62, 32, 32, 3]), b"", None, 413, "images"),
        (tensor(shape=[1.0, 32, 32, 3]), b"", None, 400, "inputs.0.shape.0: Input should be a valid integer"),
        (tensor(shape=[1] * 100_000), b"", None, 400, "inputs.0.shape: List should have at most"),
        (tensor(shape=[]), b"", None, 400, "not UINT8 []"),
        (tensor(datatype="INT8"), b"", None, 400, "not INT8"),
        (tensor(datatype="BYTES"), b"", None, 400, "not BYTES"),
        (tensor(**BYTES, shape=[], data=["QUJD"]), b"", None, 400, "BYTES [N] or [N, 1], not BYTES []"),
        (tensor(**BYTES, shape=[1, 2], data=["QUJD", "QUJD"]), b"", None, 400, "BYTES [N] or [N, 1]"),
        (tensor(**BYTES, shape=[1], data=["no base64!"]), b"", None, 400, "encoded_images[0] is no base64"),
        (tensor(**BYTES, shape=[1], data=[7]), b"", None, 400, "encoded_images[0] is no base64"),
        (tensor(**BYTES, shape=[1], data=["QUJDRA"]), b"", None, 400, "padding"),
        (tensor(**BYTES, shape=[1], data=["QU-_"]), b"", None, 400, "URL-safe"),
        (tensor(**BYTES, shape=[1], data=[""]), b"", None, 422, "encoded_images[0]: the file is empty"),
        # the length of the JSON, and what follows it
        (tensor(**BINARY), PIXELS, "", 400, "Inference-Header-Content-Length"),
        (tensor(**BINARY), PIXELS, "-1", 400, "Inference-Header-Content-Length"),
        (tensor(**BINARY), PIXELS, "1e3", 400, "Inference-Header-Content-Length"),
        (tensor(**BINARY), PIXELS, "²", 400, "Inference-Header-Content-Length"),
        (tensor(**BINARY), PIXELS, "9" * 30, 400, "Inference-Header-Content-Length"),
        (tensor(**BINARY), PIXELS, "9999", 400, "Inference-Header-Content-Length is '9999', but the body has"),
        (tensor(**BINARY), PIXELS, "7", 400, "no valid JSON"),
        (tensor(**BINARY), PIXELS, None, 400, "no valid JSON"),
        (tensor(**BINARY), PIXELS[:-1], ..., 400, "binary_data_size 3072, but 3,071 bytes follow"),
        (tensor(**BINARY), PIXELS + b"\0", ..., 400, "3,073 bytes follow"),
        (tensor(data=None, parameters={"binary_data_size": 3071}), PIXELS[:-1], ..., 400, "3,072 bytes, 3,071 were sent"),
        (tensor(data=None, parameters={"binary_data_size": -1}), PIXELS, ..., 400, "binary_data_size"),
        (tensor(data=None, parameters={"binary_data_size": 2**70}), PIXELS, ..., 400, "binary_data_size"),
        (tensor(parameters=BINARY["parameters"]), PIXELS, ..., 400, "both"),
        (tensor(), PIXELS, ..., 400, "no `binary_data_size`"),
        (b"", PIXELS[:-1], "0", 400, "were sent"),
        (*elements(10), ..., 400, "hold 1 elements"),
        (*elements(10, 10, 10), ..., 400, "hold more elements"),
        (*elements(10, 11), ..., 400, "says 11 bytes, 10 are left"),
        (*elements(10, 2**32 - 1), ..., 400, "says 4,294,967,295 bytes"),
        (*elements(10, 8), ..., 400, "within an element's length"),
        (*elements(10, 10, shape=[0]), ..., 400, "0 images"),
    ],
)
def test_hostile_requests_are_refused_with_a_word(client, head, tail, length, status, message):
    length = str(len(head)) if length is ... else length
    headers = {} if length is None else {"Inference-Header-Content-Length": length.encode()}
    response = client.post(INFER, content=head + tail, headers=headers)
    assert (response.status_code, message in error_of(response)) == (status, True), response.text
    assert client.post(INFER, json=as_json(ZEROS)).status_code == 200


@pytest.mark.parametrize(
    ("body", "coding", "status", "message"),
    [
        (gzip.compress(NUMBERED, 1), "gzip", 413, "when decompressed (CONVMIXER_MAX_BODY_BYTES)"),
        (zlib.compress(NUMBERED, 1), "deflate", 413, "when decompressed (CONVMIXER_MAX_BODY_BYTES)"),
        (gzip.compress(b"\0" * (5 << 20)), "gzip", 413, "more than 200 times as long"),
        (gzip.compress(b" " * (3 << 20)), "gzip", 400, "no valid JSON"),
        (gzip.compress(gzip.compress(b"{}")), "gzip", 400, "no valid JSON"),
        (gzip.compress(tensor())[:-9], "gzip", 400, "cut off"),
        (gzip.compress(tensor()) + b"more", "gzip", 400, "more follows"),
        (gzip.compress(b" " * (1 << 20)), "gzip", 400, "no valid JSON"),
        (gzip.compress(json.dumps(as_json(ZEROS, outputs=[{"name": "logits"}] * 200_000)).encode()), "gzip", 400, "objects"),
        (b"no gzip", "gzip", 400, "no valid gzip stream"),
        (gzip.compress(tensor()), "deflate", 400, "no valid deflate stream"),
        (b"", "deflate", 400, "cut off"),
        (tensor(), "br", 415, "'br' is not read here"),
        (tensor(), "gzip, gzip", 415, "is not read here"),
    ],
)
def test_hostile_compressed_requests(client, body, coding, status, message):
    response = client.post(INFER, content=body, headers={"Content-Encoding": coding})
    assert (response.status_code, message in error_of(response)) == (status, True), response.text
    assert response.headers.get("accept-encoding") == ("gzip, deflate" if status == 415 else None)
    for good, name in ((gzip.compress(tensor()), "x-gzip"), (tensor(), "identity"), (tensor(), "")):
        assert client.post(INFER, content=good, headers={"Content-Encoding": name}).status_code == 200
    lines = [("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")]
    twice = client.post(INFER, content=gzip.compress(gzip.compress(tensor())), headers=lines)
    assert "'gzip, gzip' is not read here" in error_of(twice)


@pytest.mark.parametrize(
    ("accepted", "used"),
    [("", None), ("br", None), ("gzip;q=0", None), ("gzip;q=0.0, deflate", "deflate"), ("br, GZIP;q=0.5", "gzip")],
)
def test_answers_are_compressed_as_the_client_accepts(client, pixels, accepted, used):
    body = as_json(pixels[:1], outputs=[{"name": "class_maps"}])
    response = client.post(INFER, json=body, headers={"Accept-Encoding": accepted})
    assert response.headers.get("content-encoding") == used
    (maps,) = response.json()["outputs"]
    assert len(maps["data"]) == math.prod(maps["shape"]) > 10 * 10 * 10
    lines = [("Accept-Encoding", item.strip()) for item in accepted.split(",")]
    assert client.post(INFER, json=body, headers=lines).headers.get("content-encoding") == used
    small = client.post(INFER, json=as_json(pixels[:1]), headers={"Accept-Encoding": accepted})
    assert "content-encoding" not in small.headers


def test_an_answer_that_has_no_room_is_refused(start):
    url = start(max_held_bytes=1_000_000).wait_until_ready()
    maps = as_json(ZEROS.repeat(64, 0), outputs=[{"name": "class_maps"}])
    pixels = as_json(ZEROS.repeat(64, 0))
    with httpx.Client(base_url=url) as client:
        assert client.post(INFER, json=pixels).status_code == 200
        response = client.post(INFER, json=maps)
        assert (response.status_code, "CONVMIXER_MAX_HELD_BYTES" in error_of(response)) == (503, True)
        assert client.post(INFER, json=pixels).status_code == 200  # what was counted is given back
        (counted,) = client.get("/v2/models/fast/stats").json()["model_stats"]
        assert [counted["inference_stats"][name]["count"] for name in ("success", "fail")] == [2, 1]
        assert "convmixer_request_seconds_count 2.0" in client.get("/metrics").text


def test_limits_are_those_of_classify_and_failures_the_protocols(tight):
    """Whoever refuses, the guard, the route or the engine: the answer is the protocol's."""
    with httpx.Client(base_url=tight, headers=KEY) as client:
        assert client.post(INFER, content=tensor()).status_code == 200
        for coded in [gzip.compress(tensor(data=[0] * 3072) + b" " * 40_000)] * 5:  # what is taken for it is given back
            assert client.post(INFER, content=coded, headers={"Content-Encoding": "gzip"}).status_code == 200
        for body, headers, status, message in (
            (tensor(shape=[4, 32, 32, 3], data=[]), {}, 413, "4 images; one request may have 3 (CONVMIXER_MAX_IMAGES)"),
            (json.dumps(as_json(ZEROS.repeat(5, 0))), {}, 413, "more than 9,216 values"),
            (b" " * 60_001, {}, 413, "CONVMIXER_MAX_BODY_BYTES"),
            (gzip.compress(b" " * 60_001), {"Content-Encoding": "gzip"}, 413, "when decompressed (CONVMIXER_MAX_BODY_BYTES)"),
            (json.dumps(as_json(ZEROS.repeat(3, 0))), {}, 503, "CONVMIXER_MAX_QUEUE"),
            (tensor(), {"Authorization": "Bearer lock"}, 401, "none of this service's"),
            (tensor(), {"X-Deadline-Ms": "soon"}, 422, "header.x-deadline-ms: Input should be a valid integer"),
            (tensor(), {f"X-{number}": "x" for number in range(100)}, 431, "more than 100 headers"),
        ):
            response = client.post(INFER, content=body, headers=headers)
            assert (response.status_code, message in error_of(response)) == (status, True), response.text
            assert ("retry-after" in response.headers) == (status == 503)
            assert response.headers.get("www-authenticate") == ('Bearer error="invalid_token"' if status == 401 else None)
        assert error_of(client.put(INFER)) == f"{INFER} takes POST, not PUT"
        assert "no /v2/models/fast/predict here" in error_of(client.post("/v2/models/fast/predict"))
        assert client.post(INFER, content=tensor()).status_code == 200
    for open_to_all in ("/v2", "/v2/health/live", "/v2/health/ready"):
        assert httpx.get(f"{tight}{open_to_all}").status_code == 200
    for closed in ("/v2/models/fast", "/v2/models/fast/config", "/v2/models/stats"):
        assert "key" in error_of(httpx.get(f"{tight}{closed}"))
    assert httpx.post(f"{tight}/classify", content=b"").json()["code"] == "unauthorized"


def test_bodies_held_at_once_and_bodies_that_do_not_arrive(tight):
    address = urlsplit(tight)
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 50001\r\n\r\n".encode()
    with socket.create_connection((address.hostname, address.port)) as half, httpx.Client(base_url=tight, headers=KEY) as client:
        half.sendall(request + b" " * 50_000)
        # 50,000 bytes are held by the half body; these become as many more, and a few
        bomb = gzip.compress(b" " * 59_000)
        give_up = 200
        while (response := client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})).status_code != 503:
            give_up -= 1  # until the half body has arrived
            assert give_up, response.text
        assert "CONVMIXER_MAX_HELD_BYTES" in error_of(response)
        assert "retry-after" in response.headers
        answer = b"".join(iter(lambda: half.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "CONVMIXER_RECEIVE_TIMEOUT_S" in json.loads(body)["error"]
        assert client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"}).status_code == 400


def test_a_client_that_leaves_is_counted_and_its_work_dropped(start, pixels):
    url = start(workers=1, max_batch=2, deadline_ms=3_600_000).wait_until_ready()
    address = urlsplit(url)
    body = tensor(shape=[128, 32, 32, 3], data=None, parameters={"binary_data_size": 128 * 3072})
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(body)}\r\n"
    head += f"Content-Length: {len(body) + 128 * 3072}\r\n\r\n"

    def failures() -> int:
        statistics = client.get("/v2/models/stats").json()["model_stats"][0]
        return statistics["inference_stats"]["fail"]["count"]

    def classified() -> float:
        return metric(client.get("/metrics").text, "convmixer_images_total")

    with httpx.Client(base_url=url) as client:
        before = failures(), classified()
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + body + pixels[:128].tobytes())
        wait_until(lambda: failures() != before[0])
        assert 'convmixer_requests_total{status="499"} 1.0' in client.get("/metrics").text
        assert client.post(INFER, content=tensor()).status_code == 200
        assert classified() < before[1] + 128


def test_every_path_is_documented(client, repository):
    """docs/api.md has one row a path; what stands in brackets may be left out."""
    document = client.get("/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, item in document.items() if path.startswith("/v2") for method in item}
    rows = re.findall(r"^\| `((?:GET|POST) /v2\S*)` \|", (repository / "docs" / "api.md").read_text(), re.MULTILINE)
    told = {re.sub(r"\[.*?\]", "", row) for row in rows} | {row.replace("[", "").replace("]", "") for row in rows}
    assert told == served
    assert not [path for path in served if "load" in path or "repository" in path]
    infer = document["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert {p["name"] for p in infer["parameters"]} == {"model", "version", "Inference-Header-Content-Length", "x-deadline-ms"}
    assert {"400", "404", "408", "413", "415", "422", "500", "503", "504"} < set(infer["responses"])
    assert "InferenceError" in json.dumps(infer["responses"]["503"])


def test_the_documented_example_is_true(client, repository):
    section = (repository / "docs" / "api.md").read_text().partition("## Open Inference Protocol")[2]
    request, answer = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", section, re.DOTALL)[:2])
    photo = (repository / "docs" / "images" / "cat.png").read_bytes()
    request["inputs"][0]["data"] = [base64.b64encode(photo).decode()]
    found = client.post(INFER, json=request).json()
    said = answer["outputs"][0].pop("data")
    assert [text.split(":")[1:] for text in found["outputs"][0].pop("data")] == [text.split(":")[1:] for text in said]
    assert found == answer


def test_a_hung_worker_is_seen_by_all_probes(monkeypatch):
    with TestClient(create_app(Settings(workers=1, max_batch=1))) as client:
        scheduler = client.app_state["service"].scheduler
        scheduler.hang_timeout_s = 0
        begun, end = threading.Event(), threading.Event()
        infer = scheduler.session.infer

        def hang(*arguments, **options):
            begun.set()
            end.wait(60)
            return infer(*arguments, **options)

        monkeypatch.setattr(scheduler.session, "infer", hang)
        (answer,) = scheduler.submit([DecodedImage(np.zeros((32, 32, 3), np.uint8))])
        assert begun.wait(60)
        for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/fast/ready"):
            response = client.get(path)
            assert response.status_code == 503, path
            assert "a worker has been busy" in response.text
        end.set()
        answer.result(60)
        for path in ("/livez", "/readyz", "/v2/health/live"):
            assert client.get(path).status_code == 200


def test_a_draining_service_says_so():
    with TestClient(create_app(Settings(workers=1, max_batch=1))) as client:
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get("/v2/models/fast/ready").json() == {"name": "fast", "ready": True}
        assert client.app_state["service"].scheduler.drain(60)
        for path in ("/v2/health/ready", "/v2/models/fast/ready"):
            response = client.get(path)
            assert (response.status_code, error_of(response)) == (503, "draining")
            assert response.headers["retry-after"] == "1"
        assert client.get("/v2/health/live").json() == {"live": True}
        response = client.post(INFER, content=tensor())
        assert "shutting down" in error_of(response)
        assert response.headers["retry-after"] == "1"
