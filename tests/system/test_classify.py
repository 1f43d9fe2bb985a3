"""`POST /classify` of the real server, real model, real images."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.server import ServerProcess
from tests.waiting import wait_until
from tests.wire import connect, metric

WEBP = {"Content-Type": "image/webp"}


def classify(client: httpx.Client, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = client.post("/classify", content=data, headers=WEBP, params=parameters)
    assert response.status_code == 200, response.text
    prediction: dict[str, Any] = response.json()["predictions"][0]
    return prediction


def test_the_three_kinds_of_body_give_the_same_answer(client, samples):
    chosen = samples[::40]
    raw = [classify(client, s.data) for s in chosen]
    form = client.post("/classify", files=[("images", (s.path.name, s.data)) for s in chosen]).json()["predictions"]
    encoded = [base64.b64encode(s.data).decode() for s in chosen]
    body = client.post("/classify", json={"images": encoded}).json()["predictions"]
    for index, sample in enumerate(chosen):
        assert form[index]["index"] == body[index]["index"] == index
        assert form[index]["filename"] == sample.path.name
        assert form[index]["label"] == body[index]["label"] == raw[index]["label"]
        assert form[index]["confidence"] == pytest.approx(raw[index]["confidence"], abs=1e-5)


def test_what_the_bytes_are_counts_and_not_what_they_are_called(client, samples):
    for kind in ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "application/octet-stream"):
        for parameter in ("", "; through=fastapi"):
            response = client.post("/classify", content=samples[0].data, headers={"Content-Type": kind + parameter})
            assert response.json()["predictions"][0]["label"] == samples[0].label, kind + parameter
    answer = client.post("/classify", files={"any_name": samples[0].data})
    assert answer.json()["predictions"][0]["label"] == samples[0].label


@pytest.mark.parametrize("kind", ["image/jpg", "image/x-png", "image/svg+xml", "binary/octet-stream", "IMAGE/PNG"])
def test_any_name_of_an_image_is_taken_and_the_bytes_decide(client, samples, kind):
    answer = client.post("/classify", content=samples[0].data, headers={"Content-Type": kind})
    assert answer.json()["predictions"][0]["label"] == samples[0].label
    assert problem(client.post("/classify", content=b"<svg/>", headers={"Content-Type": kind})) == (415, "unsupported_image")


def test_what_is_read_instead_is_said_in_headers(client, samples):
    response = client.post("/classify", content=samples[0].data, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert problem(response) == (415, "unsupported_media_type")
    assert "with curl: -H 'Content-Type: image/png'" in response.json()["detail"]
    assert {"image/*", "multipart/form-data"} < set(response.headers["Accept"].split(", "))
    assert "curl" not in client.post("/classify", content=b"x", headers={"Content-Type": "text/plain"}).json()["detail"]


def test_a_content_encoding_is_refused_by_its_name(client, samples):
    data = gzip.compress(samples[0].data)
    for lines in ([("Content-Encoding", "gzip")], [("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]):
        response = client.post("/classify", content=data, headers=[*WEBP.items(), *lines])
        assert problem(response) == (415, "unsupported_media_type")
        assert "Content-Encoding 'gzip'" in response.json()["detail"]
        assert response.headers["Accept-Encoding"] == "identity"
    for none in ("identity", ""):
        assert client.post("/classify", content=samples[0].data, headers=WEBP | {"Content-Encoding": none}).status_code == 200


def test_base64_is_taken_as_other_programs_wrap_it(client, samples):
    text = base64.b64encode(samples[0].data).decode()
    lines = base64.encodebytes(samples[0].data).decode()
    wrapped = [text, f"data:image/webp;base64,{text}", lines, lines.replace("\n", "\r\n"), f"DATA:;base64, {text}\n"]
    answer = client.post("/classify", json={"images": wrapped}).json()
    assert [prediction["label"] for prediction in answer["predictions"]] == [samples[0].label] * len(wrapped)


def test_what_is_wrong_with_base64_is_said(client):
    wrong = {
        "QUJDRA": "padding",
        "QU-_": "URL-safe",
        "QU*D": "'*'",
        "data:image/png,x": "':'",
        "QUJD=QUJD": "padding",
        "é": "'é'",
    }
    answer = client.post("/classify", json={"images": list(wrong)})
    assert problem(answer) == (422, "undecodable_image")
    for prediction, word in zip(answer.json()["predictions"], wrong.values(), strict=True):
        assert word in prediction["error"]["detail"]


def test_an_empty_file_is_called_empty(client, samples):
    files = [("images", ("a.webp", samples[0].data)), ("images", ("b.webp", b""))]
    predictions = client.post("/classify", files=files).json()["predictions"]
    assert [p.get("error") for p in predictions] == [None, {"code": "undecodable_image", "detail": "the file is empty"}]
    response = client.post("/classify", json={"images": [""]})
    assert (problem(response), response.json()["detail"]) == ((422, "undecodable_image"), "the file is empty")


def part(data: bytes, disposition: str = "", content_type: str = "") -> bytes:
    """One part of a form, with the boundary before it."""
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f'--y\r\nContent-Disposition: form-data; name="images"{disposition}\r\n{kind}\r\n'.encode() + data + b"\r\n"


def send_form(client: httpx.Client, *parts: bytes) -> httpx.Response:
    headers = {"Content-Type": "multipart/form-data; boundary=y"}
    return client.post("/classify", content=b"".join(parts) + b"--y--\r\n", headers=headers)


def test_a_file_needs_no_name_if_it_has_a_type(client, samples):
    """As Apache's HttpClient, Spring and reqwest send bytes."""
    data = samples[0].data
    assert len(data) > 1024
    kinds = ["image/webp", "IMAGE/PNG; a=b", "application/octet-stream", "binary/octet-stream"]
    answer = send_form(client, part(data, '; filename="a"'), *(part(data, content_type=kind) for kind in kinds)).json()
    assert [prediction["label"] for prediction in answer["predictions"]] == [samples[0].label] * 5
    assert [prediction.get("filename") for prediction in answer["predictions"]] == ["a", None, None, None, None]
    for text in (b"hi", data):
        response = send_form(client, part(text))
        assert problem(response) == (400, "malformed_request")
        assert "must be a file: it has a filename" in response.json()["detail"]
    assert send_form(client, part(b"", content_type="image/png")).json()["detail"] == "the file is empty"


def test_a_field_that_a_browser_sends_unfilled_is_none(client, samples):
    unfilled = part(b"", '; filename=""', "application/octet-stream")
    (prediction,) = send_form(client, unfilled, part(samples[0].data, '; filename="a"')).json()["predictions"]
    assert (prediction["index"], prediction["label"]) == (0, samples[0].label)
    assert "holds no file" in send_form(client, unfilled).json()["detail"]


@pytest.mark.parametrize("query", ["", "top_k=3", "top_k=10&explain=true", "explain=false"])
def test_the_short_way_and_the_documented_route_give_the_same_answer(client, samples, query):
    """A parameter in the Content-Type sends a request through FastAPI; the plain one goes around it."""
    for sample in samples[::40]:
        answers = []
        for content_type in ("image/webp", "image/webp; through=fastapi"):
            response = client.post(f"/classify?{query}", content=sample.data, headers={"Content-Type": content_type})
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            assert "Server-Timing" in response.headers
            body = response.json()
            assert body.pop("request_id") == response.headers["X-Request-ID"]
            answers.append(body)
        # the one may have run on every core and the other not: the sums differ in their last bits
        assert flat(answers[0]) == pytest.approx(flat(answers[1]), abs=1e-4)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a JSON document by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize(
    ("content", "query", "headers", "expected"),
    [
        (b"", "", {}, (422, "undecodable_image")),
        (b"GIF but not really", "", {}, (415, "unsupported_image")),
        (b"x", "top_k=0", {}, (422, "invalid_parameter")),
        (b"x", "top_k=1001", {}, (422, "invalid_parameter")),
        (b"x", "explain=perhaps", {}, (422, "invalid_parameter")),
        (b"x", "", {"X-Deadline-Ms": "0"}, (422, "invalid_parameter")),
        (b"x", "", {"X-Deadline-Ms": "soon"}, (422, "invalid_parameter")),
        (b"x", "", {"X-Deadline-Ms": "3600001"}, (422, "invalid_parameter")),
    ],
)
def test_both_ways_refuse_alike(client, content, query, headers, expected):
    for content_type in ("image/png", "image/png; through=fastapi"):
        response = client.post(f"/classify?{query}", content=content, headers={"Content-Type": content_type, **headers})
        assert problem(response) == expected


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Content-Type", "text/plain"), ("Content-Type", "image/webp")], 415),
        ([("Content-Type", "image/webp"), ("Content-Type", "text/plain")], 200),
        ([("Content-Type", "image/webp"), ("X-Deadline-Ms", "5000"), ("X-Deadline-Ms", "soon")], 200),
        ([("Content-Type", "image/webp"), ("X-Deadline-Ms", "soon"), ("X-Deadline-Ms", "5000")], 422),
    ],
)
def test_of_repeated_headers_the_first_counts_on_both_ways(client, samples, headers, status):
    for through_fastapi in ([], [("Origin", "https://other.example")]):
        response = client.post("/classify", content=samples[0].data, headers=[*headers, *through_fastapi])
        assert response.status_code == status, response.text


def test_the_images_of_a_client_that_left_are_dropped(start, samples, tmp_path):
    path = tmp_path / "large.png"
    Image.effect_noise((1500, 1500), 60).save(path)
    images = 12
    url = start(workers=1, max_body_bytes=10**8).wait_until_ready()
    request = httpx.Request("POST", f"{url}/classify", files=[("images", ("x.png", path.read_bytes()))] * images)
    head = b"POST /classify HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % pair for pair in request.headers.raw) + b"\r\n"
    with connect(url) as connection:
        connection.sendall(head + request.read())
    with httpx.Client(base_url=url, timeout=60) as other:
        assert other.post("/classify", content=samples[0].data, headers=WEBP).status_code == 200
        wait_until(lambda: 'convmixer_requests_total{status="499"} 1.0' in other.get("/metrics").text)
        done = metric(other.get("/metrics").text, "convmixer_images_total")
        assert 1 <= done < 1 + images / 2


def test_probabilities_are_ranked_and_sum_to_one(client, samples):
    classes = client.get("/model").json()["classes"]
    answer = classify(client, samples[0].data, top_k=1000)
    probabilities = [entry["probability"] for entry in answer["top_k"]]
    assert sorted(entry["label"] for entry in answer["top_k"]) == sorted(classes)
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-6)
    assert answer["confidence"] == probabilities[0]
    assert len(classify(client, samples[0].data, top_k=2)["top_k"]) == 2


def test_heat_map_covers_the_picture_and_only_on_request(client, samples):
    plain = classify(client, samples[0].data)
    explained = classify(client, samples[0].data, explain="true")
    values = np.array(explained["heat_map"]["values"])
    assert "heat_map" not in plain
    assert explained["heat_map"]["label"] == explained["label"] == plain["label"]
    cells = client.get("/model").json()["metadata"]["view_size"] // 2
    assert values.shape == (cells, cells)
    assert values.min() == 0
    assert values.max() == 1
    assert explained["confidence"] == pytest.approx(plain["confidence"], abs=1e-5)


def test_request_id_and_timing_are_in_the_headers(client, samples):
    response = client.post("/classify", content=samples[0].data, headers={**WEBP, "X-Request-ID": "mine-42"})
    assert response.headers["X-Request-ID"] == response.json()["request_id"] == "mine-42"
    stages = [part.split(";dur=") for part in response.headers["Server-Timing"].split(", ")]
    assert [name for name, _ in stages] == ["decode", "queue", "infer", "total"]
    assert all(float(duration) >= 0 for _, duration in stages)
    hostile = client.post("/classify", content=samples[0].data, headers={**WEBP, "X-Request-ID": "a\tb" * 40})
    assert len(hostile.headers["X-Request-ID"]) == 32


def test_a_bad_image_harms_only_itself(client, samples):
    parts = [
        ("good.webp", samples[0].data),
        ("cut.webp", samples[1].data[:60]),
        ("text.png", b"hello"),
        ("b.webp", samples[2].data),
    ]
    response = client.post("/classify", files=[("images", part) for part in parts])
    assert response.status_code == 200
    predictions = response.json()["predictions"]
    assert [p["filename"] for p in predictions] == [name for name, _ in parts]
    assert [p.get("error", {}).get("code") for p in predictions] == [None, "undecodable_image", "unsupported_image", None]
    assert predictions[0]["label"] == classify(client, samples[0].data)["label"]
    assert predictions[3]["label"] == classify(client, samples[2].data)["label"]


def test_a_request_of_bad_images_only_fails_with_each_ones_reason(client, samples):
    def status_and_code(*parts: bytes) -> tuple[int, str]:
        response = client.post("/classify", files=[("images", ("x.png", part)) for part in parts])
        assert [p["index"] for p in response.json()["predictions"]] == list(range(len(parts)))
        return problem(response)

    assert status_and_code(b"no", b"no") == (415, "unsupported_image")
    assert status_and_code(b"no", samples[1].data[:60]) == (422, "undecodable_image")


def test_mixed_traffic_of_many_clients_answers_each_as_alone(base_url, client, samples):
    chosen = samples[::4]
    alone = {s.path: classify(client, s.data)["confidence"] for s in chosen}

    def hurry(sample):
        with httpx.Client(base_url=base_url, timeout=60, headers={"X-Deadline-Ms": "60000"}) as own:
            bad = own.post("/classify", content=sample.data[:80], headers=WEBP)
            return bad.status_code, classify(own, sample.data)["confidence"]

    with ThreadPoolExecutor(16) as pool:
        for sample, (status, confidence) in zip(chosen, pool.map(hurry, chosen), strict=True):
            assert status == 422
            assert confidence == pytest.approx(alone[sample.path], abs=1e-5)


def problem(response: httpx.Response) -> tuple[int, str]:
    """(status, code) of a failure, after checking its form (RFC 9457)."""
    assert response.headers["Content-Type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["title"]
    assert body["detail"]
    return response.status_code, body["code"]


@pytest.mark.parametrize(
    ("content", "content_type", "expected"),
    [
        (b"", "image/png", (422, "undecodable_image")),
        (b"{", "application/json", (400, "malformed_request")),
        (b'{"images": []}', "application/json", (400, "malformed_request")),
        (b'{"images": ["x"], "url": "http://example.org"}', "application/json", (400, "malformed_request")),
        (b'{"images": ["***"]}', "application/json", (422, "undecodable_image")),
        (b'{"images": [' + b"0," * 10_000_000 + b"0]}", "application/json", (413, "too_many_images")),
        (b'{"images": [' + b'"",' * 10_000_000 + b'""]}', "application/json", (413, "too_many_images")),
        (b'{"images": ["x"]' + b',"":0' * 6_000_000 + b"}", "application/json", (413, "too_many_images")),
        (b"--y\r\n", "multipart/form-data; boundary=y; charset=undefined", (400, "malformed_request")),
        (b"--y" + b"\r\n--y" * 1000, "multipart/form-data; boundary=y", (413, "too_many_images")),
        (b"--y" + b"\r\n--yx" * 1000, "multipart/form-data; boundary=y", (413, "too_many_images")),
        (b"--x\r\n", "multipart/form-data; boundary=y", (400, "malformed_request")),
        (b"--y--\r\n", "multipart/form-data; boundary=y", (400, "malformed_request")),
        (b"x", "multipart/form-data", (400, "malformed_request")),
        (b"x", "text/plain", (415, "unsupported_media_type")),
        (b"%PDF-1.7", "application/octet-stream", (415, "unsupported_image")),
        (b"\xff\xd8\xff\xe0 not a jpeg", "image/jpeg", (422, "undecodable_image")),
    ],
)
def test_bad_bodies_get_a_problem_document(client, content, content_type, expected):
    assert problem(client.post("/classify", content=content, headers={"Content-Type": content_type})) == expected


@pytest.mark.parametrize("begin", [b'{"images": [', b" [", b'{"images": '])
def test_items_of_json_are_counted_before_they_are_made(client, begin):
    content = begin + b"[0]," * 100_000 + b"0]"
    response = client.post("/classify", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "too_many_images")


def test_an_error_repeats_no_more_than_the_begin_of_what_was_sent(client):
    response = client.post("/classify", json={"images": ["x"], "a" * 100_000: 1})
    assert response.status_code == 400
    assert len(response.content) < 1000


def test_a_form_is_not_parsed_where_that_could_take_long(client, samples):
    part = b'--y\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + samples[0].data
    for content, charset, reason in (
        (part + b"\r\n--y--\r\n", "punycode", "UTF-8"),
        (part + b"\r\n--y " + b" " * 1000 + b"\r\n", "utf-8", "padded"),
        (part + b"\r\n--y\r\nX:" + b" " * 1000 + b"x\r\n\r\n\r\n--y--\r\n", "utf-8", "padded"),
        (part + b":  \r\n--y--\r\n", "utf-8", None),  # in a picture it is none, nor in a name
        (part.replace(b'"a"', b'"10:  30"') + b"\r\n--y--\r\n", "utf-8", None),
        (part + b"\r\n--y--\r\n", "latin-1", None),
    ):
        headers = {"Content-Type": f"multipart/form-data; boundary=y; charset={charset}"}
        response = client.post("/classify", content=content, headers=headers)
        assert response.status_code == (400 if reason else 200)
        assert reason is None or reason in response.json()["detail"]


@pytest.mark.parametrize("images", [1, 2])
def test_a_form_that_is_cut_off_loses_no_image_in_silence(client, samples, images):
    part = b'--y\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + samples[0].data + b"\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=y"}
    for end in (b"", b"--y", b"--y-"):
        response = client.post("/classify", content=images * part + end, headers=headers)
        assert problem(response) == (400, "malformed_request")
        assert "ends before its last boundary" in response.json()["detail"]
    response = client.post("/classify", content=images * part + b"--y--", headers=headers)
    assert [prediction["label"] for prediction in response.json()["predictions"]] == [samples[0].label] * images


def test_a_form_field_that_is_no_file_is_named(client):
    response = client.post("/classify", data={"note": "hi"}, files={"images": ("a.png", b"x")})
    assert problem(response) == (400, "malformed_request")
    assert "must be a file" in response.json()["detail"]


@pytest.mark.parametrize(
    ("parameters", "headers"),
    [({"top_k": 0}, {}), ({"top_k": "many"}, {}), ({"explain": "perhaps"}, {}), ({}, {"X-Deadline-Ms": "0"})],
)
def test_parameters_out_of_range(client, samples, parameters, headers):
    response = client.post("/classify", content=samples[0].data, headers={**WEBP, **headers}, params=parameters)
    assert problem(response) == (422, "invalid_parameter")


def test_a_path_with_a_lines_end_is_not_the_path_before_it(client, samples):
    for path in ("/classify%0A", "/v2/models/fast/infer%0A", "/livez%0A"):
        response = client.post(path, content=samples[0].data, headers={"Content-Type": "image/webp"})
        assert response.status_code == 404, path


def test_unknown_paths_and_methods_get_problem_documents_too(client):
    assert problem(client.get("/nothing")) == (404, "not_found")
    assert "no /nothing here" in client.get("/nothing").json()["detail"]
    wrong = client.get("/classify")
    assert problem(wrong) == (405, "method_not_allowed")
    assert wrong.json()["detail"] == "/classify takes POST, not GET"
    assert client.post("/").headers["Allow"] == "GET, HEAD"
    assert client.head("/livez").status_code == 405
    # no redirect: it would lead to whatever Host says, and out of TLS that ends before us
    assert problem(client.post("/classify/", headers={"Host": "evil.example"})) == (404, "not_found")


@pytest.fixture(scope="module")
def strict_client(strict_server):
    with httpx.Client(base_url=strict_server, timeout=60) as client:
        yield client


def test_limits_answer_413_and_name_the_setting(strict_client, samples, tmp_path):
    def code_and_detail(response: httpx.Response) -> tuple[int, str, str]:
        status, code = problem(response)
        return status, code, response.json()["detail"]

    status, code, detail = code_and_detail(strict_client.post("/classify", content=b"x" * 60_001, headers=WEBP))
    assert (status, code) == (413, "body_too_large")
    assert "CONVMIXER_MAX_BODY_BYTES" in detail
    assert "60,001" in detail
    large = strict_client.post("/classify", content=b"x" * 60_001, headers=WEBP)
    assert large.reason_phrase == large.json()["title"] == "Content Too Large"  # as RFC 9110 has it, whatever Python has
    empty = strict_client.post("/classify", content=b"\xff\xd8\xff\xe0 not a jpeg", headers=WEBP)
    assert empty.reason_phrase == empty.json()["title"] == "Unprocessable Content"

    chunks = (b"x" * 10_000 for _ in range(7))  # chunked: no Content-Length
    assert code_and_detail(strict_client.post("/classify", content=chunks, headers=WEBP))[:2] == (413, "body_too_large")

    three = [("images", (s.path.name, s.data)) for s in samples[:3]]
    status, code, detail = code_and_detail(strict_client.post("/classify", files=three))
    assert (status, code) == (413, "too_many_images")
    assert "CONVMIXER_MAX_IMAGES" in detail
    encoded = [base64.b64encode(s.data).decode() for s in samples[:3]]
    assert code_and_detail(strict_client.post("/classify", json={"images": encoded}))[:2] == (413, "too_many_images")

    for size, setting in (((101, 100), "CONVMIXER_MAX_PIXELS"), ((501, 1), "CONVMIXER_MAX_SIDE")):
        path = tmp_path / "big.png"
        Image.new("RGB", size).save(path)
        status, code, detail = code_and_detail(
            strict_client.post("/classify", content=path.read_bytes(), headers={"Content-Type": "image/png"})
        )
        assert (status, code) == (413, "image_too_large")
        assert setting in detail
    assert strict_client.post("/classify", content=samples[0].data, headers=WEBP).status_code == 200


def test_a_full_queue_answers_503_with_retry_after(strict_client, samples):
    two = [("images", (s.path.name, s.data)) for s in samples[:2]]
    response = strict_client.post("/classify", files=two)
    assert problem(response) == (503, "overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    assert strict_client.get("/readyz").status_code == 200


@pytest.fixture(scope="module")
def strict_server():
    limits = {"max_body_bytes": 60_000, "max_images": 2, "max_pixels": 10_000, "max_side": 500, "max_queue": 1}
    with ServerProcess(**limits, receive_timeout_s=0.5, workers=1) as server:
        yield server.wait_until_ready()


def slow_body(data: bytes, released):
    """Half of the body, and the rest only when `released` says so."""
    yield data[: len(data) // 2]
    released()
    yield data[len(data) // 2 :]


def outlast(url: str | httpx.URL) -> None:
    """Comes back when a deadline of a millisecond has passed for what the server was sent before."""
    httpx.get(httpx.URL(url).join("/livez"))  # the server has read it
    time.sleep(0.05)


def test_a_body_that_does_not_arrive_answers_408(strict_server):
    """The client stalls; the server, not the client, ends it."""
    host, _, port = strict_server.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nhalf")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "receive_timeout"


def test_a_deadline_that_passes_answers_504(client, samples):
    body = slow_body(samples[0].data, lambda: outlast(client.base_url))
    response = client.post("/classify", content=body, headers={**WEBP, "X-Deadline-Ms": "1"})
    assert problem(response) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({"max_deadline_ms": 1}, {"X-Deadline-Ms": "60000"}), ({"deadline_ms": 1}, {})],
    ids=["most", "default"],
)
def test_a_deadline_is_no_longer_than_the_service_allows(start, samples, settings, asked):
    url = start(**settings).wait_until_ready()
    data = samples[0].data
    for length in ({}, {"Content-Length": str(len(data))}):  # chunked, by the route; and by the short way
        body = slow_body(data, lambda: outlast(url))
        response = httpx.post(f"{url}/classify", content=body, headers=WEBP | asked | length)
        assert problem(response) == (504, "deadline_exceeded")
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    content = json.dumps({"inputs": [tensor], "parameters": {"timeout": 60_000_000} if asked else {}}).encode()
    response = httpx.post(f"{url}/v2/models/fast/infer", content=slow_body(content, lambda: outlast(url)))
    assert response.status_code == 504
    assert "deadline" in response.json()["error"]


def test_documentation_examples_are_true(client, repository: Path, samples):
    schema = client.get("/openapi.json").json()
    operation = schema["paths"]["/classify"]["post"]
    example = operation["responses"]["200"]["content"]["application/json"]["example"]
    photo = repository / "docs" / "images" / "cat.png"
    parameters = {"top_k": len(example["predictions"][0]["top_k"])}
    answer = client.post("/classify", content=photo.read_bytes(), headers={"Content-Type": "image/png"}, params=parameters).json()
    said, found = example["predictions"][0], answer["predictions"][0]
    assert example["model"] == answer["model"]
    assert set(example) == set(answer)
    assert set(said) == set(found)
    assert said["confidence"] == pytest.approx(found["confidence"], abs=0.01)
    assert [(e["label"], pytest.approx(e["probability"], abs=0.01)) for e in said["top_k"]] == [
        (e["label"], e["probability"]) for e in found["top_k"]
    ]
    assert {"400", "401", "408", "413", "415", "422", "431", "500", "503", "504"} < set(operation["responses"])
    assert client.get("/docs").status_code == 200


def test_the_openapi_document_has_the_headers_of_answers(client, samples):
    paths = client.get("/openapi.json").json()["paths"]
    classify_post, infer = paths["/classify"]["post"], paths["/v2/models/{model}/infer"]["post"]
    for status, name in (
        ("503", "Retry-After"),
        ("401", "WWW-Authenticate"),
        ("415", "Accept-Encoding"),
        ("200", "X-Request-ID"),
    ):
        assert name in classify_post["responses"][status]["headers"]
        assert name in infer["responses"][status]["headers"]
    assert "Inference-Header-Content-Length" in infer["responses"]["200"]["headers"]
    assert "Retry-After" not in paths["/readyz"]["get"]["responses"]["503"]["headers"], "a probe has none"
    assert list(paths["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    (deadline,) = (parameter["schema"] for parameter in classify_post["parameters"] if parameter["name"] == "x-deadline-ms")
    assert (deadline["type"], deadline["minimum"], deadline["maximum"]) == ("integer", 1, 3_600_000), "no header is null"


def test_every_reference_of_the_openapi_document_leads_somewhere(client):
    document = client.get("/openapi.json").json()
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)))
    assert "components/schemas/Prediction" in references
    for reference in references:
        part = document
        for key in reference.split("/"):
            part = part[key]
