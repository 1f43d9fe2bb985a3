"""The socket that several processes share, and when one is replaced. What they do: tests/system/test_processes.py."""

import socket
import time

import pytest

from app.processes import Supervisor, _bind
from app.settings import Settings
from tests.ipv6 import needs_ipv6


@needs_ipv6
def test_an_address_of_ipv6_means_the_same_for_several_processes_as_for_one():
    with _bind(Settings(host="::", port=0)) as bound:
        assert bound.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1, "as uvloop opens it"
    with _bind(Settings(host="127.0.0.1", port=0)) as bound:
        assert bound.family == socket.AF_INET


def test_a_process_that_does_not_start_any_more_is_tried_ever_more_rarely():
    supervisor = Supervisor(Settings(processes=2), [], {})
    supervisor._ever_ready = True
    pauses = []
    for pid in range(6):
        supervisor._started[pid] = begin = time.monotonic()
        supervisor._ended(pid, 1)
        pauses.append(supervisor._due.pop() - begin)
    assert pauses == pytest.approx([2, 4, 8, 16, 16, 16])
