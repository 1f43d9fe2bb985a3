"""What pages of other origins may read (CORS), for answers written without Starlette's middleware."""

from __future__ import annotations

from collections.abc import Sequence

EXPOSED = ("X-Request-ID", "Retry-After", "Server-Timing", "Inference-Header-Content-Length")
"""Headers of an answer that scripts see, besides those that all may."""


def headers(allowed: Sequence[str], origin: bytes | None) -> dict[str, str]:
    """What the answer says of it, as `CORSMiddleware` does.

    Args:
        allowed: origins, or `*`.
        origin: the request's; None if what came of it does not tell: then it is taken for the allowed one, if there is just one.
    """
    if "*" in allowed:
        chosen: str | None = "*"
    elif origin is None:
        chosen = allowed[0] if len(allowed) == 1 else None
    else:
        chosen = next((one for one in allowed if one.encode() == origin), None)
    said = {} if chosen == "*" else {"Vary": "Origin"}
    if chosen:
        said |= {"Access-Control-Allow-Origin": chosen, "Access-Control-Expose-Headers": ", ".join(EXPOSED)}
    return said
