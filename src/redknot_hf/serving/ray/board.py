"""What replicas told last: put here by the router, which runs in the process of whoever asks them."""

from __future__ import annotations

from typing import Any

# By deployment and replica; nothing of a replica that has told nothing yet.
TOLD: dict[str, dict[str, dict[str, Any]]] = {}
