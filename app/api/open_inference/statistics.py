"""What became of the Open Inference Protocol's requests, as counts and durations since the start.

Triton's statistics extension (docs/protocol/extension_statistics.md of triton-inference-server/server) names them. Counted
where requests are answered, in the event loop's thread: other surfaces pay nothing for it, and nothing needs a lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.engine.outcome import Outcome


@dataclass
class Duration:
    """How often, and for how many seconds in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.seconds += seconds


@dataclass
class BatchShare:
    """What the images that ran in batches of one size add up to; a batch's own durations are shared by its images.

    Attributes:
        images: how many ran in batches of this size.
        input_s: seconds of decoding.
        infer_s: each image's share of the seconds in the model.
    """

    images: int = 0
    input_s: float = 0.0
    infer_s: float = 0.0


@dataclass
class InferenceStatistics:
    """All counters.

    Attributes:
        success: answered requests, from the headers to the answer.
        fail: refused and failed ones.
        queue: wait of an answered request's image that waited longest.
        compute_input: decoding of that image.
        compute_infer: its batch in the model.
        compute_output: making the answer of logits.
        images: in answered requests.
        last_inference_ms: when the last one came, in milliseconds since 1970; 0 if none did.
        batches: by batch size.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    images: int = 0
    last_inference_ms: int = 0
    batches: dict[int, BatchShare] = field(default_factory=dict)

    def record_success(self, outcomes: Sequence[Outcome], *, seconds: float, output_s: float) -> None:
        """Counts an answered request.

        Args:
            outcomes: of its images, at least one.
            seconds: from the headers to the answer.
            output_s: of these, for making the answer.
        """
        timings = [outcome.timing for outcome in outcomes]
        last = max(timings, key=lambda timing: timing.queue_s)
        self.success.add(seconds)
        self.queue.add(last.queue_s)
        self.compute_input.add(last.decode_s)
        self.compute_infer.add(last.infer_s)
        self.compute_output.add(output_s)
        self.images += len(outcomes)
        self.last_inference_ms = time.time_ns() // 1_000_000
        for timing in timings:
            batch = self.batches.setdefault(timing.batch_size, BatchShare())
            batch.images += 1
            batch.input_s += timing.decode_s
            batch.infer_s += timing.infer_s / timing.batch_size

    def record_failure(self, seconds: float) -> None:
        """Counts a refused or failed request."""
        self.fail.add(seconds)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def executions(self, batch_size: int) -> int:
        """Runs of the model with this batch size; of one shared with another surface's images, the share counts."""
        return round(self.batches[batch_size].images / batch_size)
