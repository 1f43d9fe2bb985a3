"""Probes, metrics and the model card: what operators and their machines ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.schemas import ModelCard, ProbeAnswer
from app.service import Service

router = APIRouter()
metrics_router = APIRouter()

_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"model": ProbeAnswer, "description": "Not so; `reason` says why."}}


@router.get("/livez", response_model=ProbeAnswer, responses=_UNAVAILABLE, summary="Is the process worth keeping?")
async def livez(request: Request) -> Response:
    """503 when an inference worker has died or hangs, or the model fails on everything: restart the process."""
    return _probe(_service(request).scheduler.failure())


@router.get("/readyz", response_model=ProbeAnswer, responses=_UNAVAILABLE, summary="Should requests be sent here?")
async def readyz(request: Request) -> Response:
    """503 while draining or when the engine is dead. Mere overload does not change it: 503 on requests says that."""
    return _probe(_service(request).not_ready())


@metrics_router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus text format; of all processes behind this address, if there are several."""
    service = _service(request)
    text = await service.gathered.text() if service.gathered else generate_latest(service.metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/model", summary="What is served, and how")
async def model(request: Request) -> ModelCard:
    """The artifact's own metadata (accuracy, calibration, training) and the engine's choices."""
    service = _service(request)
    metadata = service.metadata
    return ModelCard(
        name=metadata.name,
        version=metadata.version,
        sha256=service.sha256,
        classes=metadata.classes,
        input_size=metadata.input_size,
        metadata=metadata.model_dump(mode="json"),
        provider=service.session.provider,
        workers=service.scheduler.workers,
        max_batch=service.scheduler.max_batch,
        warm_up_ms=round(service.session.warm_up_ms, 2),
        batch_ms={size: round(ms, 3) for size, ms in service.calibration.batch_ms.items()},
        images_per_second={count: round(rate, 1) for count, rate in service.calibration.images_s.items()},
    )


def _service(request: Request) -> Service:
    service: Service = request.state.service
    return service


def _probe(reason: str | None) -> Response:
    status = "ok" if reason is None else "unavailable"
    return JSONResponse(ProbeAnswer(status=status, reason=reason).model_dump(exclude_none=True), 200 if reason is None else 503)
