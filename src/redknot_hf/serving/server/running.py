"""Running a server: a socket that is bound before the model is loaded, and an end that lets answers be finished."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from redknot_hf.serving.engine import Engine


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, so that nobody waits for a model to hear that the address is taken.

    Raises:
        OSError: The address is taken, or none of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as e:
        made.close()
        raise OSError(f"--host {host} --port {port}: {e.strerror}; choose another port, or 0 for any") from e
    return made


class Server(uvicorn.Server):
    """Serves an app until it is told to end (SIGTERM, SIGINT, or `should_exit`).

    Then nobody is let in any more, and answers that are under way may be finished; those that take too long are given
    up, and their clients told.

    Args:
        app: Of `app_for`.
        engine: Is ended with the server.
        drain: Seconds that answers may take.
        tell: Called when requests are taken.
        lost: Asked now and then: whether only a new start helps, for which the server ends at once.
        options: Of uvicorn.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        drain: float | int = 30,
        tell: Callable[[], None] = lambda: None,
        lost: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        # What is left when the engine has ended are the last words of each answer, which take no time.
        grace = int(drain) + 5
        options = {"ws": "none", "server_header": False, **options}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=grace, **options))
        self.app, self.engine, self.drain, self.tell, self.lost = app, engine, drain, tell, lost

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self.tell()

    async def on_tick(self, counter: int) -> bool:
        """Whether the server is to end."""
        return await super().on_tick(counter) or self.lost()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server and the engine."""
        self.app.state.service.draining = True
        ending = asyncio.create_task(asyncio.to_thread(self.engine.shutdown, self.drain))
        await super().shutdown(sockets)
        await ending
