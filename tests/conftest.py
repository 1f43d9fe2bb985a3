"""What every test may use: 200 real CIFAR-10 test images with labels, the artifact that ships, the real server."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import certifi
import httpx
import pytest

from benchmarks.server import ServerProcess

REPOSITORY = Path(__file__).parent.parent
IMAGES = Path(__file__).parent / "data" / "cifar10"


@pytest.fixture(scope="session", autouse=True)
def helper_without_coverage() -> None:
    """Starts Python's resource tracker, which tqdm would start later: it outlives pytest, and would leave a report."""
    measuring = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_PROCESS")}
    resource_tracker.ensure_running()
    os.environ.update(measuring)


@pytest.fixture(scope="session", autouse=True)
def own_settings() -> None:
    """What a developer has set for services, traces and proxies is not for those that are tested."""
    for name in list(os.environ):
        if name.startswith(("CONVMIXER_", "OTEL_")) or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def few_certificates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every client of httpx reads all that there are, in 40 ms; the tests make hundreds, and none needs more than one."""
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    path.write_text(first + end)
    os.environ["SSL_CERT_FILE"] = str(path)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Lets SIGINT interrupt the tests and what they start, also where a script's `make test &` has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Sample:
    """One real test image."""

    path: Path
    label: str

    @property
    def data(self) -> bytes:
        return self.path.read_bytes()


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    found = [Sample(path, path.parent.name) for path in sorted(IMAGES.glob("*/*.webp"))]
    assert len(found) == 200
    return found


@pytest.fixture(scope="session")
def artifact_path() -> Path:
    return REPOSITORY / "app" / "artifacts" / "fast.onnx"


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers with settings of a test's own; stops what is left of them."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(ServerProcess(**settings))


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """One server with default settings for all tests that do not disturb it."""
    with ServerProcess() as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def convmixer_on_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a shell finds this tree's `convmixer`, as its installation would make it."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "convmixer"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom app.cli import main\nmain()\n"
    )
    command.chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
