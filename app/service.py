"""The running service without HTTP: settings, model, scheduler and metrics, built once and closed once.

The web application and the command line's local `classify` share it.
"""

from __future__ import annotations

import logging

from app.engine.artifact import read_verified
from app.engine.scheduler import Scheduler
from app.engine.session import Session, available_cores
from app.images import DecodeLimits
from app.settings import Settings
from app.telemetry import Metrics

logger = logging.getLogger(__name__)

_CPU_MAX_BATCH = 4
"""On a CPU a batch is no faster per image (activations leave the cache); small ones save a hop between threads."""

_CUDA_MAX_BATCH = 128


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
        self.session = Session(verified, settings.provider)
        self.metadata = self.session.metadata
        self.metrics = Metrics()
        on_cpu = self.session.provider == "cpu"
        self.scheduler = Scheduler(
            self.session,
            self.metadata.resize,
            DecodeLimits(settings.max_pixels, settings.max_side),
            workers=settings.workers or (available_cores() if on_cpu else 1),
            max_batch=settings.max_batch or (_CPU_MAX_BATCH if on_cpu else _CUDA_MAX_BATCH),
            max_queue=settings.max_queue,
            on_batch=self.metrics.observe_batch,
        )
        self.metrics.watch(self.scheduler)
        logger.info(
            "serving %s %s (%d classes, sha256 %s…) on %s: %d workers, batches of up to %d, warm-up %.0f ms",
            self.metadata.name,
            self.metadata.version,
            len(self.metadata.classes),
            self.sha256[:12],
            self.session.provider,
            self.scheduler.workers,
            self.scheduler.max_batch,
            self.session.warm_up_ms,
        )

    def close(self) -> None:
        """Drains: everything accepted is answered, within `drain_timeout_s`."""
        if not self.scheduler.drain(self.settings.drain_timeout_s):
            logger.warning("not everything was finished within %d s", self.settings.drain_timeout_s)
