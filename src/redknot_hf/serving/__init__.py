"""Serving: many requests at once, over one budget of pages."""

from .engine import Engine
from .request import Request, Sampling, State

__all__ = ["Engine", "Request", "Sampling", "State"]
