"""What is answered in place of what was asked for: problem+json (RFC 9457)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import orjson
from starlette.responses import Response

from cqrs_es import errors, wire
from cqrs_es.messages import Status
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Receive, Scope, Send

    from cqrs_es.messages import Outcome

log = get_logger("cqrs_es.http")

RETRY_AFTER: Final[Mapping[str, str]] = {"Retry-After": "1"}
# After these codes of outcomes another request may fare better, or the address was wrong.
_BY_CODE: Final = {
    "invalid_command": HTTPStatus.UNPROCESSABLE_ENTITY,
    "id_reused": HTTPStatus.UNPROCESSABLE_ENTITY,
    "unknown_command": HTTPStatus.NOT_FOUND,
    "unknown_aggregate_type": HTTPStatus.NOT_FOUND,
}


class Problem(Exception):
    """Ends a request; `code` is the last part of the problem's type."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        *,
        outcome: Outcome | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.outcome = outcome
        self.headers = dict(headers or {})

    def response(self, root: str) -> Response:
        """Write it; `root` is the path that the gateway is mounted at."""
        content: dict[str, object] = {
            "type": f"{root}/problems/{self.code}",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
        }
        if self.outcome is not None:
            content["outcome"] = wire.outcome_fields(self.outcome)
        made = Lingering if self.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else Response
        return made(
            orjson.dumps(content), self.status.value, self.headers, "application/problem+json"
        )


def bad_request(code: str, detail: str) -> Problem:
    """Make the problem of a request that has to be written differently."""
    return Problem(HTTPStatus.BAD_REQUEST, code, detail)


def not_found(code: str, detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    """Make the problem of what there is not."""
    return Problem(HTTPStatus.NOT_FOUND, code, detail, headers=headers)


def too_large(limit: int) -> Problem:
    """Make the problem of a body beyond the limit; the connection ends with it."""
    detail = f"the body is over the limit of {limit} bytes (CQRS_ES_MAX_MESSAGE_BYTES)"
    headers = {"Connection": "close"}
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", detail, headers=headers)


def of_outcome(outcome: Outcome, *, conditional: bool) -> Problem:
    """Make the problem of a command that was not accepted; `conditional`: it had If-Match."""
    code = outcome.error.code if outcome.error else outcome.status.value
    detail = outcome.error.message if outcome.error else "no reason was recorded"
    if code in _BY_CODE:
        status = _BY_CODE[code]
    elif outcome.status is Status.FAILED:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    elif code == "conflict" and conditional:
        status = HTTPStatus.PRECONDITION_FAILED
    else:
        status = HTTPStatus.CONFLICT
    return Problem(status, code, detail, outcome=outcome)


def of_error(exc: Exception) -> Problem:
    """Make the problem of an error; one that tells of ourselves is logged, and not told."""
    code = errors.snake_case(type(exc).__name__)
    match exc:
        case Problem():
            return exc
        case errors.InvalidMessage():
            return bad_request("invalid_message", exc.message)
        case (
            errors.Unavailable()
            | errors.Withdrawn()
            | errors.NeedsNewerCode()
            | errors.ViewBehind()
        ):
            log.warning("request not served", error=exc.message)
            detail = errors.default_message(type(exc))
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, code, detail, headers=RETRY_AFTER)
        case _:
            log.error("request failed", exc_info=exc)
            detail = "something went wrong here; the log says what"
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail)


# --- Ending a connection whose client still sends -----------------------------

# A client that still sends when its connection is closed may lose the answer: so some more is
# read, and dropped.
LINGER_BYTES: Final = 4 * 1024 * 1024
LINGER_SECONDS: Final = 2.0


class Lingering(Response):
    """Is sent as a whole, then reads on for a little before the connection ends."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, read, end."""
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        names = {name for name, _ in scope["headers"]}
        # Who asks for permission, and has said how much it is, has not begun to send.
        if not {b"expect", b"content-length"} <= names:
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await _discard(receive)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    left = LINGER_BYTES
    while left > 0:
        message: Message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
