"""deploy/kubernetes fits Kubernetes', Prometheus Operator's and KServe's schemas; its numbers and names are the service's."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import app
from app.settings import ENV_PREFIX, Settings
from tests.conftest import REPOSITORY
from tests.memory import implied_mib

FOLDER = REPOSITORY / "deploy" / "kubernetes"
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (REPOSITORY / "tests" / "data" / "kubernetes").glob("*.json")}
"""Of kinds that are not Kubernetes' own; README.md beside them says where they are from."""

KSERVES_OWN = SCHEMAS["inferenceservice"]["properties"]["spec"]["properties"]["predictor"]["properties"]
MIB = {"Mi": 1, "Gi": 1024}

Manifest = dict[str, Any]


def load(path: Path) -> Manifest:
    return yaml.safe_load(path.read_text())


BASE = {path.stem: load(path) for path in FOLDER.glob("base/*.yaml") if path.stem != "kustomization"}
POD = BASE["deployment"]["spec"]["template"]["spec"]
CUSTOM = {
    "ServiceMonitor": load(FOLDER / "components" / "prometheus" / "service-monitor.yaml"),
    "InferenceService": load(FOLDER / "kserve" / "inference-service.yaml"),
}
PREDICTOR = CUSTOM["InferenceService"]["spec"]["predictor"]
PODS = pytest.mark.parametrize("pod", [POD, PREDICTOR], ids=["deployment", "kserve"])


def validate(manifest: Manifest) -> None:
    if manifest["kind"] not in CUSTOM:
        kubernetes_validate.validate(manifest, "1.37", strict=True)  # strict: no unknown field
        return
    jsonschema.validate(manifest, SCHEMAS[manifest["kind"].lower()])
    # metadata is every kind's, and what is not KServe's own in a predictor is a pod's
    pod = {name: value for name, value in manifest["spec"].get("predictor", POD).items() if name not in KSERVES_OWN}
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": manifest["metadata"], "spec": pod})


def settings(pod: Manifest) -> dict[str, str]:
    (container,) = pod["containers"]
    return {e["name"]: e["value"] for e in container["env"] if e["name"].startswith(ENV_PREFIX)}


def loaded(pod: Manifest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service would read; a setting that does not exist, or a bad value, stops it."""
    for name, value in settings(pod).items():
        monkeypatch.setenv(name, value)
    return Settings.load()


@pytest.mark.parametrize("manifest", BASE.values(), ids=BASE)
def test_each_manifest_fits_kubernetes_schema(manifest):
    validate(manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(manifest | {"metadatas": {}})


@pytest.mark.parametrize("manifest", CUSTOM.values(), ids=CUSTOM)
def test_custom_kinds_fit_their_operators_schemas(manifest):
    validate(manifest)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ServiceMonitor", ["metadata", "label"], {}),
        ("ServiceMonitor", ["spec", "endpoint"], []),
        ("ServiceMonitor", ["spec", "selector", "matchLabel"], {}),
        ("ServiceMonitor", ["spec", "endpoints", 0, "targetport"], "metrics"),
        ("ServiceMonitor", ["spec", "endpoints", 0, "interval"], "15 seconds"),
        ("ServiceMonitor", ["spec", "endpoints", 0, "port"], 9090),
        ("InferenceService", ["metadata", "label"], {}),
        ("InferenceService", ["spec", "predictors"], {}),
        ("InferenceService", ["spec", "predictor", "minReplica"], 2),
        ("InferenceService", ["spec", "predictor", "minReplicas"], "2"),
        ("InferenceService", ["spec", "predictor", "containers", 0, "readynessProbe"], {}),
        ("InferenceService", ["spec", "predictor", "containers", 0, "resources", "limit"], {}),
    ],
)
def test_what_an_operators_schema_does_not_know_is_refused(kind, path, value):
    manifest = copy.deepcopy(CUSTOM[kind])
    *parents, name = path
    place: Any = manifest
    for parent in parents:
        place = place[parent]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders overlays, is not installed")
@pytest.mark.parametrize("with_prometheus", [False, True])
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_overlays_render_to_what_kubernetes_takes(overlay, with_prometheus, tmp_path, monkeypatch):
    mine = {"resources": [os.path.relpath(FOLDER / "overlays" / overlay, tmp_path.resolve())]}
    if with_prometheus:
        mine["components"] = [os.path.relpath(FOLDER / "components" / "prometheus", tmp_path.resolve())]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(mine))
    rendered = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    found = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(rendered)}
    for manifest in found.values():
        validate(manifest)
    assert ("ServiceMonitor" in found) is with_prometheus
    assert len(found["HorizontalPodAutoscaler"]["spec"]["metrics"]) == 1 + with_prometheus
    assert {m["metadata"].get("namespace", "convmixer") for m in found.values()} == {"convmixer"}

    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"].partition(":")[2].removesuffix("-gpu") == app.__version__
    provider = loaded(pod, monkeypatch).provider
    limits = pod["containers"][0]["resources"]["limits"]
    assert (provider, "nvidia.com/gpu" in limits) == (("cuda", True) if overlay == "gpu" else ("auto", False))


@PODS
def test_limits_are_what_the_settings_imply(pod, monkeypatch):
    (container,) = pod["containers"]
    chosen = loaded(pod, monkeypatch)
    limits = container["resources"]["limits"]
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", limits["memory"]).groups()
    assert implied_mib(chosen) <= int(number) * MIB[unit]
    assert chosen.workers == int(limits["cpu"])
    assert chosen.max_body_bytes <= chosen.max_held_bytes


@PODS
def test_probes_ask_what_the_service_answers(pod, client, monkeypatch):
    (container,) = pod["containers"]
    chosen = loaded(pod, monkeypatch)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert chosen.port in ports.values()
    assert ports.get("metrics") == chosen.metrics_port
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    for probe in probes.values():
        assert ports.get(probe["port"], probe["port"]) == chosen.port
        assert client.get(probe["path"]).json() == {"status": "ok"}
    assert probes["livenessProbe"]["path"] == "/livez"
    assert probes["readinessProbe"]["path"] == "/readyz"


@PODS
def test_a_pod_has_time_to_end(pod, monkeypatch):
    (container,) = pod["containers"]
    chosen = loaded(pod, monkeypatch)
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0) + chosen.shutdown_delay_s
    assert before >= 5, "endpoints take seconds to be gone everywhere"
    assert pod.get("terminationGracePeriodSeconds", 30) > before + chosen.drain_timeout_s + 5


@PODS
def test_pods_may_do_little(pod):
    """Pod Security Standards, restricted, of the namespace; and no variables of Services, which would be unknown settings."""
    assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    context = pod.get("securityContext", {}) | container["securityContext"]
    assert context["runAsNonRoot"] is context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["seccompProfile"]["type"] == "RuntimeDefault"
    assert f"USER {context['runAsUser']}:" in (REPOSITORY / "Dockerfile").read_text()
    labels = BASE["namespace"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_names_meet():
    """What selects finds the pods, and ports that are named exist."""
    pods = BASE["deployment"]["spec"]["template"]["metadata"]["labels"]
    service, monitor = BASE["service"], CUSTOM["ServiceMonitor"]
    policy, budget = BASE["network-policy"]["spec"], BASE["disruption-budget"]["spec"]
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == budget["selector"]["matchLabels"] == pods
    assert all(constraint["labelSelector"]["matchLabels"] == pods for constraint in POD["topologySpreadConstraints"])
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()

    ports = {port["name"] for port in POD["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    assert {port["port"] for port in chain.from_iterable(rule["ports"] for rule in policy["ingress"])} == ports
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert BASE["autoscaler"]["spec"]["scaleTargetRef"]["name"] == BASE["deployment"]["metadata"]["name"]


def test_the_autoscaler_asks_for_what_the_service_emits(client):
    (patch,) = yaml.safe_load((FOLDER / "components" / "prometheus" / "autoscaler.yaml").read_text())
    (rule,) = load(FOLDER / "components" / "prometheus" / "prometheus-adapter.yaml")["rules"]["custom"]
    assert patch["value"]["pods"]["metric"]["name"] == rule["name"]["as"]
    series = set(re.findall(r"\bconvmixer_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    emitted = set(re.findall(r"^(convmixer_\w+)", client.get("/metrics").text, re.MULTILINE))
    assert len(series) == 3
    assert series <= emitted
