"""What the service tells of itself, at the other end: Prometheus, a log reader, an OpenTelemetry collector.

promtool and prometheus are Debian's package `prometheus`; without it those tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.telemetry.siblings import ParentMetrics
from benchmarks.server import ServerProcess, free_port

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "observability"
DEPLOYMENT = ROOT / "docs" / "deployment.md"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "convmixer.json").read_text())
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
(HAPROXYS,) = text_string_to_metric_families('haproxy_backend_active_servers{proxy="replicas"} 2')
"""As HAProxy tells it, says a test below."""

WEBP = {"Content-Type": "image/webp"}
TIMEOUT_S = 60

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="no promtool: apt-get install prometheus"
)


@pytest.fixture(scope="module")
def server(samples) -> Iterator[ServerProcess]:
    """One server for all of it, with something of everything behind it."""
    with ServerProcess(access_log="all", max_held_bytes=100_000, api_keys="a-secret-key") as server:
        url = server.wait_until_ready()
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers={"Authorization": "Bearer a-secret-key"}) as client:
            server.client = client  # type: ignore[attr-defined]
            for sample in samples[::20]:
                assert client.post("/classify", content=sample.data, headers=WEBP).status_code == 200
            yield server


@pytest.fixture(scope="module")
def client(server) -> httpx.Client:
    return server.client


def families(client: httpx.Client) -> dict[str, Any]:
    """The server's, and those that a parent of several has besides (`test_processes` asks a real one)."""
    registry = CollectorRegistry()
    registry.register(ParentMetrics(2))
    texts = (generate_latest(registry).decode(), client.get("/metrics").text)
    found = {family.name: family for text in texts for family in text_string_to_metric_families(text)}
    return {name + ("_total" if family.type == "counter" else ""): family for name, family in found.items()}


def value(client: httpx.Client, name: str, **labels: str) -> float:
    samples = (s for family in families(client).values() for s in family.samples if s.name == name)
    return next(sample.value for sample in samples if sample.labels == labels)


def labels_of(family: Any) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_every_metric_is_documented_and_nothing_else(client):
    """docs/observability.md has one table row a metric: name, type, labels, meaning."""
    text = (ROOT / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| `((?:convmixer|process|python)_\w+)` \| (\w+) \|\s*(.*?)\s*\| (.+) \|$", text, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    assert documented == {name: (family.type, labels_of(family)) for name, family in families(client).items()}


def test_names_follow_the_conventions(client):
    for name, family in families(client).items():
        assert (family.type == "counter") == name.endswith("_total")
        assert family.documentation
        if family.type == "histogram" and "seconds" in name:
            bounds = sorted({float(s.labels["le"]) for s in family.samples if "le" in s.labels})
            assert bounds[0] <= 0.001
            assert bounds[-2:] == [10, float("inf")]


def test_pictures_are_counted_by_class_and_confidence_and_none_of_the_classes(client, samples):
    def seen() -> list[float]:
        return [
            value(client, "convmixer_prediction_confidence_count", **{"class": answer["label"]}),
            value(client, "convmixer_prediction_confidence_sum", **{"class": answer["label"]}),
            value(client, "convmixer_out_of_distribution_total"),
            value(client, "convmixer_request_seconds_count"),
        ]

    files = [("images", ("a", samples[0].data)), ("images", ("b", samples[0].data)), ("images", ("c", b"no picture"))]
    answer = client.post("/classify", content=samples[0].data, headers=WEBP).json()["predictions"][0]
    before = seen()
    stranger = not answer["in_distribution"]
    assert client.post("/classify", files=files).status_code == 200
    assert seen() == pytest.approx(
        [before[0] + 2, before[1] + 2 * answer["confidence"], before[2] + 2 * stranger, before[3] + 1], abs=1e-4
    )


@pytest.mark.parametrize("content_type", ["image/webp", "image/webp; through=fastapi"])
def test_refusals_are_counted_by_reason_and_failures_by_code(client, content_type):
    def counts() -> list[float]:
        return [
            value(client, "convmixer_refused_total", reason="held_bytes"),
            value(client, "convmixer_failures_total", code="overloaded"),
            value(client, "convmixer_failures_total", code="unsupported_image"),
            value(client, "convmixer_failures_total", code="unauthorized"),
            value(client, "convmixer_requests_total", status="503"),
        ]

    before = counts()
    assert client.post("/classify", content=bytes(200_000), headers={"Content-Type": content_type}).status_code == 503
    assert client.post("/classify", content=b"x", headers={"Content-Type": content_type}).status_code == 415
    keyless = {"Content-Type": content_type, "Authorization": "Bearer wrong"}
    assert client.post("/classify", content=b"x", headers=keyless).status_code == 401
    assert counts() == [count + 1 for count in before]


@pytest.mark.parametrize("content_type", ["image/webp", "image/webp; through=fastapi"])
def test_failures_say_how_far_they_came(client, samples, content_type):
    def timing(content: bytes) -> dict[str, float]:
        response = client.post("/classify", content=content, headers={"Content-Type": content_type})
        assert response.status_code >= 400
        return {name: float(ms) for name, _, ms in (s.partition(";dur=") for s in response.headers["Server-Timing"].split(", "))}

    before = value(client, "convmixer_decode_seconds_count"), value(client, "convmixer_images_total")
    damaged = timing(samples[0].data[:200])
    assert damaged["decode"] > 0
    after = value(client, "convmixer_decode_seconds_count"), value(client, "convmixer_images_total")
    assert after == (before[0] + 1, before[1]), "it took a worker's time, and was not classified"
    assert damaged["infer"] == 0
    assert damaged["total"] >= damaged["decode"] + damaged["queue"] - 0.02
    refused = timing(bytes(200_000))
    assert set(refused) == {"total"}


def line_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up:
        for line in server.log.splitlines():
            if request_id in line and line.endswith("}"):
                return json.loads(line)  # type: ignore[no-any-return]
    raise AssertionError(f"no line of {request_id} in\n{server.log}")


@pytest.mark.parametrize("content_type", ["image/webp", "image/webp; through=fastapi"])
def test_each_request_has_a_line_with_its_id_and_no_secret(server, client, samples, content_type):
    headers = {"Content-Type": content_type, "X-Forwarded-For": "203.0.113.9"}  # which anybody may send
    response = client.post("/classify?top_k=2", content=samples[0].data, headers=headers)
    line = line_of(server, response.headers["X-Request-ID"])
    assert line.pop("ms") >= 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "app.access",
        "message": "POST /classify 200",
        "method": "POST",
        "path": "/classify",
        "status": 200,
        "bytes": len(response.content),
        "images": 1,
        "request_id": response.headers["X-Request-ID"],
        "client": "127.0.0.1",
    }
    failed = client.post("/classify", content=b"x", headers={"Content-Type": content_type})
    assert line_of(server, failed.headers["X-Request-ID"])["code"] == "unsupported_image"
    assert "a-secret-key" not in server.log


def test_every_line_is_json_uvicorns_too(server, client):
    client.get("/forged%0a%7B%22x%22:1%7D")
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"no http\r\n\r\n")
        request_id = re.search(rb"x-request-id: (\w+)", connection.recv(65536))
    assert request_id
    assert line_of(server, request_id[1].decode())["code"] == "malformed_request"
    loggers = {json.loads(line)["logger"] for line in server.log.splitlines()}
    assert loggers == {"uvicorn.error", "app.main", "app.service", "app.access"}


# --- Prometheus and Grafana


def names_and_labels(expression: str) -> tuple[set[str], set[str]]:
    """Metric names, without recorded ones, and label names of a PromQL expression."""
    plain = re.sub(r'"[^"]*"', '""', expression)
    names = set(re.findall(r"(?<![\w:])(?:convmixer|process|python|haproxy)_\w+", plain))
    labels = {name for group in re.findall(r"\{(.*?)\}", plain) for name in re.findall(r"(\w+)\s*[=!]", group)}
    for group in re.findall(r"\b(?:by|ignoring|on)\s*\((.*?)\)", plain):
        labels |= set(re.findall(r"\w+", group))
    return names, labels


@pytest.mark.parametrize("expression", [*QUERIES.values(), *(rule["expr"] for rule in ALERTS)])
def test_every_query_asks_for_what_there_is(client, expression):
    known = families(client) | {"haproxy_backend_active_servers": HAPROXYS}
    suffixed = {name + s: name for name, f in known.items() if f.type == "histogram" for s in ("_bucket", "_sum", "_count")}
    names, labels = names_and_labels(expression)
    assert names or "up{" in expression or any(rule["record"] in expression for rule in ALERTS if "record" in rule)
    assert names <= {*known, *suffixed}
    # Prometheus's own, what every sample has under CONVMIXER_PROCESSES (telemetry/siblings), and a cluster's
    given = {"instance", "job", "le", "process", "pod"}.union(*(labels_of(known[suffixed.get(name, name)]) for name in names))
    assert labels <= given


@pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed (Debian: apt install haproxy)")
def test_haproxy_tells_how_many_replicas_it_uses():
    ports = {name: f"127.0.0.1:{free_port()}" for name in ("BIND", "BIND_OPERATORS", "DNS")}
    command = ["haproxy", "-db", "-f", str(ROOT / "deploy" / "haproxy" / "haproxy.cfg")]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    patient = httpx.HTTPTransport(retries=8)
    with subprocess.Popen(command, env=os.environ | ports, **silent) as process, httpx.Client(transport=patient) as asking:
        try:
            text = asking.get(f"http://{ports['BIND_OPERATORS']}/metrics", timeout=TIMEOUT_S).text
        finally:
            process.kill()
    (found,) = [family for family in text_string_to_metric_families(text) if family.name == HAPROXYS.name]
    assert [(sample.name, sample.labels, sample.value) for sample in found.samples] == [
        (HAPROXYS.name, {"proxy": "replicas"}, 0)  # there is no name server
    ]


def test_every_alert_says_what_to_do():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "observability.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for rule in (rule for rule in ALERTS if "alert" in rule):
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert file == "docs/observability.md"
        assert anchor in anchors


def test_the_alerts_become_a_kind_of_kubernetes_as_the_documentation_says():
    (command,) = re.findall(r"^(\{ printf .*\| kubectl apply -f -)$", DEPLOYMENT.read_text(), re.MULTILINE | re.DOTALL)
    script = f"kubectl() {{ cat; }}\n{command}"
    done = subprocess.run(["bash", "-ec", script], cwd=ROOT, capture_output=True, text=True, check=True)
    found = yaml.safe_load(done.stdout)
    assert (found["kind"], found["metadata"]["name"]) == ("PrometheusRule", "convmixer")
    assert found["spec"] == yaml.safe_load((DEPLOY / "alerts.yml").read_text())


def test_compose_starts_only_the_classifier_unless_asked():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert [name for name, service in services.items() if "profiles" not in service] == ["classifier"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["observability"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", services[name]["image"])
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
        mounts = [volume.split(":") for volume in services[name]["volumes"] if volume.startswith("./")]
        assert all((ROOT / source).exists() and mode == "ro" for source, _, mode in mounts)


def test_grafana_finds_its_data_and_its_dashboard():
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/convmixer.yml").read_text())["providers"]
    targets = [volume.split(":")[1] for volume in grafana["volumes"]]
    assert provider["options"]["path"] in targets
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", str(DEPLOY / "prometheus.yml")],
        ["check", "rules", "--lint-fatal", str(DEPLOY / "alerts.yml")],
        ["test", "rules", str(ROOT / "tests" / "system" / "alerts.test.yml")],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool_agrees(command):
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_promtool_finds_nothing_to_say_against_the_metrics(client):
    text = client.get("/metrics").text
    own = "\n".join(line for line in text.splitlines() if "python_gc" not in line) + "\n"  # prometheus_client's own names
    done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prometheus(client, samples, tmp_path_factory) -> Iterator[httpx.Client]:
    """A real Prometheus with the shipped rules that has scraped the real server while it answered."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    del config["scrape_configs"][0]["dns_sd_configs"]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"{client.base_url.host}:{client.base_url.port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    rules = re.sub(r"interval: 1m", "interval: 500ms", (DEPLOY / "alerts.yml").read_text())
    (folder / "alerts.yml").write_text(rules)
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *options, f"--web.listen-address={address}"], stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=TIMEOUT_S) as asking:
            give_up = time.monotonic() + TIMEOUT_S
            while not scrapes(asking) >= 4:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < give_up, (folder / "log").read_text()
                for content, status in ((samples[0].data, 200), (b"x", 415), (bytes(200_000), 503)):
                    assert client.post("/classify", content=content, headers=WEBP).status_code == status
            yield asking
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def scrapes(prometheus: httpx.Client) -> float:
    try:
        return float(ask(prometheus, 'sum(count_over_time(up{job="convmixer"}[1m]))')[0]["value"][1])
    except (httpx.TransportError, IndexError, ValueError):  # not yet there, not yet ready, nothing yet
        return 0


def ask(prometheus: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = prometheus.get("/api/v1/query", params={"query": query}).json()
    return answer["data"]["result"]  # type: ignore[no-any-return]


@needs_prometheus
def test_every_query_of_the_dashboard_has_data(prometheus):
    for title, query in QUERIES.items():
        found = ask(prometheus, query.replace("$__rate_interval", "1m").replace("$instance", ".*"))
        assert found, f"{title}: {query}"
        assert all(result["value"][1] != "NaN" for result in found), f"{title}: {query}"


@needs_prometheus
def test_every_rule_is_evaluated_and_only_what_was_provoked_is_noticed(prometheus):
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(ALERTS)
    assert {rule["health"] for rule in rules} == {"ok"}
    noticed = {rule["name"]: rule["state"] for rule in rules if rule.get("state", "inactive") != "inactive"}
    noticed.pop("ConvmixerSlow", None)  # a slow machine provokes it
    assert noticed == {"ConvmixerRefusing": "pending"}


# --- OpenTelemetry


class Collector(BaseHTTPRequestHandler):
    """OTLP over HTTP: keeps the spans it gets."""

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        assert self.headers["Content-Type"] == "application/x-protobuf"
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(ExportTraceServiceResponse().SerializeToString())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector(monkeypatch) -> Iterator[list[ExportTraceServiceRequest]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    yield server.requests  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def attributes(holder: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in holder.attributes}


def test_a_collector_gets_what_happened_and_when(start, collector, samples):
    server = start(access_log="all")
    url = server.wait_until_ready()
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = WEBP | {"traceparent": f"00-{trace_id}-{parent_id}-01", "User-Agent": "test/1"}
    before = time.time_ns()
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as asking:
        raw = asking.post("/classify", content=samples[0].data, headers=headers)
        files = [("images", ("a", samples[0].data)), ("images", ("b", samples[1].data[:100]))]
        several = asking.post("/classify?top_k=1", files=files, headers={"traceparent": headers["traceparent"]})
        refused = asking.post("/classify", content=samples[0].data[:100], headers=WEBP)
        unsampled = asking.post(
            "/classify", content=samples[0].data, headers=WEBP | {"traceparent": headers["traceparent"][:-1] + "0"}
        )
        assert asking.get("/readyz").status_code == 200
        parent = ("traceparent", headers["traceparent"])
        lines = [*WEBP.items(), parent, ("tracestate", "one=1"), ("tracestate", "two=2")]
        with_state = asking.post("/classify", content=samples[0].data, headers=lines)
        orphan = asking.post("/classify", content=samples[0].data, headers=[*lines, parent])
    assert [r.status_code for r in (raw, several, refused, unsampled, with_state, orphan)] == [200, 200, 422, 200, 200, 200]
    after = time.time_ns()
    assert server.stop() == 0  # and what waits is sent

    (resource,) = {str(sorted(attributes(spans.resource).items())) for request in collector for spans in request.resource_spans}
    assert "('service.name', 'convmixer-serve')" in resource
    assert "('deployment.environment.name', 'test')" in resource
    spans = [s for request in collector for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
    requests = {attributes(s)["convmixer.request_id"]: s for s in spans if s.kind == Span.SPAN_KIND_SERVER}
    assert set(requests) == {r.headers["X-Request-ID"] for r in (raw, several, refused, with_state, orphan)}
    # lines of one list are one (W3C Trace Context, 3.3.1.1), and of two parents none is believed
    assert requests[with_state.headers["X-Request-ID"]].trace_state == "one=1,two=2"
    assert requests[with_state.headers["X-Request-ID"]].trace_id.hex() == trace_id
    assert requests[orphan.headers["X-Request-ID"]].trace_id.hex() != trace_id
    assert not requests[orphan.headers["X-Request-ID"]].parent_span_id

    def children(response: httpx.Response) -> list[tuple[int, str, Span]]:
        span = requests[response.headers["X-Request-ID"]]
        assert span.name == "POST /classify"
        assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= after
        inside = [s for s in spans if s.parent_span_id == span.span_id]
        assert all(s.trace_id == span.trace_id for s in inside)
        for child in inside:
            assert span.start_time_unix_nano - 1e6 <= child.start_time_unix_nano
            assert child.start_time_unix_nano <= child.end_time_unix_nano <= span.end_time_unix_nano + 1e6
        return [(attributes(s)["convmixer.image.index"], s.name, s) for s in inside]

    root = requests[raw.headers["X-Request-ID"]]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (trace_id, parent_id)
    found = attributes(root)
    assert (found["http.request.method"], found["http.route"], found["url.path"]) == ("POST", "/classify", "/classify")
    assert (found["http.response.status_code"], found["user_agent.original"]) == (200, "test/1")
    stages = {name: span for _, name, span in children(raw)}
    # it came alone, and so without a queue, unless the machine was slow just before
    assert list(stages) in (["decode", "infer"], ["queue", "decode", "infer"])
    if "queue" in stages:
        assert stages["queue"].end_time_unix_nano == pytest.approx(stages["decode"].start_time_unix_nano, abs=1000)
    assert stages["decode"].end_time_unix_nano <= stages["infer"].start_time_unix_nano + 1000
    took_ms = (stages["infer"].end_time_unix_nano - stages["infer"].start_time_unix_nano) / 1e6
    assert float(re.search(r"infer;dur=([\d.]+)", raw.headers["Server-Timing"])[1]) == pytest.approx(took_ms, abs=0.02)
    assert attributes(stages["infer"])["convmixer.batch.size"] == 1

    assert requests[several.headers["X-Request-ID"]].trace_id.hex() == trace_id
    assert sorted((index, name) for index, name, _ in children(several)) == [
        (0, "decode"),
        (0, "infer"),
        (0, "queue"),
        (1, "decode"),
        (1, "queue"),
    ]
    failed = [name for index, name, span in children(several) if span.status.code == Status.STATUS_CODE_ERROR]
    assert failed == ["decode"]

    bad = requests[refused.headers["X-Request-ID"]]
    assert attributes(bad)["convmixer.code"] == refused.json()["code"]
    assert bad.status.code == Status.STATUS_CODE_UNSET  # a client's fault is no error of the server
    assert bad.trace_id.hex() != trace_id
    assert f'"trace_id": "{bad.trace_id.hex()}"' in server.log


def test_a_collector_that_is_gone_costs_neither_answers_nor_the_stop(start, monkeypatch, samples):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    server = start()
    url = server.wait_until_ready()
    assert httpx.post(f"{url}/classify", content=samples[0].data, headers=WEBP).status_code == 200
    assert server.stop() == 0
    assert all(json.loads(line)["logger"] for line in server.log.splitlines())


def test_lines_may_be_text(start):
    server = start(log_format="text", access_log="all")
    httpx.get(f"{server.wait_until_ready()}/model", timeout=TIMEOUT_S)
    assert server.stop() == 0
    lines = server.log.splitlines()
    assert any("GET /model" in line for line in lines), server.log
    assert not any(line.startswith("{") for line in lines)
