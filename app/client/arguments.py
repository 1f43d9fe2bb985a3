"""What callers may pass, checked before anything is sent."""

from __future__ import annotations

import httpx

_MAX_PORT = 65535


def check_url(url: str, api_key: str | None = None) -> str:
    """The service's address, as it must be.

    Args:
        url: with or without a path.
        api_key: that is to be sent there.

    Raises:
        ValueError: no http or https address, or one with a user's name beside a key: there is one header for both.
    """
    example = "it begins with http:// or https://, e.g. http://127.0.0.1:8000"
    try:
        parsed = httpx.URL(url)
        port = parsed.port
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no address: {error}; {example}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} is no address; {example}")
    if parsed.userinfo and api_key is not None:
        raise ValueError("the address has a user's name, and there is an API key: both are sent as Authorization; leave one out")
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise ValueError(f"{url!r} is no address: there is no port {port}; {example}")
    return url


def check_deadline(deadline_s: float) -> float:
    """A deadline that the service takes.

    Args:
        deadline_s: seconds.

    Raises:
        ValueError: out of range.
    """
    if not 0.001 <= deadline_s <= 3600:
        raise ValueError(f"deadline_s must be between 0.001 and 3600 seconds, not {deadline_s}")
    return deadline_s


def check_count(name: str, count: int) -> int:
    """A number of which there must be one at least: with room for no request, all would wait for ever.

    Args:
        name: of the argument.
        count: its value.

    Raises:
        ValueError: less than 1.
    """
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    return count


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries the key (RFC 6750).

    Args:
        api_key: None: no header.

    Raises:
        ValueError: no header can carry it. httpx would say so at each request, and show the key.
    """
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise ValueError("the API key must be one line of printable ASCII, without spaces around it")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
