"""What a request is to the service, told by its path; and its id."""

from __future__ import annotations

import random
import re

from starlette.types import Scope

PROTECTED = ("/classify", "/v2/models")
"""Paths that ask for a key, if there are keys: what costs the machine's time, and what tells of its use."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def classifies(path: str) -> bool:
    """Whether requests to this path are work for the model: those that metrics count and traces show."""
    return path == "/classify" or (path.startswith("/v2/models/") and path.endswith("/infer"))


def routed_path(scope: Scope) -> str:
    """The request's path as routes have it: without the prefix below which a proxy or Ray Serve has put the service (ASGI 3)."""
    path: str = scope["path"]
    prefix = scope.get("root_path", "").rstrip("/")
    return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path


def choose_request_id(sent: bytes) -> str:
    """The client's own `X-Request-ID` if it is short and plain, else a new one."""
    return sent.decode() if sent and _REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"
