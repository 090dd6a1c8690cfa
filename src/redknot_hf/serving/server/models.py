"""`/v1/models`: the one that is served here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from .errors import RequestError
from .service import Service


def routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is the one."""
        if name != service.settings.name:
            raise RequestError(404, f"the model here is {service.settings.name}", "model_not_found", "model")
        return _model(service)

    return router


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "redknot-hf",
        "max_model_len": service.longest,
    }
