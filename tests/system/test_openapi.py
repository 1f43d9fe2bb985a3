"""Whatever the OpenAPI document allows or forbids, the server answers as the document says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("schemathesis.toml")


def test_schemathesis_finds_nothing(start):
    url = start().wait_until_ready()
    options = ["--max-examples", "40", "--generation-deterministic", "--phases", "coverage,fuzzing", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated
    assert int(generated[1]) > 100
