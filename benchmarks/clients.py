"""The clients of `app.load` in a process of their own, so that they and the measuring process do not share an interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

from app.load import Request, Server, Tally, poisson, steady
from app.load import closed_loop as _closed_loop
from app.load import open_loop as _open_loop


def closed_loop(port: int, requests: list[Request], clients: int, seconds: float) -> Tally:
    """So many clients, each with one connection, that send a request when the last was answered."""
    return _in_process(_measure_closed, port, requests, clients, seconds)


def open_loop(port: int, requests: list[Request], rate: float, seconds: float, *, at_random: bool = False) -> Tally:
    """Requests at a rate, whether or not earlier ones were answered; as many connections as that takes.

    Args:
        port: of the server.
        requests: in turn.
        rate: requests a second.
        seconds: to measure.
        at_random: a Poisson process in place of even intervals.
    """
    return _in_process(_measure_open, port, requests, rate, seconds, at_random)


async def _measure_closed(port: int, requests: list[Request], clients: int, seconds: float) -> Tally:
    return await _closed_loop(Server("127.0.0.1", port), requests, clients, seconds)


async def _measure_open(port: int, requests: list[Request], rate: float, seconds: float, at_random: bool) -> Tally:
    due = poisson(rate) if at_random else steady(rate)
    return await _open_loop(Server("127.0.0.1", port), requests, due, seconds)


def _in_process(measure: Callable[..., object], *arguments: object) -> Tally:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Tally] = context.Queue()
    process = context.Process(target=_run, args=(measure, arguments, results))
    process.start()
    tally = results.get(timeout=300)
    process.join()
    return tally


def _run(measure: Callable[..., object], arguments: tuple[object, ...], results: multiprocessing.Queue[object]) -> None:
    import uvloop

    results.put(uvloop.run(measure(*arguments)))  # type: ignore[arg-type]
