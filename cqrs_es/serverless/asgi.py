"""HTTP as Lambda has it, payload format 2.0, before an ASGI application."""

from __future__ import annotations

import asyncio
import base64
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import orjson

from cqrs_es.http.problems import RETRY_AFTER, Problem
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Scope

log = get_logger("cqrs_es.serverless")

MOST_ANSWER_BYTES: Final = 6 * 1024 * 1024
"""What Lambda takes of an answer, as JSON."""
WAITING_RESERVE_SECONDS: Final = 0.5
"""Whoever waits for an outcome is told before the end that there is none yet."""
_FUNCTION_URL: Final = ".lambda-url."
_SERVERS: Final = {"connection", "content-length", "transfer-encoding"}


async def answered(asgi: ASGIApp, event: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Have an application answer a request within so many seconds; return what Lambda takes."""
    scope = _scope_of(event, seconds)
    try:
        async with asyncio.timeout(seconds):
            return await _exchanged(asgi, scope, _body_of(event))
    except TimeoutError:
        detail = "the function has no time left; ask again, with the same Idempotency-Key"
        headers = RETRY_AFTER
        problem = Problem(HTTPStatus.SERVICE_UNAVAILABLE, "timeout", detail, headers=headers)
    except Problem as exc:
        problem = exc
    log.warning("request not served", error=problem.detail)
    return await _exchanged(problem.response(scope["root_path"]), scope, b"")


async def _exchanged(asgi: ASGIApp, scope: Scope, body: bytes) -> dict[str, Any]:
    exchange = _Exchange(body)
    await exchange.run(asgi, scope)
    answer = exchange.answer(scope["method"])
    if len(orjson.dumps(answer)) > MOST_ANSWER_BYTES:
        detail = (
            f"the answer has more than the {MOST_ANSWER_BYTES} bytes that a function may answer:"
            " ask for less, by limit"
        )
        raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "answer_too_large", detail)
    return answer


def _scope_of(event: Mapping[str, Any], seconds: float) -> Scope:
    context = event["requestContext"]
    given: Mapping[str, Any] = event.get("headers") or {}
    headers = {name.lower(): str(value) for name, value in given.items()}
    if event.get("cookies"):
        headers["cookie"] = "; ".join(event["cookies"])
    headers["content-length"] = str(len(_body_of(event)))
    raw_path, path = _paths_of(event)
    stage = context.get("stage", "$default")
    below_stage = stage != "$default" and f"{path}/".startswith(f"/{stage}/")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": context["http"]["method"].upper(),
        "scheme": headers.get("x-forwarded-proto", "https"),
        "path": path,
        "raw_path": raw_path,
        "query_string": event.get("rawQueryString", "").encode(),
        "root_path": f"/{stage}" if below_stage else "",
        "headers": [(name.encode("latin-1"), _latin(value)) for name, value in headers.items()],
        # Whoever it was that is not said to be this machine is somebody else.
        "client": (context["http"].get("sourceIp") or "0.0.0.0", 0),  # noqa: S104
        "server": (headers.get("host") or context.get("domainName") or "lambda", 443),
        "state": {},
        "aws.event": event,
        "cqrs_es.seconds": max(0.0, seconds - WAITING_RESERVE_SECONDS),
    }


def _latin(text: str) -> bytes:
    return text.encode("latin-1", "replace")


def _paths_of(event: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the path as it was sent and decoded.

    A function URL gives it as it was sent, an HTTP API decoded: what was %2F there is a slash.
    """
    path = event.get("rawPath") or "/"
    if _FUNCTION_URL in event["requestContext"].get("domainName", ""):
        return path.encode("latin-1", "replace"), unquote(path)
    return quote(path).encode(), path


def _body_of(event: Mapping[str, Any]) -> bytes:
    body = event.get("body") or ""
    return base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()


class _Exchange:
    """One request and its answer, which is held back until it is whole."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._start: Message = {}
        self._answer = bytearray()
        self._running: asyncio.Task[None] | None = None
        self._streams = False

    async def run(self, asgi: ASGIApp, scope: Scope) -> None:
        """Run the application; raise a problem where its answer would have no end."""
        self._running = asyncio.ensure_future(self._run(asgi, scope))
        try:
            await self._running
        except asyncio.CancelledError:
            if not self._streams:
                raise
        if self._streams:
            detail = "a function answers at once: read pages of events, or the topic"
            raise Problem(HTTPStatus.NOT_IMPLEMENTED, "not_streamed", detail)

    async def _run(self, asgi: ASGIApp, scope: Scope) -> None:
        await asgi(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()  # until whoever waits for the end is cancelled
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            if any(kind.startswith(b"text/event-stream") for kind in kinds):
                self._streams = True
                assert self._running is not None  # noqa: S101 - this is called from there
                self._running.cancel()
                await asyncio.sleep(0)
        elif message["type"] == "http.response.body":
            self._answer += message.get("body", b"")

    def answer(self, method: str) -> dict[str, Any]:
        """Write the answer as Lambda takes it."""
        headers: dict[str, str] = {}
        cookies: list[str] = []
        for raw_name, raw_value in self._start["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            if name == "set-cookie":
                cookies.append(value)
            elif name not in _SERVERS:
                headers[name] = f"{headers[name]}, {value}" if name in headers else value
        answer = {"statusCode": self._start["status"], "headers": headers, **self._written(method)}
        return {**answer, "cookies": cookies} if cookies else answer

    def _written(self, method: str) -> dict[str, object]:
        body = b"" if method == "HEAD" else bytes(self._answer)
        try:
            return {"body": body.decode(), "isBase64Encoded": False}
        except UnicodeDecodeError:
            return {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}
