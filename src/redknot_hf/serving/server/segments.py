"""`/v1/segments`: texts that are read once, and stand in any request from then on, by their address."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from .bodies import SegmentBody, listed
from .service import Service


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/segments")
    async def segments(body: SegmentBody) -> dict[str, Any]:
        """Store texts."""
        service.check_model(body.model)
        refs = [await service.library.add(text, body.prefix) for text in listed(body.input, "input")]
        data = [{"object": "segment", "index": i, "id": ref.address, "tokens": len(ref)} for i, ref in enumerate(refs)]
        read = sum(map(len, refs))
        return {
            "object": "list",
            "model": service.settings.name,
            "data": data,
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }

    return router
