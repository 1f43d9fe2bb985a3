"""The web application. Nothing is loaded at import: the lifespan verifies, loads, warms up, serves and drains."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from app import __version__
from app.api import classify, health, problems
from app.errors import StartupError
from app.protection import App, RequestGuard, Scope
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
        except StartupError as error:
            logger.critical("the service does not start: %s", error)
            raise
        yield {"service": service}
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="convmixer-serve",
        version=__version__,
        summary="Image classification with ConvMixer",
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.include_router(classify.router)
    app.include_router(health.router)
    problems.install(app)
    return RequestGuard(app, max_body_bytes=settings.max_body_bytes, answer_failure=problems.answer_failure, on_response=_count)


def _count(scope: Scope, status: int) -> None:
    if scope["path"] == "/classify":
        service: Service = scope["state"]["service"]
        service.metrics.count_request(status)
