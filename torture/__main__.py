"""`python -m torture`: runs the attacks and writes docs/reliability.md."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.serve import processor
from benchmarks.server import REPOSITORY
from torture.fuzz import fuzz, pieces
from torture.memory import bombs, chunks, failures, large_bodies, soak
from torture.rolling import rolling
from torture.slow import slow_clients
from torture.target import Finding
from torture.traffic import leavers, mixed, overload, restarts

REPORT = REPOSITORY / "docs" / "reliability.md"
_BEGIN, _END = "<!-- begin: make torture -->\n", "<!-- end: make torture -->"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names of attacks; default: all.")] = None,
    inputs: Annotated[int, typer.Option(help="Fuzzed inputs.")] = 100_000,
    seeds: Annotated[Path | None, typer.Option(help="More files to damage, e.g. Tests/images of Pillow's source.")] = None,
    seconds: Annotated[int, typer.Option(help="Length of each overload.")] = 10,
    slow_seconds: Annotated[int, typer.Option(help="Length of each attack by slow clients.")] = 60,
    soak_seconds: Annotated[int, typer.Option(help="Length of the mixed load.")] = 120,
    times: Annotated[int, typer.Option(help="Restarts under load.")] = 20,
    rolling_seconds: Annotated[int, typer.Option(help="Length of the restarts behind HAProxy.")] = 30,
) -> None:
    """Attacks the real server; exits with 1 if a promise was broken. A full run is written to docs/reliability.md."""
    attacks: dict[str, Callable[[], Finding | list[Finding]]] = {
        "fuzz": lambda: fuzz(inputs, seeds),
        "pieces": pieces,
        "bombs": bombs,
        "failures": failures,
        "bodies": large_bodies,
        "chunks": chunks,
        "mixed": lambda: mixed(10_000),
        "leavers": leavers,
        "restarts": lambda: restarts(times),
        "rolling": lambda: rolling(rolling_seconds),
        "overload": lambda: overload(seconds),
        "slow": lambda: slow_clients(slow_seconds),
        "soak": lambda: soak(soak_seconds),
    }
    unknown = set(only or ()) - attacks.keys()
    if unknown:
        raise typer.BadParameter(f"no attack {', '.join(sorted(unknown))}; known: {', '.join(attacks)}")
    findings: list[Finding] = []
    for name in only or attacks:
        found = attacks[name]()
        for finding in found if isinstance(found, list) else [found]:
            typer.secho(f"{'kept  ' if finding.kept else 'BROKEN'} {finding.promise}: {finding.figure}", bold=not finding.kept)
            findings.append(finding)
    if not only:
        _write(findings)
    if not all(finding.kept for finding in findings):
        raise SystemExit(1)


def _write(findings: list[Finding]) -> None:
    text = REPORT.read_text()
    head, _, rest = text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    rows = "".join(f"| {f.promise} | {f.figure} | {'kept' if f.kept else '**not kept**'} |\n" for f in findings)
    where = f"{processor()}, Python {platform.python_version()}; attackers and server share the machine.\n\n"
    REPORT.write_text(f"{head}{_BEGIN}{where}| promise | measured | |\n|---|---|---|\n{rows}{_END}{tail}")


typer.run(main)
