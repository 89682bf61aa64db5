"""Who and what is let in, and how every error leaves: in the API's form, whatever went wrong."""

from __future__ import annotations

import hmac
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral_lab.config import LabError
from mixtral_lab.serve.protocol import Detail, ErrorForm, Refused

MOST_DETAILS = 10


class Gate:
    """Before a body is read: the bearer key, if there is one, and the size. `/health` needs no key."""

    def __init__(self, app: ASGIApp, key: str | None, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, read = Headers(scope=scope), 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise HTTPException(413)
            return message

        refused = None
        if scope["path"].startswith("/v1") and not self._knows(headers.get("authorization", "")):
            refused = Refused(
                401,
                "The key is missing or wrong: send the header Authorization: Bearer, and the key this server was started with.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        elif (
            headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > self._most_bytes
        ):
            refused = self._too_large()
        if refused is not None:
            await self._drain(receive)
            await _in_form(refused)(scope, receive, send)
            return
        scope["mixtral_lab.too_large"] = self._too_large()
        await self._app(scope, counted, send)

    def _knows(self, given: str) -> bool:
        return self._expected is None or hmac.compare_digest(given.encode("latin-1", "replace"), self._expected)

    def _too_large(self) -> Refused:
        return Refused(413, f"The request is larger than {self._most_bytes:,} bytes, the limit here.", "too_large")

    async def _drain(self, receive: Receive) -> None:
        """Read what a client is still sending, up to a point: many look for an answer only when they have sent all."""
        read, more = 0, True
        while more and read < 8 * self._most_bytes:
            message = await receive()
            read, more = read + len(message.get("body", b"")), message.get("more_body", False)


def answer_errors_in_form(app: FastAPI) -> None:
    """Give every error of an app the API's form."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return _in_form(error)

    @app.exception_handler(LabError)
    async def not_possible(_request: Request, error: LabError) -> Response:
        return _in_form(Refused(400, str(error), "invalid_request"))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _in_form(_what_is_wrong(request, error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        here = f"{request.method} {request.url.path}"
        if error.status_code == 413:
            return _in_form(request.scope["mixtral_lab.too_large"])
        message, code = {
            404: (f"There is no {here}: /openapi.json lists what there is.", "not_found"),
            405: (f"{here} is not allowed: /openapi.json says what is.", "method_not_allowed"),
            400: ("The body could not be read as JSON.", "invalid_json"),
        }.get(error.status_code, (str(error.detail), "http_error"))
        return _in_form(Refused(error.status_code, message, code, headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        return _in_form(Refused(500, "The server failed; its log says why.", "internal_error", kind="server_error"))


def _what_is_wrong(request: Request, error: RequestValidationError) -> Refused:
    errors = error.errors()
    kind = request.headers.get("content-type", "")
    if errors[0]["type"] == "json_invalid":
        why = errors[0].get("ctx", {}).get("error", "")
        return Refused(400, f"The body is not JSON: {why} at character {errors[0]['loc'][-1]}.", "invalid_json")
    if isinstance(error.body, bytes) and "json" not in kind:
        return Refused(
            415,
            f"The Content-Type is {kind or 'missing'}, but must be application/json (curl: -H 'Content-Type: application/json').",
            "not_json",
        )
    details = [
        Detail(loc=_place(one["loc"]), msg=one["msg"].removeprefix("Value error, "), type=one["type"])
        for one in errors[:MOST_DETAILS]
    ]
    said: dict[str, list[str]] = {}
    for one in details:
        said.setdefault(".".join(map(str, one.loc)) or "body", []).append(one.msg)
    message = "; ".join(f"{place}: {', or: '.join(messages)}" for place, messages in said.items()) + "."
    found = Refused(422, message, "invalid_request", next(iter(said)))
    found.form.detail = details
    return found


def _place(loc: tuple[str | int, ...]) -> list[str | int]:
    """Where in the body, without pydantic's names for the members of a union ("list[TextChunk]", "constrained-str")."""
    return [part for part in loc[1:] if isinstance(part, int) or not re.search(r"\[|-|^(str|int|bool)$", part)]


def _in_form(error: Refused) -> Response:
    form: ErrorForm = error.form
    content = form.model_dump(exclude={"detail"} if form.detail is None else None)
    return JSONResponse(content, error.status, headers=dict(error.headers or {}))
