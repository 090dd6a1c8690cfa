"""The HTTP half of serving: an engine behind the routes that OpenAI's clients call."""

from .app import app_for
from .settings import Settings

__all__ = ["Settings", "app_for"]
