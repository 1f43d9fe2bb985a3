"""What happens below the routes: pipelines, slow, silent and greedy clients. Raw sockets, because no client does this."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from PIL import Image

from benchmarks.server import ServerProcess, free_port
from tests.png import png
from tests.waiting import GIVE_UP_S, wait_until
from tests.wire import answers, classify_request, connect, metric

RECEIVE_TIMEOUT_S = 1
CLASSIFY = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
STALLING = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99\r\n\r\n--b\r\n"


def send_on_and_on(connection: socket.socket, data: bytes) -> None:
    """For as long as anybody waits for anything here; it is for the server to end this."""
    give_up = time.monotonic() + GIVE_UP_S
    while time.monotonic() < give_up:
        connection.sendall(data)


@pytest.fixture(scope="module")
def impatient() -> Iterator[str]:
    with ServerProcess(receive_timeout_s=RECEIVE_TIMEOUT_S, max_connections=8) as server:
        yield server.wait_until_ready()
    assert "Invalid HTTP request" not in server.log, "each has its line of the access log"
    assert "WebSocket" not in server.log


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with ServerProcess(api_keys="secret", max_body_bytes=1_000_000) as server:
        yield server.wait_until_ready()


def test_pipelined_requests_of_both_ways_are_answered_in_order(base_url, client, samples):
    chosen = [samples[0], samples[70], samples[130]]
    alone = [client.post("/classify", files={"images": s.data}).json()["predictions"][0]["label"] for s in chosen]
    raw = [classify_request(s.data, f"X-Request-ID: r{i}") for i, s in enumerate(chosen)]
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-ID: probe\r\n\r\n"
    with connect(base_url) as connection:
        connection.sendall(raw[0] + raw[1] + probe + raw[2] + probe.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = list(answers(connection))
    assert [status for status, _, _ in received] == [200] * 5
    assert [re.search(rb"x-request-id: (\S+)", head)[1] for _, head, _ in received] == [b"r0", b"r1", b"probe", b"r2", b"probe"]
    assert [body["predictions"][0]["label"] for _, _, body in received if "predictions" in body] == alone
    assert len(set(alone)) == 3


def test_requests_that_wait_on_one_connection_have_few_headers_together(base_url, samples):
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(89)) + b"\r\n"
    with connect(base_url) as connection:
        connection.sendall(classify_request(samples[0].data) + 20 * probe)
        received = list(answers(connection))  # ends, so it was closed
    assert [status for status, _, _ in received] == [200] * 5  # the fifth probe would be the 451st header


@pytest.mark.parametrize(
    ("headers", "version"), [(["Connection: close"], "1.1"), ([], "1.0"), (["Connection: keep-alive"], "1.0")]
)
def test_the_connection_is_closed_when_the_client_wants_it(base_url, samples, headers, version):
    with connect(base_url) as connection:
        connection.sendall(classify_request(samples[0].data, *headers, version=version))
        ((status, head, _),) = answers(connection)  # ends, so it was closed
    assert status == 200
    assert b"connection: close\r\n" in head


def test_requests_of_one_head_are_told_apart_by_their_images(base_url, client, samples):
    chosen = [samples[i] for i in (0, 70, 130, 3, 70)]
    alone = [client.post("/classify", files={"images": s.data}).json()["predictions"][0]["label"] for s in chosen]
    with connect(base_url) as connection:
        received = answers(connection)
        one_by_one = []
        for sample in chosen:
            connection.sendall(classify_request(sample.data))
            one_by_one.append(next(received))
    assert [status for status, _, _ in one_by_one] == [200] * 5
    assert [body["predictions"][0]["label"] for _, _, body in one_by_one] == alone
    assert len({body["request_id"] for _, _, body in one_by_one}) == 5


def test_the_limit_of_a_body_holds_for_a_head_that_has_come_before(start, samples):
    server = start(max_body_bytes=5000)
    with connect(server.wait_until_ready()) as connection:
        received = answers(connection)
        for _ in range(2):
            connection.sendall(classify_request(samples[0].data))
            assert next(received)[0] == 200
        server.process.send_signal(signal.SIGSTOP)  # so that all of it is there when it is read
        connection.sendall(classify_request(bytes(5001)))
        server.process.send_signal(signal.SIGCONT)
        status, _, body = next(received)
    assert (status, body["code"]) == (413, "body_too_large")


def test_lone_requests_and_those_that_come_at_once_get_their_own_answers(start, samples):
    """A request that comes alone is computed in the event loop, without a queue, unless the machine was slow just before."""
    server = start(coalesce="false")
    url = server.wait_until_ready()
    buffer = io.BytesIO()
    with Image.open(samples[0].path) as image:
        image.resize((320, 320)).save(buffer, "PNG")
    with httpx.Client(base_url=url, headers={"Content-Type": "image/webp"}) as client:

        def ask(data: bytes, **headers: str) -> httpx.Response:
            return client.post("/classify", content=data, headers=headers)

        wait_until(lambda: "queue;dur=0.00," in ask(samples[0].data).headers["Server-Timing"])
        assert ask(buffer.getvalue(), **{"Content-Type": "image/png"}).status_code == 200
        expected = [ask(sample.data).json()["predictions"][0]["top_k"] for sample in samples[:40]]
        assert ask(b"RIFF\0\0\0\0WEBP").status_code == 415
        with ExitStack() as stack:
            connections = [stack.enter_context(connect(url)) for _ in expected]
            server.process.send_signal(signal.SIGSTOP)  # so that all have come when it looks
            for connection, sample in zip(connections, samples, strict=False):
                connection.sendall(classify_request(sample.data, "Connection: close"))
            server.process.send_signal(signal.SIGCONT)
            found = [next(answers(connection)) for connection in connections]
    for (status, _, answer), one in zip(found, expected, strict=True):
        assert status == 200
        assert [e["label"] for e in answer["predictions"][0]["top_k"]] == [e["label"] for e in one]
        assert answer["predictions"][0]["top_k"][0]["probability"] == pytest.approx(one[0]["probability"], abs=1e-3)


def _two_lengths(data: bytes) -> bytes:
    return classify_request(data, f"Content-Length: {len(data) + 1}")


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        (lambda wire, data: [wire], 200, None),
        (lambda wire, data: [wire[:20], wire[20:-100], wire[-100:]], 200, None),
        (lambda wire, data: [wire.replace(b"Content-Length: ", b"Content-Length: 0")], 200, None),
        (lambda wire, data: [wire.replace(b"/classify", b"/classify?top_k=0")], 422, "invalid_parameter"),
        (lambda wire, data: [wire.replace(b"/classify", b"/unknowns")], 404, "not_found"),
        (lambda wire, data: [wire.replace(b"Content-Length: ", b"Content-Length: -")], 400, "malformed_request"),
        (
            lambda wire, data: [wire.replace(b"Content-Length: ", b"Content-Length: 99999999999999999999")],
            400,
            "malformed_request",
        ),
        (lambda wire, data: [_two_lengths(data)], 400, "malformed_request"),
        (lambda wire, data: [classify_request(b"")], 422, "undecodable_image"),
        (lambda wire, data: [classify_request(b"no image\r\n\r\nat all")], 415, "unsupported_image"),
    ],
)
def test_a_head_that_came_before_vouches_for_nothing_but_itself(base_url, samples, pieces, status, code):
    wire = classify_request(samples[0].data)
    with connect(base_url) as connection:
        received = answers(connection)
        for _ in range(2):
            connection.sendall(wire)
            assert next(received)[0] == 200
        for piece in pieces(classify_request(samples[70].data), samples[70].data):
            connection.sendall(piece)
        found, _, body = next(received)
    assert (found, body.get("code")) == (status, code)


def test_an_empty_line_between_requests_is_no_request_and_silence_ends_the_connection(impatient, samples):
    wire = classify_request(samples[0].data)
    with connect(impatient) as connection:
        received = answers(connection)
        for before in (b"", b"", b"\r\n", b""):
            connection.sendall(before)
            connection.sendall(wire)
            assert next(received)[0] == 200
        connection.sendall(b"\r\n")
        assert list(received) == [], "closed without a word, neither early nor never"


def test_a_request_in_work_is_no_idle_connection_whatever_follows_it(impatient):
    large = png("black", (6000, 4000))
    with ExitStack() as others, connect(impatient) as busy:
        busy.sendall(classify_request(large, "X-Deadline-Ms: 60000") + b"POST /cl")
        for _ in range(8):
            others.enter_context(connect(impatient))
        status, _, _ = next(answers(busy))
    assert status == 200


def test_a_refused_request_is_counted_once_and_holds_nothing_when_its_client_leaves(start, samples):
    base_url = start().wait_until_ready()
    wire = classify_request(samples[0].data, "X-Deadline-Ms: 1")
    for _ in range(3):
        with connect(base_url) as connection:
            connection.sendall(wire[:-50])
            httpx.get(f"{base_url}/livez")  # the server has read what was sent before
            time.sleep(0.05)  # the deadline passes
            connection.sendall(wire[-50:])
            assert next(answers(connection))[0] == 504
    metrics = httpx.get(f"{base_url}/metrics").text
    assert 'convmixer_requests_total{status="504"} 3.0' in metrics
    assert "convmixer_held_bytes 0.0" in metrics


def test_requests_of_one_head_may_be_pipelined_and_may_end_in_the_middle(base_url, client, samples):
    chosen = [samples[0], samples[70], samples[130]]
    alone = [client.post("/classify", files={"images": s.data}).json()["predictions"][0]["label"] for s in chosen]
    first, second, third = (classify_request(s.data) for s in chosen)
    with connect(base_url) as connection:
        received = answers(connection)
        connection.sendall(first)
        labels = [next(received)[2]["predictions"][0]["label"]]
        connection.sendall(second + third[:50])
        labels.append(next(received)[2]["predictions"][0]["label"])
        connection.sendall(third[50:])
        labels.append(next(received)[2]["predictions"][0]["label"])
    assert labels == alone


def test_an_image_may_arrive_in_any_pieces(base_url, samples):
    wire = classify_request(samples[7].data, "Connection: close")
    with connect(base_url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(wire)):
            connection.sendall(wire[i : i + 1])
        ((status, _, body),) = answers(connection)
    assert (status, body["predictions"][0]["label"]) == (200, samples[7].label)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01 this is TLS", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 102, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 40_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 33_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /livez?" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "headers_too_large"),
        (b"GET /livez?" + b"a" * 33_000 + b" HTTP/1.0\r\n\r\n", 431, "headers_too_large"),
        (b"GET /livez\r\n\r\n", 400, "malformed_request"),
        (b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nX-A: ", 408, "receive_timeout"),
        (CLASSIFY + b"Content-Type: image/png\r\nContent-Length: 100\r\n\r\nhalf", 408, "receive_timeout"),
        (CLASSIFY + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{", 408, "receive_timeout"),
        (
            CLASSIFY + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n",
            408,
            "receive_timeout",
        ),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "malformed_request"),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "malformed_request"),
        (b"GET /livez HTTP/1.1\r\nHost: x y/z\r\n\r\n", 400, "malformed_request"),
        (CLASSIFY + b"Content-Type: image/png\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\nx\r\n", 400, "malformed_request"),
        (b"POST /classify HTTP/1.1\r\nContent-Type: image/png\r\nContent-Length: 1\r\n\r\nx", 400, "malformed_request"),
    ],
)
def test_what_is_no_request_or_never_ends_gets_a_problem_and_the_connection_is_closed(impatient, sent, status, code):
    with connect(impatient) as connection:
        connection.sendall(sent)
        ((got, head, body),) = answers(connection)
    assert (got, body["code"]) == (status, code)
    assert b"application/problem+json" in head
    assert body["request_id"].encode() in head


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t "])
def test_space_around_a_value_is_no_part_of_it(base_url, samples, space):
    data = samples[0].data
    head = b"POST /classify HTTP/1.1\r\nHost:%bx%b\r\nContent-Type: image/webp%b\r\n" % (space, space, space)
    chunked = b"Transfer-Encoding: chunked \r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        len(data),
        data,
    )  # no tab: the parser refuses it there
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close \r\nContent-Length: 0 \r\n\r\n"
    with connect(base_url) as connection:
        connection.sendall(head + chunked + probe)
        assert [status for status, _, _ in answers(connection)] == [200, 200]


@pytest.mark.parametrize(
    ("line", "content_type", "status"),
    [
        (b"POST /classify", b"text/plain", 415),
        (b"POST /nothing", b"image/png", 404),
        (b"PUT /classify", b"image/png", 405),
        (b"POST /classify?top_k=0", b"image/png", 422),
    ],
)
def test_who_waits_to_be_asked_for_a_body_and_is_not_has_its_connection_closed(base_url, line, content_type, status):
    """What comes next on it might be the body or the next request (RFC 9110, 10.1.1)."""
    head = b"%b HTTP/1.1\r\nHost: x\r\nContent-Type: %b\r\nContent-Length: 5\r\nExpect: 100-Continue\r\n\r\n"
    with connect(base_url) as connection:
        connection.sendall(head % (line, content_type))
        ((got, answer, _),) = answers(connection)  # ends, so it was closed
    assert got == status
    assert b"connection: close\r\n" in answer.lower()
    with connect(base_url) as connection:
        connection.sendall(head % (b"POST /classify", b"application/json"))
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"no ok")
        status, answer, _ = next(answers(connection))
    assert (status, b"connection: close" in answer.lower()) == (400, False)


@pytest.mark.parametrize("host", [b"", b"my_service:8000", b"[::1]:8000", b"EXAMPLE.org:", b"xn--bcher-kva.example"])
def test_whatever_a_host_may_be_is_taken(base_url, host):
    with connect(base_url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n")
        assert [status for status, _, _ in answers(connection)] == [200]


def test_a_client_of_http_1_0_gets_no_answer_before_the_answer(base_url, samples):
    with connect(base_url) as connection:
        connection.sendall(classify_request(samples[0].data, "Expect: 100-continue", version="1.0"))
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_an_upload_that_stalls_is_counted_once_as_what_it_was_told(start):
    server = start(receive_timeout_s=1)
    url = server.wait_until_ready()
    with connect(url) as connection:
        connection.sendall(CLASSIFY + b"X-Request-ID: mine\r\n" + STALLING)
        ((status, _, body),) = answers(connection)
    assert (status, body["code"], body["request_id"]) == (408, "receive_timeout", "mine")
    wait_until(lambda: 'convmixer_requests_total{status="408"} 1.0' in httpx.get(f"{url}/metrics").text)
    text = httpx.get(f"{url}/metrics").text
    assert 'convmixer_failures_total{code="receive_timeout"} 1.0' in text
    assert 'status="499"} 0.0' in text
    assert server.stop() == 0
    assert server.log.count("mine") == 1


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_what_is_refused_as_it_arrives_never_reaches_its_route(start, expect):
    """Head and broken body come together: uvicorn has made the route's task, and it has not run."""
    server = start(access_log="all")
    url = server.wait_until_ready()
    head = CLASSIFY + b"X-Request-ID: mine\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n" + expect
    with connect(url) as connection:
        connection.sendall(head + b"\r\nZZZ\r\n")
        ((status, _, body),) = answers(connection)
    assert (status, body["code"], body["request_id"]) == (400, "malformed_request", "mine")
    text = httpx.get(f"{url}/metrics").text
    assert 'convmixer_failures_total{code="malformed_request"} 1.0' in text
    assert "convmixer_requests_total" in text
    assert not re.search(r'^convmixer_requests_total\{status="(499|500)"\} [^0]', text, re.MULTILINE)
    assert server.stop() == 0
    assert server.log.count('"mine"') == 1
    assert "Traceback" not in server.log


@pytest.mark.parametrize("media_type", ["image/png", "application/json"])
@pytest.mark.parametrize(("key", "status"), [("secret", 413), ("wrong", 401)])
def test_who_sends_all_before_reading_learns_why_it_was_refused(guarded, media_type, key, status):
    """As Python's own client does: a connection closed at once would be reset under the upload (RFC 9112, 9.6)."""
    connection = http.client.HTTPConnection(guarded.removeprefix("http://"), timeout=30)
    headers = {"Content-Type": media_type, "Authorization": f"Bearer {key}"}
    connection.request("POST", "/classify", b"x" * 8_000_000, headers)
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Connection"]) == (status, "close")
    assert json.load(answer)["request_id"] == answer.headers["X-Request-ID"]


def test_who_does_not_stop_sending_after_a_refusal_is_cut_off(guarded):
    with connect(guarded) as connection:
        connection.sendall(CLASSIFY + b"Content-Type: image/png\r\nContent-Length: 99000000000\r\n\r\n")
        ((status, _, _),) = answers(connection)  # to the end of what the server says
        assert status == 401
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_on_and_on(connection, b"a" * 1024 * 1024)
    assert httpx.get(f"{guarded}/livez").status_code == 200


DEFECTIVE = """
import app.main, app.cli
create_app = app.main.create_app

def with_a_defect(*arguments):
    guard = create_app(*arguments)
    guard.app.add_api_route("/defect", lambda: 1 / 0)
    return guard

app.main.create_app = with_a_defect
app.cli.app(["serve"])
"""


def test_a_defect_is_answered_and_logged_once_and_costs_nobody_the_connection():
    with ServerProcess(program=("-c", DEFECTIVE)) as server:
        with connect(server.wait_until_ready()) as connection:
            probe = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            connection.sendall(b"GET /defect HTTP/1.1\r\nHost: x\r\n\r\n" + probe)
            (failed, _, problem), (alive, _, _) = answers(connection)
        assert "division" not in json.dumps(problem), "what failed inside is for the log"
        assert (failed, problem["code"], alive) == (500, "internal_error", 200)
        assert server.stop() == 0
    assert server.log.count("ZeroDivisionError") == 1
    assert problem["request_id"] in server.log


DEAF = """
import app.main, app.cli
open_traces = app.main.open_traces

def with_a_defect():
    def watcher(exchange):
        raise ValueError("nobody can be told")
    watcher.wants = lambda *_: True
    watcher.close = lambda: None
    return watcher

app.main.open_traces = with_a_defect
app.cli.app(["serve"])
"""


def test_telling_of_an_answer_may_fail_without_harm(samples):
    """The deadline of an upload is enforced in the server's own loop, which an exception would end."""
    with ServerProcess(program=("-c", DEAF), receive_timeout_s=1) as server:
        url = server.wait_until_ready()
        for wire in (classify_request(samples[0].data)[:-10], CLASSIFY + STALLING):
            with connect(url) as connection:
                connection.sendall(wire)
                ((status, _, body),) = answers(connection)
            assert (status, body["code"]) == (408, "receive_timeout")
        response = httpx.post(f"{url}/classify", content=samples[0].data, headers={"Content-Type": "image/webp"})
        assert response.json()["predictions"][0]["label"] == samples[0].label
        assert server.process.poll() is None
        assert server.log.count("nobody can be told") >= 3
        server.process.terminate()
        assert server.wait() == 0


def test_cookies_are_not_read():
    """FastAPI would have them parsed for every route, which takes seconds for some (CVE-2024-7592)."""
    program = "import starlette.requests, app.cli; starlette.requests.cookie_parser = lambda _: 1 / 0; app.cli.app(['serve'])"
    with ServerProcess(program=("-c", program)) as server:
        url = server.wait_until_ready()
        assert httpx.get(f"{url}/livez", headers={"Cookie": "a=b"}).status_code == 200


@pytest.mark.parametrize("endless", [b"X: ", b"1;x="], ids=["trailers", "chunk extension"])
def test_what_follows_or_stands_in_chunks_is_bounded(base_url, endless):
    """The parser keeps a trailer until its end; what came before would be copied for each piece."""
    last = b"" if endless.startswith(b"1") else b"0\r\n"
    with connect(base_url) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + last + endless)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_on_and_on(connection, b"a" * 1024 * 1024)
    assert httpx.get(f"{base_url}/livez").status_code == 200


def test_a_trailer_is_no_header(base_url, samples):
    data = samples[0].data
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/webp\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(base_url) as connection:
        for _ in range(2):
            connection.sendall(head + b"%x\r\n%b\r\n0\r\nX-Deadline-Ms: nonsense\r\nContent-Type: a\r\n\r\n" % (len(data), data))
            ((status, _, body),) = [next(answers(connection))]
            assert status == 200
            assert body["predictions"][0]["label"] == samples[0].label


def test_an_upgrade_that_is_offered_is_ignored(base_url, client, samples):
    """As Java's HttpClient offers it; the parser would leave the body out, and read it as the next request."""
    expected = client.post("/classify", content=samples[70].data, headers={"Content-Type": "image/webp"}).json()
    offer = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"]
    wire = classify_request(samples[70].data, *offer)
    with connect(base_url) as connection:
        received = answers(connection)
        for pieces in ([wire], [wire[:30], wire[30:]], [wire[:-100], wire[-100:]]):
            for piece in pieces:
                connection.sendall(piece)
                httpx.get(f"{base_url}/livez")  # so that pieces come one by one
            status, _, body = next(received)
            assert status == 200
            assert body["predictions"] == expected["predictions"]
    wire = classify_request(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", *offer)
    at = wire.index(b"\nUpgrade") + 3  # in the middle of its name
    with connect(base_url) as connection:
        connection.sendall(wire[:at])
        httpx.get(f"{base_url}/livez")
        connection.sendall(wire[at:])
        ((status, _, body),) = list(answers(connection))
    assert (status, body["code"]) == (400, "malformed_request")


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_body_stays_as_it_was_wherever_the_end_of_the_head_is_torn(base_url, samples, at):
    """What a body says of upgrades is not ours to rewrite: two bytes more would be read as the next request."""
    data = samples[70].data + b"\r\nUpgrade: x" * 20 + b"\r\n\r\n"
    wire = classify_request(data)
    end = wire.index(b"\r\n\r\n") + at
    with connect(base_url) as connection:
        received = answers(connection)
        for _ in range(2):
            connection.sendall(wire[:end])
            httpx.get(f"{base_url}/livez")
            connection.sendall(wire[end:])
            assert next(received)[0] == 200
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert [status for status, _, _ in received] == [200]


def test_time_behind_another_request_is_part_of_a_requests_deadline(base_url, samples):
    many = httpx.Request("POST", f"{base_url}/classify", files=[("images", ("x.webp", sample.data)) for sample in samples[:100]])
    head = b"".join(b"%s: %s\r\n" % pair for pair in many.headers.raw) + b"X-Deadline-Ms: 60000\r\n"
    with connect(base_url) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\n"
            + head
            + b"\r\n"
            + many.read()
            + classify_request(samples[0].data, "X-Deadline-Ms: 1", "Connection: close")
        )
        (first, _, _), (second, _, body) = answers(connection)
    assert (first, second, body["code"]) == (200, 504, "deadline_exceeded")


def test_a_half_sent_request_behind_another_has_a_deadline(impatient, samples):
    with connect(impatient) as connection:
        connection.sendall(
            classify_request(samples[0].data) + CLASSIFY + b"Content-Type: image/png\r\nContent-Length: 100\r\n\r\nhalf"
        )
        assert [status for status, _, _ in answers(connection)] == [200, 408]


def test_a_half_sent_head_behind_another_request_has_a_deadline(impatient, samples):
    before = classify_request(samples[0].data)
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    for sent, expected in ((before, [200, 408]), (before + probe, [200, 200, 408]), (probe * 3, [200, 200, 200, 408])):
        with connect(impatient) as connection:
            connection.sendall(sent + CLASSIFY)
            assert [status for status, _, _ in answers(connection)] == expected


def test_the_deadline_of_a_request_begins_with_its_first_byte(start, samples):
    """Browsers connect before there is anything to ask."""
    wire = classify_request(samples[0].data, "Connection: close")
    url = start(receive_timeout_s=4).wait_until_ready()
    with connect(url) as connection, connect(url) as silent:
        time.sleep(2)
        connection.sendall(wire[:-10])
        assert silent.recv(1) == b""  # it came later, and its time is over
        connection.sendall(wire[-10:])
        assert [status for status, _, _ in answers(connection)] == [200]


def test_a_head_that_is_refused_gets_its_own_id_and_no_body_for_head(impatient):
    refused = b"HEAD /livez HTTP/1.1\r\nX-Request-ID: mine\r\nHost: x\r\nHost: y\r\n\r\n"
    for sent in (refused, refused.replace(b"HEAD", b"GET")):
        with connect(impatient) as connection:
            connection.sendall(sent)
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"x-request-id: mine" in head
        assert re.search(rb"server-timing: total;dur=[0-9.]+", head, re.IGNORECASE)
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        assert length > 100
        assert len(body) == (0 if sent is refused else length)


def test_an_earlier_request_is_answered_whatever_is_wrong_with_a_later_one(base_url, samples):
    chunked = b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: "
    with connect(base_url) as connection:
        connection.sendall(classify_request(samples[0].data) + chunked + b"a" * 40_000 + b"\r\n\r\n")
        assert [status for status, _, _ in answers(connection)] == [200]


def test_a_body_that_arrives_behind_another_request_is_not_hoarded(start, samples):
    server = start(workers=1, max_batch=1, max_pixels=100_000_000, max_side=10_000)
    url = server.wait_until_ready()
    picture = png("black", (9000, 9000))
    form = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 10000000\r\n\r\n"
    with connect(url) as slow, connect(url) as connection:
        slow.sendall(classify_request(picture, "X-Deadline-Ms: 60000"))
        wait_until(lambda: "convmixer_busy_workers 1.0" in httpx.get(f"{url}/metrics").text)
        server.process.send_signal(signal.SIGSTOP)  # so that all of it is there when it is read
        connection.sendall(classify_request(samples[0].data, "X-Deadline-Ms: 60000") + CLASSIFY + form + bytes(100_000))
        server.process.send_signal(signal.SIGCONT)
        assert [status for status, _, _ in answers(connection)] == [200]


def test_a_silent_connection_is_closed_without_a_word(impatient):
    with connect(impatient) as connection:
        assert connection.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off(impatient, samples):
    with connect(impatient, SO_RCVBUF=4096) as connection, pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_on_and_on(connection, classify_request(samples[0].data))


def test_requests_without_end_on_one_connection_are_not_hoarded(impatient):
    probe = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(impatient) as connection:
        connection.sendall(probe * 500)
        received = list(answers(connection))
    assert 1 <= len(received) < 500
    assert {status for status, _, _ in received} == {200}


def test_what_follows_a_good_request_does_not_harm_it(impatient, client, samples):
    alone = client.post("/classify", files={"images": samples[0].data}).json()["predictions"][0]["label"]
    with connect(impatient) as connection:
        connection.sendall(classify_request(samples[0].data) + b"nonsense\r\n\r\n")
        ((status, _, body),) = answers(connection)
    assert (status, body["predictions"][0]["label"]) == (200, alone)


@pytest.mark.parametrize("target", [b"http://example.com", "/ä".encode()])
def test_an_unreadable_target_behind_a_good_request_does_not_take_its_answer(impatient, client, samples, target):
    alone = client.post("/classify", files={"images": samples[0].data}).json()["predictions"][0]["label"]
    with connect(impatient) as connection:
        connection.sendall(classify_request(samples[0].data) + b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        (status, _, body), *others = answers(connection)
    assert (status, body["predictions"][0]["label"]) == (200, alone)
    assert [other for other, _, _ in others] in ([], [400])


def test_what_was_answered_before_it_had_come_gets_no_second_answer(impatient):
    for rest in (b"", b"zz\r\n"):
        with connect(impatient) as connection:
            connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            received = answers(connection)
            assert next(received)[0] == 404
            connection.sendall(rest)
            assert not list(received)


def test_pictures_that_failed_are_not_kept_while_their_clients_stay(start, samples):
    server = start(workers=2)
    url = server.wait_until_ready()
    picture = png("red", (4000, 4000))  # 61 MiB when decoded
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(url)) for _ in range(12)]
        received = [answers(connection) for connection in connections]
        for sample, connection, answer in zip(samples, connections, received, strict=False):
            connection.sendall(classify_request(sample.data))
            assert next(answer)[0] == 200
        before = server.memory_mib()
        for connection in connections:  # at once: one that waited for the others would be idle for too long on a slow machine
            connection.sendall(classify_request(picture[:-500], "X-Deadline-Ms: 60000"))
        assert [next(answer)[0] for answer in received] == [422] * 12
        assert server.memory_mib() < before + 40


def test_images_of_clients_that_left_do_not_wait_for_their_turn(start, samples):
    server = start(workers=1, max_batch=1, coalesce=0)
    url = server.wait_until_ready()
    slow = png("red", (6000, 6000))
    busy = [("images", ("slow.png", slow))] * 16
    with connect(url) as connection, httpx.Client(base_url=url, timeout=60) as client:
        request = client.build_request("POST", "/classify", files=busy, headers={"X-Deadline-Ms": "60000"})
        body = request.read()
        head = (
            f"POST /classify HTTP/1.1\r\nHost: x\r\nX-Deadline-Ms: 60000\r\nContent-Type: {request.headers['Content-Type']}\r\n"
        )
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        # until the worker has its first picture, and the others wait
        wait_until(lambda: re.search(r"^convmixer_queue_depth 1[0-9]", client.get("/metrics").text, re.MULTILINE))
        before = server.memory_mib()
        for _ in range(10):
            with connect(url) as leaving:
                leaving.sendall(classify_request(bytes(16 * 2**20), "X-Deadline-Ms: 60000"))

        def all_have_left() -> bool:
            text = client.get("/metrics").text
            assert "convmixer_queue_depth 0.0" not in text, "one was not seen leaving"
            return 'requests_total{status="499"} 10.0' in text

        wait_until(all_have_left)
        assert server.memory_mib() < before + 16 + 6000 * 6000 * 4 / 2**20


def test_probes_are_answered_though_every_connection_is_busy(start, samples):
    server = start(max_connections=4, workers=1, max_batch=1, max_pixels=100_000_000, max_side=10_000)
    url = server.wait_until_ready()
    picture = png("black", (9900, 9900))
    with ExitStack() as stack:
        busy = [stack.enter_context(connect(url)) for _ in range(4)]
        for connection in busy:
            connection.sendall(classify_request(picture, "X-Deadline-Ms: 60000"))
        received = []
        for path in (b"/readyz", b"/classify", b"/livez?verbose", b"/metrics"):
            with connect(url) as connection:
                connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                received.append(connection.recv(12))
        assert received == [b"HTTP/1.1 200", b"HTTP/1.1 503", b"HTTP/1.1 200", b"HTTP/1.1 200"]
        silent = [stack.enter_context(connect(url)) for _ in range(16)]  # on all places for probes
        for sent, expected in (
            (classify_request(samples[0].data, "Connection: close"), 503),
            (b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        ):
            with connect(url) as connection:
                connection.sendall(sent)
                assert [status for status, _, _ in answers(connection)] == [expected]
        assert metric(httpx.get(f"{url}/metrics").text, 'convmixer_refused_total{reason="connections"}') == 2
        assert [next(answers(connection))[0] for connection in busy] == [200] * 4
        for connection in busy:
            connection.close()
        assert httpx.get(f"{url}/livez").status_code == 200  # they have been seen leaving
        silent[-1].sendall(classify_request(samples[0].data))
        assert next(answers(silent[-1]))[0] == 200, "a place for anything is free again"


def test_a_client_that_does_not_read_makes_room(start):
    server = start(max_connections=4)
    url = server.wait_until_ready()
    with ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(connect(url, SO_RCVBUF=4096))
            connection.sendall(b"GET /card HTTP/1.1\r\nHost: x\r\n\r\n" * 32)

        def has_room() -> bool:
            with connect(url) as connection:
                connection.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return [status for status, _, _ in answers(connection)] == [200]

        wait_until(has_room)


def test_idle_connections_make_room_for_new_ones(impatient, samples):
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(impatient)) for _ in range(30)]
        response = httpx.post(f"{impatient}/classify", content=samples[0].data, headers={"Content-Type": "image/webp"})
        assert response.status_code == 200
        assert idle[0].recv(1) == b""  # the oldest went first


def test_a_client_that_closes_its_sending_side_has_left(start):
    url = start().wait_until_ready()
    picture = png("red", (4000, 4000))
    with connect(url) as connection:
        connection.sendall(classify_request(picture, "X-Deadline-Ms: 60000"))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    wait_until(lambda: 'convmixer_requests_total{status="499"} 1.0' in httpx.get(f"{url}/metrics").text)


@pytest.mark.parametrize("behind", [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", classify_request(bytes(100_000))])
def test_a_client_that_leaves_with_a_second_request_behind_its_first_is_seen(start, behind):
    url = start(workers=1, max_batch=1, coalesce=0).wait_until_ready()
    slow = png("red", (6000, 6000))
    request = httpx.Request("POST", f"{url}/classify", files=[("images", ("slow.png", slow))] * 16)
    body = request.read()
    head = f"X-Deadline-Ms: 60000\r\nContent-Type: {request.headers['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"

    def metrics() -> str:
        text = httpx.get(f"{url}/metrics", timeout=60).text
        assert 'convmixer_requests_total{status="200"} 0.0' in text, "all of it was computed for nobody"
        return text

    with connect(url) as connection:
        connection.sendall(CLASSIFY + head.encode() + body)
        wait_until(lambda: "convmixer_queue_depth 0.0" not in metrics())
        connection.sendall(behind)
        httpx.get(f"{url}/livez", timeout=60)  # the server has read what was sent before
    wait_until(lambda: 'convmixer_requests_total{status="499"} 1.0' in metrics())


def test_a_client_that_leaves_in_the_middle_of_its_image_is_counted(start, samples):
    url = start().wait_until_ready()
    wire = classify_request(samples[0].data)
    with connect(url) as connection:
        connection.sendall(wire[:-10])
    with connect(url) as connection:
        connection.sendall(CLASSIFY + STALLING)
    wait_until(lambda: 'convmixer_requests_total{status="499"} 2.0' in httpx.get(f"{url}/metrics").text)


def test_refusals_by_either_way_are_the_same_and_all_are_counted(start, samples):
    """The first on a connection is parsed and the others are not, yet a client or a metric must not see which was which."""
    url = start(workers=1, max_batch=1, max_queue=1, max_pixels=100_000_000, max_side=10_000).wait_until_ready()
    picture = png("black", (9900, 9900))
    with ExitStack() as stack:
        metrics = stack.enter_context(httpx.Client(base_url=url))
        # one is decoded for a second, one waits; sent together, the second might come before the first is taken
        for gauge in ("convmixer_busy_workers", "convmixer_queue_depth"):
            stack.enter_context(connect(url)).sendall(classify_request(picture, "X-Deadline-Ms: 60000"))
            wait_until(lambda gauge=gauge: f"{gauge} 1.0" in metrics.get("/metrics").text)
        received = []
        for id_of_the_clients in (["X-Request-ID: mine"], []):
            client = stack.enter_context(connect(url))
            for sample in samples[:5]:
                client.sendall(classify_request(sample.data, *id_of_the_clients, "X-Deadline-Ms: 60000"))
                received.append(next(answers(client)))
        client.sendall(classify_request(samples[0].data))  # refused for another reason
        received.append(next(answers(client)))
    assert [status for status, _, _ in received] == [503] * 11
    assert len({tuple(re.findall(rb"\r\n([a-z-]+):", head.lower())) for _, head, _ in received}) == 1
    for _, head, body in received:
        assert f"x-request-id: {body['request_id']}\r\n".encode() in head
        assert re.search(rb"\r\nServer-Timing: total;dur=\d+\.\d\d\r\n", head)
    assert len({tuple(body) for _, _, body in received}) == 1
    assert len({re.sub(r"\d+", "", body["detail"]) for _, _, body in received}) == 1
    ids = [body["request_id"] for _, _, body in received]
    assert ids[:5] == ["mine"] * 5
    assert len(set(ids[5:])) == 6
    assert all(re.fullmatch("[0-9a-f]{32}", given) for given in ids[5:])
    text = httpx.get(f"{url}/metrics").text
    assert 'convmixer_requests_total{status="503"} 11.0' in text
    assert 'convmixer_failures_total{code="overloaded"} 11.0' in text
    assert 'convmixer_refused_total{reason="queue_full"} 11.0' in text
    wait_until(lambda: "convmixer_held_bytes 0.0" in httpx.get(f"{url}/metrics").text)


def test_what_would_be_late_is_refused_and_counted_as_that(start, samples):
    url = start(workers=1, max_batch=1, max_pixels=100_000_000, max_side=10_000).wait_until_ready()
    picture = png("black", (9900, 9900))
    with ExitStack() as stack:
        for gauge in ("convmixer_busy_workers", "convmixer_queue_depth"):  # one is decoded for a second, one waits
            stack.enter_context(connect(url)).sendall(classify_request(picture, "X-Deadline-Ms: 60000"))
            wait_until(lambda gauge=gauge: f"{gauge} 1.0" in httpx.get(f"{url}/metrics").text)
        hurried = stack.enter_context(connect(url))
        hurried.sendall(classify_request(samples[0].data, "X-Deadline-Ms: 1"))
        status, head, body = next(answers(hurried))
    assert (status, body["code"]) == (503, "overloaded")
    assert "too long for the deadline of 1 ms" in body["detail"]
    assert b"retry-after: " in head.lower()
    assert metric(httpx.get(f"{url}/metrics").text, 'convmixer_refused_total{reason="would_be_late"}') == 1


FORM = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'


@pytest.mark.parametrize(
    ("content_type", "begin", "refused"), [("image/png", b"", 415), ("multipart/form-data; boundary=b", FORM, 400)]
)
def test_bodies_held_at_once_are_bounded_over_all_connections(start, samples, content_type, begin, refused):
    url = start(max_held_bytes=100_000).wait_until_ready()
    image = {"content": samples[0].data, "headers": {"Content-Type": "image/webp"}}

    def upload(connection: socket.socket, length: int, missing: int) -> None:
        head = CLASSIFY + f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n".encode()
        connection.sendall(head + begin + b"x" * (length - missing - len(begin)))

    def answer(connection: socket.socket) -> int:
        status, head, body = next(answers(connection))
        if status == 503:
            assert body["code"] == "overloaded"
            assert "CONVMIXER_MAX_HELD_BYTES" in body["detail"]
            assert b"retry-after: 1" in head.lower()
        return status

    def held() -> float:
        return metric(httpx.get(f"{url}/metrics").text, "convmixer_held_bytes")

    def wait_for(count: int) -> None:
        wait_until(lambda: held() == count, lambda: f"{held()} bytes are held, not {count}")

    statuses: list[int] = []

    def another_is_taken() -> bool:
        with connect(url) as another:
            upload(another, 30_000, missing=0)
            statuses.append(answer(another))
        return statuses[-1] != 503

    with connect(url) as slow:
        upload(slow, 80_000, missing=1)
        wait_for(79_999)
        assert httpx.post(f"{url}/classify", **image).status_code == 200
        wait_until(another_is_taken, lambda: statuses)  # the slow one makes room; when, tests/app/test_growth.py says
        assert statuses[-1] == refused
        assert answer(slow) == 503
    wait_for(0)


def test_fewer_files_than_connections_leave_probes_their_places():
    server = ServerProcess(under=("prlimit", "--nofile=128"), max_connections=1024, metrics_port=free_port())
    with server, ExitStack() as stack:
        url = server.wait_until_ready()
        for _ in range(200):  # idle ones make room for the next
            stack.enter_context(connect(url))
        assert httpx.get(f"{url}/livez").status_code == 200
        assert httpx.get(f"{url}/model").status_code == 200
    assert "no more than 128 files may be open: 48 connections instead of CONVMIXER_MAX_CONNECTIONS=1024" in server.log
