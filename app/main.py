"""The web application. Nothing is loaded at import: the lifespan verifies, loads, warms up, serves and drains."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app import __version__
from app.api import classify, health, pages, problems
from app.api.open_inference import routes as open_inference
from app.cross_origin import EXPOSED
from app.engine.session import Session
from app.errors import StartupError
from app.keys import ApiKeys
from app.protection import RequestGuard
from app.service import Service
from app.settings import Settings
from app.telemetry.logs import AccessLog
from app.telemetry.metrics_port import metrics_server
from app.telemetry.siblings import GatheredMetrics, tell_metrics
from app.telemetry.traces import open_traces

logger = logging.getLogger(__name__)


def create_app(settings: Settings | None = None, siblings: Path | None = None, opened: Future[Session] | None = None) -> ASGIApp:
    """Builds the application: FastAPI behind the guard.

    The guard stands outside of FastAPI and not among its middleware, because its own entrance costs more than the guard.

    Args:
        settings: None reads the environment.
        siblings: folder in which the processes behind one address meet (`app.processes`).
        opened: the model, if somebody is at it already (`app.service.open_session`); else the lifespan opens it.

    Raises:
        StartupError: a setting is wrong. (A wrong artifact or provider raises it when the lifespan starts.)
    """
    settings = settings or Settings.load()
    keys = ApiKeys(settings.keys())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Service]]:
        async with AsyncExitStack() as stack:
            try:
                service = Service(settings, keys, opened.result() if opened else None)
                for sentence in settings.contradictions():
                    logger.warning("%s", sentence)
                close_traces = _watch(settings, service)
                stack.push_async_callback(run_in_threadpool, close_traces)
                stack.push_async_callback(run_in_threadpool, service.close)
                if siblings:
                    service.gathered = GatheredMetrics(siblings)
                    await stack.enter_async_context(tell_metrics(siblings, service.metrics.registry))
                else:  # with siblings it is their parent's
                    stack.enter_context(metrics_server(settings, service.metrics.registry))
            except StartupError as error:
                logger.critical("the service does not start: %s", error)
                raise
            yield {"service": service}

    app = FastAPI(
        title="convmixer-serve",
        version=__version__,
        summary="Image classification with ConvMixer",
        lifespan=lifespan,
        openapi_url=None,  # `pages` has it, and /docs, for which FastAPI loads scripts from another host
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to an address made from the client's own Host, without TLS behind a proxy that has it
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.include_router(classify.router)
    app.include_router(open_inference.router)
    app.include_router(health.router)
    app.router.routes.extend(pages.ROUTES)
    app.router.default = pages.or_the_page(app.router.default)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router)
    problems.install(app)
    guarded = RequestGuard(app)
    origins = settings.origins()
    if not origins:
        return guarded
    # around the guard: a preflight brings no key, and scripts may read only answers that allow it, refusals too
    methods = ["GET", "HEAD", "POST"]
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=methods, allow_headers=["*"], expose_headers=EXPOSED)


def _watch(settings: Settings, service: Service) -> Callable[[], None]:
    """Opens traces and access log, if asked for; returns what sends the last of the traces."""
    traces = open_traces()
    if traces:
        service.watchers.append(traces)  # first: the log then has its trace id
    if settings.access_log != "off":
        service.watchers.append(AccessLog(settings.access_log))
    return traces.close if traces else lambda: None
