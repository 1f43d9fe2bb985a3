"""`convmixer bench`: how fast a running server answers, from where you sit."""

from __future__ import annotations

import io
import json
import math
import os
import ssl
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
import uvloop

from app.client import Client, Model
from app.load import Server, Tally, closed_loop, open_loop, poisson, prepare

_WARM_UP_S = 0.5
_VARIANTS = 256
_VARIANT_BYTES = 64 * 1024 * 1024
"""Of all variants together: large pictures, which the service does not compare, need few."""

_OWN_SHARE = 0.8
"""Of a core; a client busier than that measures itself."""


def bench(
    client: Client,
    url: str,
    api_key: str | None,
    clients: list[int],
    rate: float | None,
    seconds: float,
    images: list[Path],
    as_json: bool,
) -> bool:
    """Measures and prints.

    Args:
        client: of the server.
        url: of the server, as `client` has it.
        api_key: if it asks for one.
        clients: numbers of connections, each measured in turn.
        rate: requests a second at random times instead, whether or not earlier ones were answered.
        seconds: of each measurement.
        images: sent in turn; none: a picture made for the purpose.
        as_json: one JSON object instead of the table.

    Returns:
        Whether every request was answered with a prediction.

    Raises:
        ClientError: no service is there, or it does not answer the first request.
        typer.BadParameter: the address has a user's name or password.
    """
    if "@" in urlsplit(url).netloc:
        raise typer.BadParameter("bench sends no user's name and password: give an address without")
    bodies = [path.read_bytes() for path in images]
    model = client.model()
    bodies = bodies or [_picture(model.input_size)]
    for body in bodies:
        client.classify(body)
    server, host = _address(url)
    # the service computes identical images in flight once: bytes behind the image, which no decoder reads, tell them apart
    variants = max(1, min(_VARIANTS, _VARIANT_BYTES // sum(map(len, bodies))))
    different = [body + number.to_bytes(2, "big") for number in range(variants) for body in bodies]
    requests = [
        prepare(body, "application/octet-stream", [], api_key=api_key, host=host, prefix=server.prefix) for body in different
    ]
    if not as_json:
        _print_head(url, model, bodies)
    uvloop.run(closed_loop(server, requests, 1, min(_WARM_UP_S, seconds)))
    runs = []
    for count in [None] if rate else clients:
        begin_cpu = time.process_time()
        if count is None:
            tally = uvloop.run(open_loop(server, requests, poisson(rate or 0.0), seconds))
        else:
            tally = uvloop.run(closed_loop(server, requests, count, seconds))
        run = {"clients": count, "rate": rate} | _summary(tally, time.process_time() - begin_cpu)
        runs.append(run)
        if not as_json:
            _print_run(run)
    if as_json:
        card = {name: getattr(model, name) for name in ("name", "version", "sha256", "provider", "workers", "max_batch")}
        typer.echo(json.dumps({"url": url, "model": card, "image_bytes": [len(body) for body in bodies], "runs": runs}, indent=2))
    return not any(run["errors"] for run in runs)


def _address(url: str) -> tuple[Server, str]:
    parts = urlsplit(url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    return Server(parts.hostname or "", port, tls, parts.path.rstrip("/")), parts.netloc.rpartition("@")[2]


def _picture(side: int) -> bytes:
    """A PNG that hardly compresses, as photos do not."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _summary(tally: Tally, cpu_s: float) -> dict[str, Any]:
    errors = {str(status): len(times) for status, times in sorted(tally.failed.items())}
    errors |= {"connection": tally.lost} if tally.lost else {}
    errors |= {"no answer": tally.unanswered} if tally.unanswered else {}
    return {
        "seconds": round(tally.answered_s, 3),
        "requests": tally.sent,
        "requests_s": round(len(tally.right) / tally.answered_s, 1),
        "latency_ms": {name: _percentile_ms(tally.right, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "errors": errors,
        "client_cores": round(cpu_s / tally.answered_s, 3),
    }


def _percentile_ms(times: list[float], share: float) -> float | None:
    """Nearest rank; None without answers."""
    ordered = sorted(times)
    return round(ordered[math.ceil(share * len(ordered)) - 1] * 1000, 2) if ordered else None


def _print_head(url: str, model: Model, bodies: list[bytes]) -> None:
    typer.echo(
        f"{url}: {model.name} {model.version} on {model.provider}, {model.workers} workers, batches of up to {model.max_batch}"
    )
    sizes = ", ".join(f"{len(body):,}" for body in bodies[:5]) + (", …" if len(bodies) > 5 else "")
    typer.echo(f"{len(bodies)} image{'s' if len(bodies) > 1 else ''} of {sizes} bytes, one a request\n")
    typer.echo(f"{'load':>14} {'answered/s':>11} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8}  errors")


def _print_run(run: dict[str, Any]) -> None:
    load = f"{run['clients']} client{'s' if run['clients'] > 1 else ''}" if run["clients"] else f"{run['rate']:g}/s"
    latencies = " ".join(f"{'-' if ms is None else f'{ms:.1f}':>8}" for ms in run["latency_ms"].values())
    errors = ", ".join(f"{count} x {_words(name)}" for name, count in run["errors"].items()) or "none"
    typer.echo(f"{load:>14} {run['requests_s']:11.1f} {latencies}  {errors}")
    if run["client_cores"] > _OWN_SHARE:
        warning = f"this client used {run['client_cores']:.2f} of a core itself: the server may be faster than that"
        typer.secho(warning, fg="yellow", err=True)


def _words(error: str) -> str:
    return f"{error} {HTTPStatus(int(error)).phrase}" if error.isdigit() and int(error) in set(HTTPStatus) else error
