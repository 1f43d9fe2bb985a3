"""Python client of the service: `Client`, and `AsyncClient` for asyncio. The extra `[client]` installs what it needs.

Imports nothing of the service itself, and numpy or Pillow only when the caller passes arrays or pictures of theirs.
docs/client.md shows how it is used.
"""

from app.client.answers import (
    ClassificationError,
    ClassProbability,
    ClientClosed,
    ClientError,
    DeadlineExceeded,
    Health,
    HeatMap,
    ImageRejected,
    Model,
    ModelRef,
    Overloaded,
    Prediction,
    RequestFailed,
    Unauthorized,
    Unreachable,
)
from app.client.asynchronous import AsyncClient
from app.client.blocking import Client
from app.client.images import ImageInput

__all__ = [
    "AsyncClient",
    "ClassProbability",
    "ClassificationError",
    "Client",
    "ClientClosed",
    "ClientError",
    "DeadlineExceeded",
    "Health",
    "HeatMap",
    "ImageInput",
    "ImageRejected",
    "Model",
    "ModelRef",
    "Overloaded",
    "Prediction",
    "RequestFailed",
    "Unauthorized",
    "Unreachable",
]
