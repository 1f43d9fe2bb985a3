"""Who may ask what: API keys, the metrics' own port, origins, and which model files are taken."""

from __future__ import annotations

import hashlib
import shutil
import socket

import httpx
import onnx
import pytest
from onnx import external_data_helper
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from benchmarks.server import ServerProcess, free_port

WEBP = {"Content-Type": "image/webp"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("from-file\n\n", encoding="utf-8-sig")  # with the mark of some editors
    with ServerProcess(api_keys="first, second", api_keys_file=path) as server:
        yield server.wait_until_ready()
    assert "first" not in server.log


@pytest.mark.parametrize("content_type", [WEBP, FORM, {"Content-Type": "application/json"}])
@pytest.mark.parametrize("sent", ["", "Bearer wrong", "Bearer", "Basic first", "Bearer firs", "Bearer first2"])
def test_without_a_key_nothing_is_classified(keyed, samples, content_type, sent):
    headers = {**content_type, **({"Authorization": sent} if sent else {})}
    response = httpx.post(f"{keyed}/classify", content=samples[0].data, headers=headers)
    assert response.status_code == 401
    # that one was wrong is told only who has sent one (RFC 6750, 3.1)
    wrong = sent.startswith("Bearer ")
    assert response.headers["WWW-Authenticate"] == ('Bearer error="invalid_token"' if wrong else "Bearer")
    assert ("none of this service's" if wrong else "send `Authorization: Bearer KEY`") in response.json()["detail"]
    assert response.json()["code"] == "unauthorized"


@pytest.mark.parametrize("key", ["first", "second", "from-file"])
def test_any_of_the_keys_opens_and_probes_need_none(keyed, samples, key):
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.post(f"{keyed}/classify", content=samples[0].data, headers=WEBP | headers).status_code == 200
    assert httpx.post(f"{keyed}/classify", files={"images": samples[0].data}, headers=headers).status_code == 200
    assert httpx.get(f"{keyed}/readyz").status_code == 200


def test_the_document_says_where_a_key_may_be_sent(keyed):
    document = httpx.get(f"{keyed}/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    asks = {
        (method, path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if {"key": []} in operation.get("security", [])
    }
    assert {("post", "/classify"), ("post", "/v2/models/{model}/infer"), ("get", "/v2/models/stats")} <= asks
    for method, path in asks:
        assert httpx.request(method, keyed + path, content=b"x").status_code == 401
    for path in ("/livez", "/readyz", "/model", "/v2", "/v2/health/ready", "/metrics"):
        assert ("get", path) not in asks
        assert httpx.get(keyed + path).status_code == 200


def test_below_a_prefix_keys_are_asked_for_too(samples):
    """As Ray Serve's `route_prefix` has it: a path with the prefix, which the router then leaves out."""
    settings = Settings(api_keys="first", workers=1, max_batch=1)
    with TestClient(create_app(settings), root_path="/below") as client:
        for path in ("/classify", "/below/classify", "/v2/models/fast"):
            answer = client.post(f"/below{path}", content=samples[0].data, headers=WEBP)
            assert answer.status_code == (404 if path == "/below/classify" else 401), path
        answer = client.post("/below/classify", content=samples[0].data, headers=WEBP | {"Authorization": "Bearer first"})
        assert answer.json()["predictions"][0]["label"] == samples[0].label
        assert client.get("/below", follow_redirects=False).headers["location"] == "below/", "where the page's own links lead on"
        assert client.get("/below/card/", follow_redirects=False).status_code == 404
        assert "error" in client.get("/below/v2/nothing").json(), "the protocol's form of failures"
        assert 'convmixer_requests_total{status="401"} 1.0' in client.get("/below/metrics").text


def test_an_empty_key_file_does_not_open_the_service(start, tmp_path):
    (tmp_path / "keys").write_text("\n")
    server = start(api_keys_file=tmp_path / "keys")
    assert server.wait() == 1
    assert "holds no key" in server.log
    server = start(api_keys_file=tmp_path / "nowhere")
    assert server.wait() == 1
    assert "CONVMIXER_API_KEYS_FILE" in server.log


def test_metrics_on_a_port_of_their_own(start, samples):
    port = free_port()
    url = start(metrics_port=port).wait_until_ready()
    assert httpx.post(f"{url}/classify", content=samples[0].data, headers=WEBP).status_code == 200
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert "convmixer_images_total 1.0" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    taken = start(metrics_port=port)
    assert taken.wait() == 3
    assert "CONVMIXER_METRICS_PORT" in taken.log


def test_other_origins_only_if_set(start, base_url, samples):
    origin = {"Origin": "https://shop.example"}
    for url, allowed in ((base_url, None), (start(cors_origins="https://shop.example").wait_until_ready(), origin["Origin"])):
        response = httpx.post(f"{url}/classify", content=samples[0].data, headers=WEBP | origin)
        assert response.status_code == 200
        assert response.headers.get("Access-Control-Allow-Origin") == allowed


def test_a_page_of_an_allowed_origin_may_send_a_key_and_read_refusals(start, samples):
    url = start(cors_origins="https://shop.example", api_keys="secret").wait_until_ready()
    origin = {"Origin": "https://shop.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = httpx.options(f"{url}/classify", headers=origin | asked)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == origin["Origin"]
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"]
    assert preflight.headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST"
    for key, status in (("secret", 200), ("guess", 401)):
        headers = WEBP | origin | {"Authorization": f"Bearer {key}"}
        response = httpx.post(f"{url}/classify", content=samples[0].data, headers=headers)
        assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (status, origin["Origin"])
        assert {"X-Request-ID", "Retry-After"} <= set(response.headers["Access-Control-Expose-Headers"].split(", "))
        assert "Access-Control-Allow-Credentials" not in response.headers
    stranger = httpx.options(f"{url}/classify", headers={"Origin": "https://other.example"} | asked)
    assert stranger.status_code == 400
    assert "Access-Control-Allow-Origin" not in stranger.headers


@pytest.mark.parametrize("origins", ["https://shop.example", "https://one.example, https://shop.example", "*"])
def test_what_the_connection_itself_refuses_may_be_read_by_pages_too(start, origins):
    url = httpx.URL(start(cors_origins=origins, receive_timeout_s=1).wait_until_ready())
    for lines, status in (
        (b"Host: x\r\nHost: y\r\nOrigin: https://shop.example\r\n\r\n", 400),
        (b"Host: x\r\nOrigin: https://shop.example\r\n" + b"X-A: b\r\n" * 102 + b"\r\n", 431),
        (b"Host: x\r\nOrigin: https://shop.example\r\nX-A", 408),  # a header has come when the next one begins
        (b"Host: x\r\nOrigin: https://shop.example\r\nContent-Length: 9\r\nContent-Type: application/json\r\n\r\n", 408),
        (b"Host: x\r\nOrigin: https://other.example\r\n" + b"X-A: b\r\n" * 102, 431),
        (b"Host: x\r\n" + b"X-A: b\r\n" * 102, 431),
    ):
        with socket.create_connection((url.host, url.port), timeout=60) as connection:
            connection.sendall(b"POST /classify HTTP/1.1\r\n" + lines)
            head = connection.makefile("rb").read().partition(b"\r\n\r\n")[0].decode()
        assert head.startswith(f"HTTP/1.1 {status} ")
        said = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:])
        asked = lines.partition(b"Origin: ")[2].partition(b"\r\n")[0].decode()
        if "*" in origins:
            allowed = "*"
        elif asked:
            allowed = asked if asked in origins else None
        else:  # it might still have come
            allowed = origins if "," not in origins else None
        assert said.get("access-control-allow-origin") == allowed
        assert ("x-request-id" in said.get("access-control-expose-headers", "")) is (allowed is not None)
        assert said.get("vary") == (None if "*" in origins else "origin")


def refused(start, path) -> str:
    server = start(model=path)
    assert server.wait() == 3
    assert "Traceback" not in server.log
    return server.log


def with_sum(path):
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_link_out_of_its_folder_is_refused_and_one_within_is_not(start, artifact_path, tmp_path):
    inside, outside = tmp_path / "models", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    shutil.copy(artifact_path, outside / "fast.onnx")
    (inside / "fast.onnx").symlink_to(outside / "fast.onnx")
    assert "link out of its folder" in refused(start, with_sum(inside / "fast.onnx"))
    # as Kubernetes mounts a ConfigMap
    (inside / "..data").mkdir()
    shutil.copy(artifact_path, inside / "..data" / "good.onnx")
    (inside / "good.onnx").symlink_to(inside / "..data" / "good.onnx")
    start(model=with_sum(inside / "good.onnx")).wait_until_ready()


def test_weights_outside_the_file_unknown_operators_and_missing_metadata_are_refused(start, artifact_path, tmp_path):
    external = onnx.load(artifact_path)
    external_data_helper.convert_model_to_external_data(external, location="weights.bin", size_threshold=0)
    onnx.save(external, tmp_path / "external.onnx")
    assert "cannot be loaded by onnxruntime" in refused(start, with_sum(tmp_path / "external.onnx"))

    custom = onnx.load(artifact_path)
    custom.graph.node[-1].domain = "com.stranger"
    custom.opset_import.add(domain="com.stranger", version=1)
    onnx.save(custom, tmp_path / "custom.onnx")
    assert "cannot be loaded by onnxruntime" in refused(start, with_sum(tmp_path / "custom.onnx"))

    bare = onnx.load(artifact_path)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    assert "no 'convmixer' metadata" in refused(start, with_sum(tmp_path / "bare.onnx"))
