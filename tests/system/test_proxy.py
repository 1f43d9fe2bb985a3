"""Two replicas behind the real HAProxy with the real configuration."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import tritonclient.http as triton
import uvicorn
from tritonclient.utils import InferenceServerException

from app.client import Client
from app.load import Tally, prepare
from app.settings import Settings
from benchmarks.clients import closed_loop
from deploy.rolling_update import replicas_up
from tests.waiting import wait_until
from tests.wire import metric
from torture.rolling import CONFIGURATION, Cluster
from torture.target import post
from torture.traffic import expected_labels

TEXT = CONFIGURATION.read_text()
WEBP = {"Content-Type": "image/webp"}
with_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed (Debian: apt install haproxy)")


def default(name: str) -> float:
    return Settings.model_fields[name].default


def test_its_limits_are_the_services():
    assert int(re.search(r"timeout http-request (\d+)s", TEXT)[1]) < default("receive_timeout_s")
    assert int(re.search(r"wait-for-body time (\d+)s", TEXT)[1]) == default("receive_timeout_s")
    assert int(re.search(r"timeout http-keep-alive (\d+)s", TEXT)[1]) == uvicorn.Config("app").timeout_keep_alive
    assert int(re.search(r"default-server .* maxconn (\d+)", TEXT)[1]) < default("max_connections")
    assert int(re.search(r":\$\{REPLICA_PORT-(\d+)\}", TEXT)[1]) == default("port")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(2)
    yield cluster
    cluster.stop()


@pytest.fixture
def proxy(cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{cluster.port}", timeout=60) as client:
        yield client


@with_haproxy
def test_a_request_id_goes_through_and_one_is_made_where_it_is_missing_or_unfit(proxy, samples):
    answer = proxy.post("/classify", content=samples[0].data, headers=WEBP | {"X-Request-ID": "from-me.1"})
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "from-me.1"
    for sent in ({}, {"X-Request-ID": "not fit"}):
        answer = proxy.post("/classify", content=samples[0].data, headers=WEBP | sent)
        assert re.fullmatch(r"[0-9a-f-]{36}", answer.json()["request_id"])


@with_haproxy
@pytest.mark.parametrize("path", ["/metrics", "/%6detrics", "/%6D%65trics/", "/metrics?x=1", "/metrics/../metrics"])
def test_metrics_are_not_for_outsiders(cluster, path):
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"convmixer_" not in answer


@with_haproxy
def test_a_file_that_is_too_large_is_refused_in_its_place(cluster, samples):
    large = bytes(int(default("max_body_bytes")) + 1_000_000)
    images = [samples[0].data, large, samples[0].data]
    with Client(f"http://127.0.0.1:{cluster.port}", batch_size=1) as client:
        before, refused, after = client.classify_many(images)
    assert refused.code == "body_too_large"
    assert before.label == after.label == samples[0].label


@with_haproxy
def test_what_it_refuses_itself_is_a_problem_document(proxy):
    answer = proxy.get("/metrics")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")
    assert answer.json() | {"request_id": ""} == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "Not Found",
        "error": "Not Found",
        "code": "not_found",
        "request_id": "",
    }


@with_haproxy
def test_bytes_that_are_no_request_reach_no_replica(cluster):
    """HAProxy's parser answers with a page of its own, whatever `http-error` says."""
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"problem+json" not in answer


class EndsInTheMiddle(BaseHTTPRequestHandler):
    """A replica that is well, and breaks each request off."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-")
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@with_haproxy
def test_what_a_replica_breaks_off_is_told_so():
    cluster = Cluster(0)
    try:
        with ThreadingHTTPServer(("127.0.0.1", cluster.settings["port"]), EndsInTheMiddle) as replica:
            threading.Thread(target=replica.serve_forever).start()
            try:
                cluster.addresses.append("127.0.0.1")  # for the name server
                wait_until(lambda: replicas_up(cluster.operators) == 1)
                answer = httpx.post(f"http://127.0.0.1:{cluster.port}/classify", content=b"image", headers=WEBP, timeout=60)
            finally:
                replica.shutdown()
        assert (answer.status_code, answer.json()["code"]) == (502, "bad_gateway")
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
    finally:
        cluster.stop()


@with_haproxy
def test_without_a_replica_clients_of_either_protocol_are_told_why():
    cluster = Cluster(0)
    try:
        url = f"127.0.0.1:{cluster.port}"
        answer = httpx.post(f"http://{url}/classify", content=b"image", headers=WEBP)
        assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "not_serving", "1")
        with triton.InferenceServerClient(url) as client, pytest.raises(InferenceServerException) as failure:
            client.get_model_metadata("fast")
        assert failure.value.message() == answer.json()["detail"]
    finally:
        cluster.stop()


@with_haproxy
def test_a_body_that_crawls_in_occupies_no_replica(cluster, samples):
    def sessions() -> int:
        rows = csv.DictReader(httpx.get(f"http://{cluster.operators}/;csv").text.removeprefix("# ").splitlines())
        return sum(int(row["scur"]) for row in rows if row["pxname"] == "replicas" and row["svname"] == "BACKEND")

    wire = post(samples[0].data, "image/webp", close=True)
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=30) as connection:
        connection.sendall(wire[:-1])
        assert sessions() == 0
        connection.sendall(wire[-1:])
        assert connection.recv(12) == b"HTTP/1.1 200"


def wait_for_more(cluster: Cluster, index: int) -> None:
    """Until a replica has classified 100 more images than it has now."""

    url = f"http://{cluster.addresses[index]}:{cluster.settings['port']}"

    def images() -> float:
        return metric(httpx.get(f"{url}/metrics").text, "convmixer_images_total")

    enough = images() + 100
    wait_until(lambda: images() >= enough)


@with_haproxy
def test_a_replica_that_leaves_and_one_that_is_killed_cost_no_request(cluster, samples):
    """One is told to stop and replaced, then the other is killed: its requests are repeated."""
    bodies = [sample.data for sample in samples[:20]]
    labels = expected_labels(cluster.port, bodies)
    requests = [prepare(body, "image/webp", [label]) for body, label in zip(bodies, labels, strict=True)]
    killed = threading.Event()

    def load() -> list[Tally]:
        """Until well after the kill."""
        tallies = []
        while not killed.is_set():
            tallies.append(closed_loop(cluster.port, requests, 4, 4))
        return tallies

    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load)
        try:
            assert cluster.restart(0) == 0
            wait_for_more(cluster, 1)  # it is in the middle of some load
            cluster.replicas[1].process.send_signal(signal.SIGKILL)
            wait_for_more(cluster, 0)
        finally:
            killed.set()
        tallies = loaded.result()
    assert all(len(tally.right) == tally.sent > 0 for tally in tallies)
    assert not any(tally.lost for tally in tallies)
