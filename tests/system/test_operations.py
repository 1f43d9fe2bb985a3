"""What operators rely on: start, refusal to start, probes, metrics, stop."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import onnxruntime
import pytest

from app.cores import available_cores
from benchmarks.server import ServerProcess
from tests.broken_model import write_broken_model
from tests.png import png
from tests.waiting import wait_until
from tests.wire import answers, classify_request, connect, metric

WEBP = {"Content-Type": "image/webp"}
WITH_OPENVINO = pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers(), reason="the [openvino] extra is not installed"
)


def test_probes_and_model_card(client):
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    card = client.get("/model").json()
    assert card["provider"] == "cpu"
    assert card["workers"] >= 1
    assert card["input_size"] == 32
    assert len(card["classes"]) == 10
    assert card["metadata"]["parity"]["top1_equal"] == card["metadata"]["parity"]["images"]


def test_metrics_count_what_happened(client, samples):
    def value(name: str) -> float:
        return metric(client.get("/metrics").text, name)

    names = [
        "convmixer_images_total",
        'convmixer_requests_total{status="200"}',
        'convmixer_failures_total{code="unsupported_image"}',
    ]
    before = [value(name) for name in names]
    files = [("images", (s.path.name, s.data)) for s in samples[:3]] + [("images", ("x", b"x"))]
    assert client.post("/classify", files=files).status_code == 200
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == [3, 1, 1]
    assert value("convmixer_engine_alive") == 1
    assert value("convmixer_queue_depth") == 0


def test_sigterm_finishes_open_requests_and_exits_with_0(start, samples):
    server = start()
    url = server.wait_until_ready()
    wire = classify_request(samples[0].data)
    with connect(url) as connection:
        connection.sendall(wire[:-1])
        httpx.get(f"{url}/livez")  # the server has read what was sent before
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Shutting down" in server.log)
        connection.sendall(wire[-1:])
        assert [status for status, _, _ in answers(connection)] == [200]
    assert server.wait() == 0
    assert "Traceback" not in server.log


def test_an_upload_that_never_ends_does_not_hold_up_the_end(start):
    server = start(receive_timeout_s=2, drain_timeout_s=600)
    url = server.wait_until_ready()
    with connect(url) as connection:
        connection.sendall(classify_request(bytes(100))[:-96])
        httpx.get(f"{url}/livez")  # the server has read what was sent before
        server.process.send_signal(signal.SIGTERM)
        assert [status for status, _, _ in answers(connection)] == [408]
    assert server.wait() == 0


def test_what_still_owes_the_rest_after_its_answer_does_not_hold_up_the_end(start):
    server = start(drain_timeout_s=600, receive_timeout_s=600)
    with connect(server.wait_until_ready()) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhas")
        assert connection.recv(12) == b"HTTP/1.1 200"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.parametrize("case", ["half an image", "half a form", "a form in the queue"])
def test_what_is_late_for_the_end_is_told_so(start, case):
    server = start(drain_timeout_s=2, workers=1, max_batch=1, max_pixels=100_000_000, max_side=10_000)
    url = server.wait_until_ready()
    picture = png("black", (9900, 9900))
    body, content_type = picture, "image/png"
    if "form" in case:
        part = b'--b\r\nContent-Disposition: form-data; name="x"; filename="x"\r\n\r\n' + body + b"\r\n"
        body, content_type = part * 16 + b"--b--\r\n", "multipart/form-data; boundary=b"
    head = f"POST /classify HTTP/1.1\r\nHost: x\r\nX-Deadline-Ms: 60000\r\nContent-Type: {content_type}\r\n"
    wire = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(url) as connection:
        connection.sendall(wire[:-10] if "half" in case else wire)
        if "queue" in case:
            wait_until(lambda: "convmixer_busy_workers 1.0" in httpx.get(f"{url}/metrics").text)
        httpx.get(f"{url}/livez")  # the server has read what was sent before
        server.process.send_signal(signal.SIGTERM)
        assert [(status, body["code"]) for status, _, body in answers(connection)] == [(503, "not_serving")]
    assert server.wait() == 0
    assert "Traceback" not in server.log


def test_a_load_balancer_learns_of_the_end_while_requests_are_still_answered(start, samples):
    server = start(shutdown_delay_s=3)
    url = server.wait_until_ready()
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{url}/readyz").status_code != 200)
    assert httpx.get(f"{url}/readyz").json()["reason"] == "draining"
    assert httpx.get(f"{url}/livez").status_code == 200
    assert httpx.post(f"{url}/classify", content=samples[0].data, headers=WEBP).status_code == 200
    assert "Shutting down" not in server.log
    assert server.wait() == 0


@pytest.mark.parametrize("delay_s", [0, 60])
def test_who_keeps_a_connection_is_told_that_it_ends(start, samples, delay_s):
    """A request that was sent before its client could know of the end is answered: else each lost one in flight."""
    server = start(shutdown_delay_s=delay_s)
    url = server.wait_until_ready()
    wires = [classify_request(samples[0].data), b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"]
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(url)) for _ in wires]
        for connection, wire in zip(connections, wires, strict=True):
            for _ in range(3):  # the head has come before, and is known
                connection.sendall(wire)
                status, head, _ = next(answers(connection))
                assert (status, b"connection: close" in head.lower()) == (200, False)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503 if delay_s else "Shutting down" in server.log)
        for connection, wire in zip(connections, wires, strict=True):
            connection.sendall(wire)
            ((status, head, _),) = answers(connection)  # to the connection's end
            assert (status, b"connection: close" in head.lower()) == (200, True)
    if delay_s:
        server.process.send_signal(signal.SIGINT)  # it need not wait any longer
    assert server.wait() == 0


def refuses_to_start(server, code: int = 3) -> str:
    """Its log; what ends with 1, a wrong setting, or with 3 would fail in the same way again (docs/settings.md)."""
    assert server.wait() == code
    assert "Uvicorn running" not in server.log
    assert "Traceback" not in server.log, server.log
    return server.log


def test_memory_of_large_pictures_is_given_back(start, samples):
    server = start(workers=2, max_batch=2)
    picture = png("black", (3000, 2000))  # 23 MiB when decoded
    with httpx.Client(base_url=server.wait_until_ready()) as client:
        for sample in samples[:20]:
            client.post("/classify", content=sample.data, headers=WEBP)
        before = server.memory_mib()
        for _ in range(8):
            answer = client.post("/classify", content=picture, headers={"Content-Type": "image/png"})
            assert answer.status_code == 200
        assert server.memory_mib() < before + 12


def test_memory_of_a_busy_hour_is_given_back_when_idle(start, samples):
    server = start(workers=2, max_batch=8, deadline_ms=60_000)
    form = [("images", ("x.webp", sample.data, "image/webp")) for sample in samples[:64]]
    with httpx.Client(base_url=server.wait_until_ready(), timeout=60) as client:
        for _ in range(4):
            assert client.post("/classify?explain=true", files=form).status_code == 200
        busy = server.memory_mib()
        # what two workers' batches of 8 need, less noise
        wait_until(lambda: server.memory_mib() <= busy - 12, lambda: f"{busy:.0f} MiB after load, now {server.memory_mib():.0f}")
        assert client.post("/classify", content=samples[0].data, headers=WEBP).status_code == 200


def test_a_tampered_artifact_is_refused(start, artifact_path, tmp_path):
    copy = tmp_path / "fast.onnx"
    content = bytearray(artifact_path.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    shutil.copy(artifact_path.with_name("fast.onnx.sha256"), tmp_path)
    assert "SHA-256" in refuses_to_start(start(model=copy))


def test_an_artifact_without_hash_or_of_another_kind_is_refused(start, tmp_path):
    stranger = tmp_path / "stranger.onnx"
    assert "cannot be read" in refuses_to_start(start(model=stranger))
    stranger.write_bytes(b"not onnx")
    assert "no hash" in refuses_to_start(start(model=stranger))
    digest = hashlib.sha256(b"not onnx").hexdigest()
    assert "cannot be loaded by onnxruntime" in refuses_to_start(start(model=stranger, model_sha256=digest))


def test_a_model_that_fails_is_told_image_by_image_and_then_ends_the_process(start, artifact_path, samples, tmp_path):
    model, white = tmp_path / "broken.onnx", png("white", (32, 32))
    write_broken_model(artifact_path, "logits", model)
    server = start(model=model, coalesce=0)
    with httpx.Client(base_url=server.wait_until_ready(), timeout=60) as client:
        response = client.post("/classify", files=[("images", samples[0].data), ("images", white)])
        assert response.status_code == 200
        good, bad = response.json()["predictions"]
        assert (good["label"], bad["error"]["code"]) == (samples[0].label, "inference_failed")
        response = client.post("/classify", files=[("images", white)] * 32)
        assert (response.status_code, response.json()["code"]) == (500, "inference_failed")
    assert server.wait() == 70
    assert re.search("failed on the last 3[23] images", server.log), server.log  # one of the first request may be among them


def test_settings_that_contradict_each_other_are_named(start):
    usable = available_cores()
    server = start(max_queue=64, max_held_bytes=1_000_000, max_deadline_ms=4000, cores=usable + 1)
    server.wait_until_ready()
    assert "CONVMIXER_MAX_IMAGES=128 is more than CONVMIXER_MAX_QUEUE=64" in server.log
    assert "is more than CONVMIXER_MAX_HELD_BYTES=1000000" in server.log
    assert "CONVMIXER_DEADLINE_MS=5000 is more than CONVMIXER_MAX_DEADLINE_MS=4000" in server.log
    assert f"CONVMIXER_CORES={usable + 1}, but this process may use {usable}" in server.log


def test_on_one_core_there_is_one_worker(start, samples):
    with httpx.Client(base_url=start(cores=1).wait_until_ready(), timeout=60) as client:
        assert client.get("/model").json()["workers"] == 1
        prediction = client.post("/classify", content=samples[0].data, headers=WEBP).json()["predictions"][0]
        assert prediction["label"] == samples[0].label


def test_unknown_and_bad_settings_are_refused(start):
    assert "CONVMIXER_MAX_BODY" in refuses_to_start(start(max_body="1"), code=1)
    assert "CONVMIXER_PORT" in refuses_to_start(start(port="http"), code=1)


@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("openvino", "OpenVINO")])
def test_asking_for_a_provider_without_it_is_refused(start, provider, name):
    if f"{name}ExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {name}")
    log = refuses_to_start(start(provider=provider))
    assert f"no {name} provider" in log
    assert f"[{provider}]" in log


def test_a_precision_that_the_provider_lacks_is_refused(start):
    log = refuses_to_start(start(provider="cpu", precision="bf16"))
    assert "CONVMIXER_PRECISION=bf16 is for CONVMIXER_PROVIDER=openvino" in log


@WITH_OPENVINO
def test_openvino_answers_what_the_cpu_answers(start, samples):
    urls = {provider: start(provider=provider).wait_until_ready() for provider in ("cpu", "openvino")}
    assert httpx.get(f"{urls['openvino']}/model").json()["provider"] == "openvino"
    for sample in samples[::20]:
        cpu, openvino = (httpx.post(f"{url}/classify", content=sample.data).json()["predictions"][0] for url in urls.values())
        assert openvino["label"] == cpu["label"]
        assert openvino["confidence"] == pytest.approx(cpu["confidence"], abs=1e-4)


@WITH_OPENVINO
def test_bf16_rounds_or_is_refused(start, samples):
    server = start(provider="openvino", precision="bf16")
    if re.search(r"\bavx512_bf16\b|\bamx_bf16\b", Path("/proc/cpuinfo").read_text()):
        prediction = httpx.post(f"{server.wait_until_ready()}/classify", content=samples[0].data).json()["predictions"][0]
        assert prediction["label"] == samples[0].label
    else:
        assert "set CONVMIXER_PRECISION=f32" in refuses_to_start(server)


def test_a_port_in_use_is_refused(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refuses_to_start(start(port=port))
        told_by_several = refuses_to_start(start(port=port, processes=2))
    assert "address already in use" in told
    assert f"the service does not start: cannot listen on 127.0.0.1:{port}" in told
    assert f"the service does not start: cannot listen on 127.0.0.1:{port}" in told_by_several
    told = refuses_to_start(start(port=port, metrics_port=port), code=1)
    assert f"CONVMIXER_METRICS_PORT={port} is CONVMIXER_PORT, too" in told


def test_a_wrong_command_line_ends_with_2():
    with ServerProcess(program=("-m", "app.cli", "serve", "--nonsense")) as server:
        assert server.wait() == 2
