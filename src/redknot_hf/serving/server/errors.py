"""Errors as clients are told them: one shape for all, OpenAI's, with nobody's text and no traceback."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

log = logging.getLogger("redknot_hf.serving")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"(?!(str|int|float|bool)$)\w+")


class RequestError(HTTPException):
    """A request that is refused, or has failed.

    Args:
        status: Of HTTP.
        message: What is wrong, and what to do about it.
        code: For programs.
        param: The field that is wrong.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"retry-after": str(retry_after)}
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def content(self) -> dict[str, Any]:
        """What is sent."""
        return shape(self.status_code, self.detail, self.code, self.param)

    @property
    def response(self) -> JSONResponse:
        """The same, as a response."""
        return JSONResponse(self.content, self.status_code, self.headers)


def shape(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The one shape of all errors."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failed(request_id: str, error: BaseException | None) -> RequestError:
    """What a client is told of an answer that went wrong here; the log has the rest."""
    log.error("request %s failed", request_id, exc_info=error)
    return RequestError(
        500, f"the answer failed; the server's log knows more of request {request_id}", "internal_error"
    )


def tell_errors(app: FastAPI) -> None:
    """Gives what an app refuses the one shape; its faults are told by whoever stands in front of it."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestError):
            return error.response
        assert isinstance(error, StarletteHTTPException)
        return JSONResponse(shape(error.status_code, _plain(error)), error.status_code, error.headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = _first(error.errors())
        return RequestError(400, message, "invalid_value", param).response

    app.add_exception_handler(StarletteHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def _plain(error: StarletteHTTPException) -> str:
    known = {404: "there is nothing here: see /v1/models, /v1/chat/completions, /v1/completions, /v1/responses"}
    known |= {405: "this method is not for this address", 400: "the body is no JSON that can be read"}
    return known.get(error.status_code, str(error.detail))


def _first(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first thing that is wrong with a body, without what stood there, and the field."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return "the body is no JSON that can be read", None
    # Of a field that takes several kinds of things, pydantic names the kind it tried, which is no field.
    places = [str(place) for place in error["loc"] if place != "body" and _FIELD.fullmatch(str(place))]
    param = ".".join(places) or None
    if param is None:
        return "the body must be a JSON object, sent as application/json", None
    if error["type"] == "extra_forbidden":
        return f"{param[:80]}: this server has no such field", param[:80]
    return f"{param}: {error['msg'][:300]}", param
