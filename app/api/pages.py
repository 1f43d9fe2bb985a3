"""The pages: `/` to try the model, `/card` to read about it, `/docs` and `/openapi.json` for the API, and their files in `/web`.

Everything comes from this package and the folder of the artifact; a strict Content-Security-Policy makes sure that a
browser fetches nothing else and runs nothing that is not in a file here. Files are read when first asked for, so the
start does not wait for them.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.codings import choose_coding
from app.service import Service

WEB = Path(__file__).parent.parent / "web"

_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".webp": "image/webp"}
"""What is served from `app/web` as it is; the rest there are parts of pages. (`mimetypes` asks the machine's own tables.)"""

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for each time: after an update nobody sees old parts with new ones
    "Vary": "Accept-Encoding",
}


def or_the_page(not_found: ASGIApp) -> ASGIApp:
    """What answers paths that no route has: the prefix itself, below which a proxy has put the service, leads to the page.

    Args:
        not_found: answers all others.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        prefix = scope.get("root_path", "")
        if prefix and scope["path"] == prefix and scope.get("method") in {"GET", "HEAD"}:  # a WebSocket's has none
            await RedirectResponse(f"{prefix.rpartition('/')[2]}/")(scope, receive, send)  # relative: Host may be anything
        else:
            await not_found(scope, receive, send)

    return answer


@dataclass(frozen=True)
class Asset:
    """One answer, ready to send.

    Attributes:
        body: as it is.
        zipped: the same in gzip, or None if that would hardly be smaller.
        etag: weak, because it stands for both (RFC 9110, 8.8.3).
        media_type: without the charset.
    """

    body: bytes
    zipped: bytes | None
    etag: str
    media_type: str


# Not coroutines: Starlette runs these on a thread, so that reading and compressing never hold up the event loop.


def home(request: Request) -> Response:
    """The page to try the model."""
    return _send(request, _page("What is in the picture?", WEB / "index.html"))


def documentation(request: Request) -> Response:
    """The API, drawn from `/openapi.json`."""
    return _send(request, _page("API", WEB / "docs.html"))


def schema(request: Request) -> Response:
    """The OpenAPI document."""
    with _schema_lock:  # or all who come first would build it, each for himself
        asset = _schema(request.app)
    return _send(request, asset)


def card(request: Request) -> Response:
    """The model card that lies beside the artifact, as `convmixer-train card` writes it."""
    service: Service = request.state.service
    path = service.settings.artifact_path().with_suffix(".card.html")
    if path.is_file():
        return _send(request, _page("Model card", path))
    return _send(request, _page("Model card", WEB / "no-card.html"), HTTPStatus.NOT_FOUND)


def file(request: Request) -> Response:
    """A style sheet, script or picture of the pages."""
    name = request.path_params["name"]
    path = _files().get(name)
    if path is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"there is no file {name!r} among the pages' files")
    return _send(request, _asset(path))


ROUTES = [
    Route("/", home),
    Route("/card", card),
    Route("/docs", documentation),
    Route("/openapi.json", schema),
    Route("/web/{name:path}", file),
]
"""Not FastAPI's kind: they have no parameters to examine and no place in the schema."""


@functools.cache
def _files() -> dict[str, Path]:
    """All that is there, by name: what a client sends is never made a path."""
    return {path.relative_to(WEB).as_posix(): path for path in WEB.rglob("*") if path.suffix in _MEDIA_TYPES}


@functools.cache
def _asset(path: Path) -> Asset:
    return _prepare(path.read_bytes(), _MEDIA_TYPES[path.suffix])


@functools.cache
def _page(title: str, main: Path) -> Asset:
    """A part put into the shell that all pages share."""
    shell = (WEB / "shell.html").read_text(encoding="utf-8")
    return _prepare(
        shell.replace("<!-- title -->", title).replace("<!-- main -->", main.read_text(encoding="utf-8")).encode(), "text/html"
    )


_schema_lock = threading.Lock()


@functools.cache
def _schema(app: FastAPI) -> Asset:
    # FastAPI's own route builds it in the event loop, a tenth of a second, and writes it down again for every request
    return _prepare(to_json(_with_headers(_with_keys(app.openapi()))), "application/json")


def _with_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Adds that a key may be sent wherever its lack is told of; FastAPI knows only of dependencies, which cost each request."""
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "If the service has keys (`CONVMIXER_API_KEYS`)."}
    }
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        if "401" in operation["responses"]:
            operation["security"] = [{}, {"key": []}]
    return document


_ALWAYS = {"X-Request-ID": "The request's own, or one that was made."}
_OF_STATUS = {
    "401": {"WWW-Authenticate": "How a key is shown; whether one was."},
    "415": {"Accept": "What is read, if it was the Content-Type.", "Accept-Encoding": "What is read, if it was the coding."},
    "503": {"Retry-After": "Seconds after which trying again makes sense."},
}


def _with_headers(document: dict[str, Any]) -> dict[str, Any]:
    """Adds what answers say in headers, which FastAPI would have said of each route anew."""
    for path, operations in document["paths"].items():
        for status, answer in ((status, answer) for of in operations.values() for status, answer in of["responses"].items()):
            said = _ALWAYS if path in {"/livez", "/readyz"} else _ALWAYS | _OF_STATUS.get(status, {})
            told = {name: {"description": text, "schema": {"type": "string"}} for name, text in said.items()}
            answer["headers"] = {**told, **answer.get("headers", {})}
    return document


def _prepare(body: bytes, media_type: str) -> Asset:
    zipped = gzip.compress(body, mtime=0)
    return Asset(
        body,
        zipped if len(zipped) < 0.9 * len(body) else None,
        f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
        media_type,
    )


def _send(request: Request, asset: Asset, status: HTTPStatus = HTTPStatus.OK) -> Response:
    headers = {**_HEADERS, "ETag": asset.etag}
    # the weak comparison (RFC 9110, 8.8.3.2)
    known = {tag.strip().removeprefix("W/") for line in request.headers.getlist("if-none-match") for tag in line.split(",")}
    if status == HTTPStatus.OK and known & {"*", asset.etag.removeprefix("W/")}:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if asset.zipped and choose_coding(",".join(request.headers.getlist("accept-encoding")), {"gzip"}):
        return Response(asset.zipped, status, {**headers, "Content-Encoding": "gzip"}, asset.media_type)
    return Response(asset.body, status, headers, asset.media_type)
