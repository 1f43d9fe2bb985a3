"""The version is the same wherever it is written."""

from __future__ import annotations

import re

import pytest
import yaml

import app


def test_the_changelog_has_it(repository):
    newest = re.search(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", (repository / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == app.__version__


@pytest.mark.parametrize(("overlay", "variant"), [("cpu", ""), ("gpu", "-gpu")])
def test_overlays_run_its_image(repository, overlay, variant):
    manifest = yaml.safe_load((repository / "deploy" / "kubernetes" / "overlays" / overlay / "kustomization.yaml").read_text())
    assert [image["newTag"] for image in manifest["images"]] == [app.__version__ + variant]


def test_kserve_runs_its_image(repository):
    manifest = yaml.safe_load((repository / "deploy" / "kubernetes" / "kserve" / "inference-service.yaml").read_text())
    (container,) = manifest["spec"]["predictor"]["containers"]
    assert container["image"].rpartition(":")[2] == app.__version__
