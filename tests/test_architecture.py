"""The four parts and who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from app.errors import ServiceError

FORBIDDEN = {
    "app": {"model", "training", "torch", "torchvision", "onnx"},
    "model": {"app", "training", "pictures"},
    "pictures": {"app", "model", "training", "torch", "torchvision"},
    "training": {"app"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_stay_within_the_contracts(package, repository):
    for path in (repository / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & FORBIDDEN[package], f"{path}:{node.lineno}"


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
