"""Serving: many requests at once, over one budget of pages."""

from .engine import Engine
from .inbox import QueueFullError
from .request import Request, Sampling, State

__all__ = ["Engine", "QueueFullError", "Request", "Sampling", "State"]
