"""Which content coding an answer gets (RFC 9110, 12.5.3)."""

from __future__ import annotations

import pytest

from app.api.codings import choose_coding


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ("", None),
        ("br", None),
        ("identity", None),
        ("gzip", "gzip"),
        ("GZIP , deflate", "gzip"),
        ("deflate, gzip", "gzip"),
        ("deflate;q=0.1,gzip;q=1", "gzip"),
        ("gzip;q=0.1, deflate; q=0.5", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.000", None),
        ("*", "gzip"),
        ("*;q=0", None),
        ("gzip;q=0, *", "deflate"),
        ("gzip;quality=high", "gzip"),
    ],
)
def test_the_one_that_the_client_likes_best(accepted, chosen):
    assert choose_coding(accepted, ["gzip", "deflate"]) == chosen
