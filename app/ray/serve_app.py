"""Our HTTP API as a Ray Serve application: `serve run app.ray.serve_app:app` (docs/ray.md).

A replica is one engine (`app.service.Service`) on the CPUs that Ray reserves for it, behind the same ASGI application
that `convmixer serve` runs. Batches are formed by our scheduler, and refusals (503 with Retry-After) come from our
admission: Serve hands over more requests than a replica would ever admit, so none wait where nobody predicts how long.
"""

from __future__ import annotations

import os
from typing import cast

import ray
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.main import create_app
from app.service import Service
from app.settings import ENV_PREFIX, Settings
from app.telemetry.logs import configure_logging


class ReplicaApp:
    """Gives every request what the lifespan yielded: Serve runs the lifespan but does not pass its state on (ASGI 3).

    Args:
        app: the ASGI application.

    Attributes:
        state: the lifespan's state; empty until it has started.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.state: dict[str, Service] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one scope (ASGI 3)."""
        if scope["type"] == "lifespan":
            self.state = scope["state"]
            await self.app(scope, receive, send)
            return
        sent_id = (b"x-request-id", dict(scope["headers"]).get(b"x-request-id"))

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # Serve's proxy adds the same header again
                message["headers"] = [header for header in message["headers"] if header != sent_id]
            await send(message)

        await self.app({**scope, "state": dict(self.state)}, receive, send_one_id)


def assigned_settings() -> Settings:
    """The environment's settings with `cores` as many as Ray reserved for this worker, unless it is set.

    Raises:
        StartupError: a setting is wrong.
    """
    if f"{ENV_PREFIX}CORES" in os.environ:
        return Settings.load()
    return Settings.load(cores=max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))


def build_app() -> ReplicaApp:
    """The replica's application; called on the replica.

    Raises:
        StartupError: a setting is wrong.
    """
    settings = assigned_settings()
    configure_logging(settings.log_level, settings.log_format)
    return ReplicaApp(create_app(settings))


@serve.deployment(
    ray_actor_options={"num_cpus": 2},
    # with 8 requests at once two cores are as busy as with 128 (docs/performance.md): more want another replica
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 8},
    # above CONVMIXER_MAX_QUEUE, so that the replica says no and not the router, which would let them wait in silence
    max_ongoing_requests=2048,
    max_queued_requests=2048,
    health_check_period_s=5,
    # longer than CONVMIXER_DRAIN_TIMEOUT_S, within which the lifespan's end answers what was accepted
    graceful_shutdown_timeout_s=30,
)
@serve.ingress(build_app)
class Classifier:
    """One replica."""

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises.

        Raises:
            RuntimeError: an inference worker died or hangs; what `/livez` says.
        """
        failure = cast("ReplicaApp", self.app).state["service"].scheduler.failure()  # type: ignore[attr-defined]
        if failure:
            raise RuntimeError(failure)


app = Classifier.bind()  # type: ignore[attr-defined]
