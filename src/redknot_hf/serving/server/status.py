"""What probes, gateways and people ask: health, metrics, and a page to look at."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response

from redknot_hf.serving.load import Load

from .errors import RequestError
from .metrics import FORMAT
from .service import Service

# The page is one file, and asks nobody but this server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()
    page = (files("redknot_hf.serving.server") / "page.html").read_text(encoding="utf-8")

    @router.head("/", include_in_schema=False)
    @router.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        """A page that shows the load."""
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "x-content-type-options": "nosniff"})

    @router.head("/health", include_in_schema=False)  # balancers ask with either
    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are served at all; if not, only a new start helps."""
        if service.engine.error is not None:
            raise RequestError(503, "the engine has failed: start the server again", "engine_failed")
        return JSONResponse({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken now."""
        if not service.ready:
            raise RequestError(503, "no requests are taken now", "not_ready")
        return JSONResponse({"status": "ready"})

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type=FORMAT)

    @router.get("/status")
    async def status() -> JSONResponse:
        """What the page shows."""
        load = await asyncio.to_thread(service.load)
        return JSONResponse(_told(service, load))

    return router


def _told(service: Service, load: Load) -> dict[str, Any]:
    held = [{"class": kind, "storage": storage, "bytes": n} for (kind, storage), n in load.held.items()]
    return {
        **asdict(load),
        "held": held,
        "used": load.used,
        "parked": load.parked,
        "model": service.settings.name,
        "longest": service.longest,
        "seconds": round(time.time() - service.started, 1),
        "ready": service.ready,
    }
