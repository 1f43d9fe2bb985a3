"""What the engine has to say about one image, and how long each stage of it took."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Timing:
    """One image's way through the stages; what it did not reach is 0.

    Attributes:
        submitted: time.monotonic() at which it began to wait.
        queue_s: seconds spent waiting; decoding begins where they end.
        decode_s: seconds spent decoding this image.
        infer_begin: time.monotonic() at which its batch went to the model.
        infer_s: seconds the batch spent in the model.
        batch_size: images in that batch.
    """

    submitted: float
    queue_s: float = 0.0
    decode_s: float = 0.0
    infer_begin: float = 0.0
    infer_s: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the engine has to say about one image.

    Attributes:
        logits: float32 [C].
        class_maps: float32 [C, h, w], or None if not asked for.
        similarity: cosine of the whitened features and the nearest class mean, or None if the artifact's score needs none.
        warnings: of the decoder.
        timing: of this image.
    """

    logits: NDArray[np.float32]
    class_maps: NDArray[np.float32] | None
    similarity: float | None
    warnings: tuple[str, ...]
    timing: Timing
