"""The running service without HTTP: settings, model, scheduler and metrics, built once and closed once.

The web application and the command line's local `classify` share it.
"""

from __future__ import annotations

import logging
import math

from app.engine.artifact import read_verified
from app.engine.calibration import calibrate
from app.engine.scheduler import Scheduler
from app.engine.session import Session, available_cores
from app.images import DecodeLimits
from app.protection import ApiKeys, ByteBudget
from app.settings import Settings
from app.telemetry import Metrics

logger = logging.getLogger(__name__)


class Service:
    """Verifies the artifact, opens a session, warms it up and starts the scheduler.

    Args:
        settings: all of them.

    Raises:
        StartupError: the artifact, the provider or a setting is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        verified = read_verified(settings.artifact_path(), settings.model_sha256)
        self.sha256 = verified.sha256
        cores = settings.cores or available_cores()
        self.session = Session(verified, settings.provider, lone_threads=cores)
        self.metadata = self.session.metadata
        self.metrics = Metrics()
        self.keys = ApiKeys(settings.keys())
        self.bodies = ByteBudget(settings.max_held_bytes)
        self.calibration = calibrate(self.session, cores, workers=settings.workers, max_batch=settings.max_batch)
        limits = DecodeLimits(settings.max_pixels, settings.max_side)
        limits.apply_to_pillow()
        self.scheduler = Scheduler(
            self.session,
            self.metadata.resize,
            limits,
            workers=self.calibration.workers,
            max_batch=self.calibration.max_batch,
            max_queue=settings.max_queue,
            on_batch=self.metrics.observe_batch,
        )
        self.metrics.watch(self.scheduler)
        self.metrics.show(self.calibration)
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
            self.calibration.batch_ms.get(1, math.nan),
            self.calibration.seconds * 1000,
        )

    def close(self) -> None:
        """Drains: everything accepted is answered, within `drain_timeout_s`."""
        if not self.scheduler.drain(self.settings.drain_timeout_s):
            logger.warning("not everything was finished within %d s", self.settings.drain_timeout_s)
