"""Metrics of several processes: sockets that play the processes, asked by the real collector."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack

from prometheus_client import CollectorRegistry, generate_latest

from app.telemetry.siblings import ParentMetrics, Siblings, socket_path

TIMEOUT_S = 60


def text_of(folder) -> str:
    registry = CollectorRegistry()
    registry.register(Siblings(folder))
    return generate_latest(registry).decode()


def test_processes_are_asked_at_once(tmp_path):
    """Each tells only when all have been asked: one after the other, each would be waited for in vain."""
    together = threading.Barrier(3)

    def tell(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            together.wait(TIMEOUT_S)
            connection.sendall(b"# TYPE convmixer_ready gauge\nconvmixer_ready 1.0\n")

    with ExitStack() as stack:
        for pid in (1, 2, 3):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(socket_path(tmp_path, pid)))
            listening.listen()
            threading.Thread(target=tell, args=[listening], daemon=True).start()
        text = text_of(tmp_path)
    assert [f'convmixer_ready{{process="{pid}"}} 1.0' in text for pid in (1, 2, 3)] == [True] * 3


def test_what_the_parent_could_not_write_is_written_later(tmp_path, caplog):
    parent = ParentMetrics(2)
    for _ in range(3):
        parent.leave(tmp_path / "full")
    assert len(caplog.records) == 1
    (tmp_path / "full").mkdir()
    parent.leave(tmp_path / "full")
    assert "convmixer_processes 2.0" in text_of(tmp_path / "full")
    parent.replacements += 1
    parent.leave(tmp_path / "full")
    assert "convmixer_process_replacements_total 1.0" in text_of(tmp_path / "full")
