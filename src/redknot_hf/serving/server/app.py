"""The app: an engine behind OpenAI's routes, for any ASGI server; nothing is started here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from redknot_hf.serving.load import Load

from . import chat, completions, models, responses, segments, status
from .errors import tell_errors
from .guard import Guard
from .served import Served
from .service import Service
from .settings import Settings


def app_for(engine: Served, settings: Settings, load: Callable[[Any], Load] = Load.of) -> FastAPI:
    """An app that hands its requests to an engine.

    The engine is observed (`Metrics`), and neither started nor ended: whoever runs the app does both.

    Args:
        engine: With a tokenizer; started, by the time that requests come.
        settings: Name, key and limits.
        load: Tells what the engine has to do and holds.

    Raises:
        ValueError: The engine has no tokenizer.
    """
    service = Service(engine, settings, load)
    app = FastAPI(title="redknot", docs_url=None, redoc_url=None)
    tell_errors(app)
    for part in (status, models, completions, chat, responses, segments):
        app.include_router(part.routes(service))
    known = {path for path in app.openapi()["paths"] if "{" not in path} | {"/openapi.json"}
    count = lambda path, code: service.metrics.answered(path if path in known else "other", code)  # noqa: E731
    app.add_middleware(Guard, settings=settings, count=count)
    app.state.service = service
    return app
