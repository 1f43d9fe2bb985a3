"""The four parts, those of the service, and who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from app.errors import ServiceError

FORBIDDEN = {
    "app": {"model", "training", "torch", "torchvision", "onnx"},
    "model": {"app", "training", "pictures"},
    "pictures": {"app", "model", "training", "torch", "torchvision"},
    "training": {"app"},
}


LAYERS = {
    "app.client": {"app.client"},
    "app.engine": {"app.engine", "app.errors", "app.images", "app.memory"},
    "app.telemetry": {"app", "app.telemetry", "app.engine.outcome", "app.errors", "app.request", "app.settings", "app.text"},
}
"""What modules of these packages may import of `app`, but for what only the type checker reads."""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Names of modules and the lines where they are imported; those below `if TYPE_CHECKING` are left out."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    for node in waiting:  # grows
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", node.lineno


def lies_in(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_stay_within_the_contracts(package, repository):
    for path in (repository / package).rglob("*.py"):
        for name, line in imports(path):
            assert not lies_in(name, FORBIDDEN[package]), f"{path}:{line}"


@pytest.mark.parametrize("package", LAYERS)
def test_parts_of_the_service_know_only_what_lies_below_them(package, repository):
    for path in (repository / package.replace(".", "/")).rglob("*.py"):
        for name, line in imports(path):
            allowed = not name.startswith("app") or name in LAYERS[package] or lies_in(name, LAYERS[package] - {"app"})
            assert allowed, f"{path}:{line}: {name}"


def test_nothing_else_imports_what_is_for_ray(repository):
    for path in (repository / "app").rglob("*.py"):
        if path.parent.name != "ray":
            assert not any(lies_in(name, {"app.ray"}) for name, _ in imports(path)), path


def test_every_module_of_the_service_has_its_place(repository):
    """In the table of docs/architecture.md."""
    table = (repository / "docs" / "architecture.md").read_text().partition("### Modules")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+)`", table))
    app = repository / "app"
    modules = {path.relative_to(app).with_suffix("").as_posix() for path in app.rglob("*.py")}
    assert named == {name for name in modules if not name.endswith("__init__")}


def test_serving_loads_neither_torch_nor_the_progress_of_training():
    code = (
        "import sys, app.main, app.cli; print(sorted({'torch', 'onnx', 'model', 'training', 'PIL.ImageTk'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_failure_is_documented_with_its_status(repository):
    """docs/api.md has one table row a ServiceError: status, code."""
    rows = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \|", (repository / "docs" / "api.md").read_text(), re.MULTILINE))
    assert rows == {(str(int(error.status)), error.code) for error in (ServiceError, *ServiceError.__subclasses__())}
