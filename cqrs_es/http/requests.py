"""Reading requests: paths, headers, bodies; everything that is not as it should be is a problem."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast
from urllib.parse import quote, unquote

import orjson
from starlette.requests import ClientDisconnect, Request

from cqrs_es import errors, wire
from cqrs_es.http.problems import Problem, bad_request, too_large
from cqrs_es.messages import NO_METADATA
from cqrs_es.types import check_aggregate_id, parse_command_id

if TYPE_CHECKING:
    from starlette.types import Scope

    from cqrs_es.types import JsonObject

# A body is there within so many seconds, or it does not come.
BODY_SECONDS: Final = 30.0
MOST_HEAD_BYTES: Final = 64 * 1024
WAIT_SECONDS: Final = 10.0
MOST_WAIT_SECONDS: Final = 60.0
MOST_KEY_CHARACTERS: Final = 255
DEFAULT_LIMIT: Final = 100
MOST_LIMIT: Final = 1000
_ENTITY_TAG: Final = re.compile(r'"([0-9]{1,19})"')
_WAIT: Final = re.compile(r"wait=([0-9]{1,9})")
_SEEN: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,18})")


# --- Who may do what ----------------------------------------------------------


class Denied(Exception):
    """Raise it in `authorize`: whoever asks may not do this (403)."""


class Unknown(Exception):
    """Raise it in `authorize`: nobody knows who asks (401); `challenge` is WWW-Authenticate."""

    def __init__(self, message: str = "say who you are", challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What a request is about to do; of the names those are given that its path has.

    `events` is the stream of all events, `stream` those of one aggregate.
    """

    kind: Literal["command", "outcome", "view", "stream", "events", "schema"]
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    command: str | None = None
    command_id: str | None = None
    view: str | None = None
    view_id: str | None = None


Authorize: TypeAlias = Callable[
    [Request, Action], "Mapping[str, str] | Awaitable[Mapping[str, str] | None] | None"
]


async def authorized(
    authorize: Authorize | None, request: Request, action: Action
) -> Mapping[str, str]:
    """Return the metadata of whoever asks; raise a problem where they may not."""
    if authorize is None:
        return NO_METADATA
    try:
        found = authorize(request, action)
        given = await found if inspect.isawaitable(found) else found
    except Denied as exc:
        detail = str(exc) or "this is not allowed"
        raise Problem(HTTPStatus.FORBIDDEN, "denied", detail) from exc
    except Unknown as exc:
        challenge = {"WWW-Authenticate": exc.challenge}
        raise Problem(HTTPStatus.UNAUTHORIZED, "unknown", str(exc), headers=challenge) from exc
    return given or NO_METADATA


def is_local(address: tuple[str, int | None] | None) -> bool:
    """Tell whether an address is this machine's own; what is no IP address is within it."""
    if address is None:
        return True
    try:
        return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    except ValueError:
        return True


# --- Paths ---------------------------------------------------------------------


def segments(scope: Scope) -> list[str]:
    """Split the path below the gateway's own, each part decoded by itself: ids may have slashes."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    raw = scope.get("raw_path") or quote(path).encode()
    parts = raw.decode("latin-1").partition("?")[0].split("/")
    while parts and "/".join(map(unquote, parts)) != path.removeprefix("/"):
        parts.pop(0)
    try:
        return [unquote(part, errors="strict") for part in parts or path.split("/")[1:]]
    except UnicodeDecodeError as exc:
        raise bad_request("invalid_path", "the path is not UTF-8, percent-encoded") from exc


def checked_id(text: str, what: str) -> str:
    """Return an id that may be one; raise a problem."""
    try:
        check_aggregate_id(text)
    except errors.InvalidMessage as exc:
        detail = exc.message.replace("aggregate_id", what)
        raise bad_request("invalid_id", detail) from exc
    return text


# --- Headers --------------------------------------------------------------------


def check_head(request: Request) -> None:
    """Refuse headers that are too large together, or give a body two ends.

    Servers bound only heads that are incomplete. Of two ends a proxy in front may believe the
    other one, and what comes behind it is then somebody else's request [RFC 9112, 6.1].
    """
    if {"content-length", "transfer-encoding"} <= set(request.headers.keys()):
        detail = "Content-Length and Transfer-Encoding exclude one another"
        headers = {"Connection": "close"}
        raise Problem(HTTPStatus.BAD_REQUEST, "invalid_header", detail, headers=headers)
    if sum(len(name) + len(value) for name, value in request.headers.raw) > MOST_HEAD_BYTES:
        raise bad_request("invalid_header", f"the headers have more than {MOST_HEAD_BYTES} bytes")


def _single(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise bad_request("invalid_header", f"{name} is given {len(values)} times")
    return values[0] if values else None


def idempotency_key(request: Request) -> str | None:
    """Return the key, without the quotes of a structured header."""
    value = _single(request, "Idempotency-Key")
    if value is None:
        return None
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    if not 1 <= len(value) <= MOST_KEY_CHARACTERS:
        detail = f"Idempotency-Key must have 1 to {MOST_KEY_CHARACTERS} characters"
        raise bad_request("invalid_key", f"{detail}, not {len(value)}")
    return value


def uuid_in(text: str) -> str | None:
    """Return a UUID in its one form, None for other text."""
    try:
        return parse_command_id(text)
    except errors.InvalidMessage:
        return None


def expected_sequence(request: Request) -> int | None:
    """Return the sequence that the aggregate has to be at, by If-Match or If-None-Match."""
    match, none_match = _single(request, "If-Match"), _single(request, "If-None-Match")
    if match is not None and none_match is not None:
        raise bad_request("invalid_header", "give If-Match or If-None-Match, not both")
    if none_match is not None:
        if none_match.strip() != "*":
            raise bad_request("invalid_header", "of a command If-None-Match may only be *")
        return 0
    if match is None:
        return None
    tag = _ENTITY_TAG.fullmatch(match.strip())
    if tag is None or int(tag[1]) > wire.MAX_SEQUENCE:
        detail = 'If-Match must be one sequence in quotes, such as "3"'
        raise bad_request("invalid_header", detail)
    return int(tag[1])


def command_version(request: Request) -> str:
    """Return the version that a command's payload is of."""
    return wire.version_of(_single(request, "Command-Version") or None)


def is_unchanged(request: Request, tag: str) -> bool:
    """Tell whether If-None-Match has this entity tag, or any."""
    tags = ",".join(request.headers.getlist("If-None-Match")).split(",")
    return any(each.strip().removeprefix("W/") in {tag, "*"} for each in tags)


def wait_seconds(request: Request) -> float:
    """Return how long to wait, by Prefer; 0 for `respond-async`. What is no such is ignored.

    A function waits for no longer than it may go on, and always: it stands still once it has
    answered.
    """
    left: float | None = request.scope.get("cqrs_es.seconds")
    most = MOST_WAIT_SECONDS if left is None else min(left, MOST_WAIT_SECONDS)
    preferred = ",".join(request.headers.getlist("Prefer")).replace(";", ",").lower().split(",")
    preferences = [each.replace(" ", "").replace('"', "") for each in preferred]
    if "respond-async" in preferences and left is None:
        return 0.0
    for each in preferences:
        if wait := _WAIT.fullmatch(each):
            return min(float(wait[1]), most)
    return min(WAIT_SECONDS, most)


def metadata_of(request: Request, given: Mapping[str, str]) -> Mapping[str, str]:
    """Return a command's metadata: from its headers, and over that what `authorize` says."""
    names = ("correlation_id", "traceparent", "tracestate")
    headers = {name: _single(request, name.replace("_id", "-Id")) for name in names}
    sent = {name: value for name, value in headers.items() if value}
    return wire.check_metadata(cast("JsonObject", {**sent, **given}))


# --- Queries ---------------------------------------------------------------------


def limit_of(request: Request) -> int:
    """Return how many rows or events a page may have."""
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_LIMIT:
        raise bad_request("invalid_query", f"limit must be a whole number from 1 to {MOST_LIMIT}")
    return int(text)


def seen_of(request: Request, partitions: int) -> tuple[int, int] | None:
    """Return the place in the log that a view must have seen."""
    text = request.query_params.get("seen")
    if text is None:
        return None
    place = _SEEN.fullmatch(text)
    if place is None or int(place[1]) >= partitions:
        detail = f"seen must be PARTITION:OFFSET with a partition from 0 to {partitions - 1}"
        raise bad_request("invalid_query", detail)
    return int(place[1]), int(place[2])


def link_to_next(request: Request, after: str | int, limit: int) -> dict[str, str]:
    """Return the header that says where the next page is; a path, whatever the host is called."""
    path = request.scope.get("raw_path") or quote(request.scope["path"]).encode()
    where = path.decode("latin-1").partition("?")[0]
    link = f"<{where}?after={quote(str(after), safe='')}&limit={limit}>"
    return {"Link": f'{link}; rel="next"'}


# --- Bodies -----------------------------------------------------------------------


async def payload_of(request: Request, limit: int) -> JsonObject:
    """Read a command's payload, no more of it than may be; raise a problem."""
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        detail = f"Content-Type must be application/json, not {content_type[:60] or 'missing'}"
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail)
    body = await _body(request, limit)
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        detail = f"the body is not JSON in UTF-8: {exc.msg} at character {exc.pos}"
        raise bad_request("invalid_json", detail) from exc
    if not isinstance(payload, dict):
        raise bad_request("invalid_message", "the body must be a JSON object")
    return cast("JsonObject", payload)


async def _body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("Content-Length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large(limit)
    except TimeoutError:
        detail = f"the body did not come within {BODY_SECONDS:g} s"
        headers = {"Connection": "close"}
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, "timeout", detail, headers=headers) from None
    except ClientDisconnect:
        raise bad_request("incomplete", "the body ended before its end") from None
    return bytes(body)
