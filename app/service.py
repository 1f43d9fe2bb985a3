"""The running service without HTTP: settings, model, scheduler and metrics, built once and closed once.

The web application and the command line's local `classify` share it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from app.api.open_inference.statistics import InferenceStatistics
from app.budget import ByteBudget
from app.cores import available_cores
from app.engine.artifact import read_verified
from app.engine.calibration import calibrate
from app.engine.scheduler import Scheduler
from app.engine.session import Session
from app.images import DecodeLimits
from app.keys import ApiKeys
from app.settings import Settings
from app.telemetry.exchange import Exchange, Watcher
from app.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from app.telemetry.siblings import GatheredMetrics

logger = logging.getLogger(__name__)

_LAST_BATCH_S = 1.0
"""For what the workers have in hand, though the time for a graceful end is over."""


def open_session(settings: Settings, share: int = 1) -> Session:
    """The model that the settings name: verified, loaded and warm.

    Args:
        settings: all of them.
        share: processes that share this machine's cores (`app.processes`).

    Raises:
        StartupError: the artifact, the provider or a setting is wrong.
    """
    verified = read_verified(settings.artifact_path(), settings.model_sha256)
    cores = max(1, (settings.cores or available_cores()) // share)
    return Session(verified, settings.provider, precision=settings.precision, cores=cores)


class Service:
    """Measures how the machine runs the model, and starts the scheduler.

    Args:
        settings: all of them.
        keys: who may ask over HTTP; None: everybody.
        session: as `open_session` gives it; None opens one.

    Attributes:
        gathered: the metrics of all processes behind one address; None if there is one process.
        leaving: set when the process was told to stop and still answers (`CONVMIXER_SHUTDOWN_DELAY_S`).
        drain_by: time.monotonic() at which what is in work must be done; None until the server has begun to wait for it.
        watchers: told of answers: the access log, the traces.
        long_json: held by the request whose long JSON is read: parsers do not run beside one another anyway (they need the
            interpreter's lock), and what they build is several times what was sent. (Ray Serve may cancel one that is read; that
            thread goes on beside the next.)

    Raises:
        StartupError: the artifact, the provider or a setting is wrong.
    """

    def __init__(self, settings: Settings, keys: ApiKeys | None = None, session: Session | None = None) -> None:
        self.settings = settings
        self.keys = keys or ApiKeys([])
        self.leaving = False
        self.drain_by: float | None = None
        self.gathered: GatheredMetrics | None = None
        self.session = session or open_session(settings)
        self.sha256 = self.session.sha256
        self.metadata = self.session.metadata
        self.metrics = Metrics(self.metadata.classes)
        self.watchers: list[Watcher] = []
        self.statistics = InferenceStatistics()
        self.bodies = ByteBudget(settings.max_held_bytes)
        self.long_json = asyncio.Lock()
        self.calibration = calibrate(self.session, self.session.cores, workers=settings.workers, max_batch=settings.max_batch)
        limits = DecodeLimits(settings.max_pixels, settings.max_side)
        limits.apply_to_pillow()
        self.scheduler = Scheduler(
            self.session,
            self.metadata.resize,
            limits,
            workers=self.calibration.workers,
            max_batch=self.calibration.max_batch,
            max_queue=settings.max_queue,
            coalesce=settings.coalesce,
            image_s=self.calibration.image_s,
            on_batch=self.metrics.observe_batch,
            on_failure=self.metrics.observe_failure,
        )
        self.metrics.publish(self)
        logger.info(
            "serving %s %s (%d classes, sha256 %s…) on %s: %d workers, batches of up to %d, "
            "%.2f ms an image; measured in %.0f ms",
            self.metadata.name,
            self.metadata.version,
            len(self.metadata.classes),
            self.sha256[:12],
            self.session.provider,
            self.scheduler.workers,
            self.scheduler.max_batch,
            self.calibration.batch_ms[1],
            self.calibration.seconds * 1000,
        )

    def not_ready(self) -> str | None:
        """Why no more requests should be sent here, or None."""
        return "draining" if self.leaving or self.scheduler.draining else self.scheduler.failure()

    def is_watched(self, status: int, seconds: float) -> bool:
        """Whether a watcher is to be told of such an answer."""
        for watcher in self.watchers:  # noqa: SIM110 - a generator costs more than all that it asks
            if watcher.wants(status, seconds):
                return True
        return False

    def tell(self, exchange: Exchange) -> None:
        """Tells the watchers of an answer; a watcher that fails takes neither the answer nor the server with it."""
        for watcher in self.watchers:
            try:
                watcher(exchange)
            except Exception:
                logger.exception("%s was not told of an answer", type(watcher).__name__)

    def close(self) -> None:
        """Drains: everything accepted is answered, within what is left of `drain_timeout_s`, but at least a second."""
        allowed_s = self.settings.drain_timeout_s
        left_s = allowed_s if self.drain_by is None else max(_LAST_BATCH_S, self.drain_by - time.monotonic())
        if not self.scheduler.drain(left_s):
            logger.warning("not everything was finished within %d s", self.settings.drain_timeout_s)
