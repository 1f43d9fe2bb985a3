"""What the images install is pinned, hashed, and what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pins(text: str) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


@pytest.mark.parametrize(("variant", "extra"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_images_install_hashed_pins_of_everything_that_is_asked_for(repository, variant, extra):
    locked = (repository / "requirements" / f"{variant}.txt").read_text()
    pinned = pins(locked)
    entries = re.split(r"^(?=\S)", locked, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pinned)
    assert all("--hash=sha256:" in entry for entry in entries)

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"][extra], *project["optional-dependencies"]["otel"]]:
        asked = Requirement(text)
        assert asked.specifier.contains(pinned[canonicalize_name(asked.name)]), f"{text}: run make pins"

    tested = pins((repository / "constraints.txt").read_text())
    differing = {name for name, version in pinned.items() if tested.get(name, version) != version}
    assert not differing, "run make pins"
