"""The door: who comes in, under which name, with how large a body; each request gets a number, and is counted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from hmac import compare_digest
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RequestError, failed
from .settings import Settings

# Probes ask these without a key; neither they nor the page hold anything that was measured.
OPEN = ("/", "/health", "/ready")
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Guard:
    """An ASGI app in front of another one.

    The body has been read when the other app is called, so that one that is too large, or that never ends, is refused
    in one place.

    Args:
        app: The other one.
        settings: Key, names and limits.
        count: Called with path and status of every response.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or says why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = number
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # under which it may be mounted
        started = False

        async def numbered(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
                self.count(path, message["status"])
            await send(message)

        try:
            self._check(path, headers)
            body = await self._body(headers, receive)
            if body is not None:
                await self.app(scope, _once(body, receive), numbered)
        except RequestError as e:
            await e.response(scope, receive, numbered)
        except Exception as e:  # a fault of ours, which no client is to read
            if started:
                raise
            await failed(number, e).response(scope, receive, numbered)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if self.settings.hosts and _name(headers.get("host", "")) not in self.settings.hosts:
            raise RequestError(
                403, "this server answers to localhost only: start it with --api-key or --no-auth for other names"
            )
        if self.settings.key is None or path in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not compare_digest(key.encode(), self.settings.key.encode()):
            raise RequestError(401, "send the server's key: Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """All of a request's body; `None` if the client went away."""
        most = self.settings.max_body
        told = headers.get("content-length", "0")
        if told.isdecimal() and (len(told) > 18 or int(told) > most):
            raise _too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.patience):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as e:
            raise RequestError(408, "the request did not come in time: send it at once", "timeout") from e


def _too_large(most: int) -> RequestError:
    return RequestError(413, f"the body is larger than {most:,} bytes: send less", "body_too_large")


def _once(body: bytes, receive: Receive) -> Receive:
    """What was read, and then what the client does next."""
    left: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
