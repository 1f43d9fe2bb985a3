"""The web application. Nothing is loaded at import: the lifespan verifies, loads, warms up, serves and drains."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import start_http_server
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from app import __version__
from app.api import classify, health, problems
from app.api.open_inference import routes as open_inference
from app.errors import StartupError
from app.protection import ApiKeys, App, RequestGuard, Scope
from app.service import Service
from app.settings import Settings

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None) -> App:
    """Builds the application: FastAPI behind the guard.

    The guard stands outside of FastAPI and not among its middleware, because its own entrance costs more than the guard.

    Args:
        settings: None reads the environment.

    Raises:
        StartupError: a setting is wrong. (A wrong artifact or provider raises it when the lifespan starts.)
    """
    settings = settings or Settings.load()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Service]]:
        try:
            service = Service(settings)
            close_metrics = _serve_metrics(settings, service)
        except StartupError as error:
            logger.critical("the service does not start: %s", error)
            raise
        yield {"service": service}
        close_metrics()
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="convmixer-serve",
        version=__version__,
        summary="Image classification with ConvMixer",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.include_router(classify.router)
    app.include_router(open_inference.router)
    app.include_router(health.router)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router)
    problems.install(app)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["X-Request-ID"]
        )
    return RequestGuard(
        app,
        keys=ApiKeys(settings.keys()),
        max_body_bytes=settings.max_body_bytes,
        answer_failure=problems.answer_failure,
        on_response=_count,
    )


def _serve_metrics(settings: Settings, service: Service) -> Callable[[], None]:
    """Opens the metrics' own port if there is one; returns what closes it."""
    if settings.metrics_port is None:
        return lambda: None
    try:
        server, thread = start_http_server(settings.metrics_port, settings.host, service.metrics.registry)
    except OSError as error:
        raise StartupError(f"CONVMIXER_METRICS_PORT={settings.metrics_port}: {error.strerror}") from error

    def close() -> None:
        server.shutdown()
        thread.join()

    return close


def _count(scope: Scope, status: int) -> None:
    path: str = scope["path"]
    if path == "/classify" or (path.startswith("/v2/models/") and path.endswith("/infer")):
        service: Service = scope["state"]["service"]
        service.metrics.count_request(status)
