"""The socket that several processes share. What they do with it: tests/system/test_processes.py."""

import socket

import pytest

from app.processes import _bind
from app.settings import Settings


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_address_of_ipv6_means_the_same_for_several_processes_as_for_one():
    with _bind(Settings(host="::", port=0)) as bound:
        assert bound.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1, "as uvloop opens it"
    with _bind(Settings(host="127.0.0.1", port=0)) as bound:
        assert bound.family == socket.AF_INET
