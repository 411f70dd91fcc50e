"""The gateway: an ASGI application that serves one cqrs-es application over HTTP.

It keeps nothing: what it has answered is in the store, and a request that is
repeated after a crash gets the answer that it would have got.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal

import orjson
from starlette.requests import Request
from starlette.responses import Response

from cqrs_es import errors, wire
from cqrs_es.cloudevents import to_cloudevent
from cqrs_es.definitions import ViewDefinition
from cqrs_es.http import requests
from cqrs_es.http.events import Tail, stream_of
from cqrs_es.http.problems import (
    RETRY_AFTER,
    Problem,
    bad_request,
    not_found,
    of_error,
    of_outcome,
    too_large,
)
from cqrs_es.http.requests import Action
from cqrs_es.messages import CommandMessage, id_reused, is_of_newer_code
from cqrs_es.ports.store import LoadRequest
from cqrs_es.projection.seen import refuse_parked, wait_until_reached
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import AggregateKey, new_command_id

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from cqrs_es.application import Application
    from cqrs_es.client import Client
    from cqrs_es.http.requests import Authorize
    from cqrs_es.messages import Outcome
    from cqrs_es.opened import OpenApplication

log = get_logger("cqrs_es.http")

JSON: Final = "application/json"
BATCH: Final = "application/cloudevents-batch+json"
EPOCH_SECONDS: Final = 2.0


class Gateway:
    """Serves an application over HTTP; see docs/http.md.

    By itself it opens the application when its server starts. Within another web application
    it is given the opened one, since a mounted application is not told of the start:

        async with app.open() as opened, gateway.on(opened):
            yield

    `authorize(request, action)` returns metadata for what a command causes, or raises `Denied`
    or `Unknown`; it may be a coroutine. The entry `principal` names who asks. Without it
    everybody may do everything, so only this machine is served unless `public`.
    `via="store"` decides commands in this process, `"queue"` has a worker decide them.
    """

    def __init__(
        self,
        app: Application,
        *,
        authorize: Authorize | None = None,
        via: Literal["store", "queue"] = "store",
        public: bool = False,
    ) -> None:
        if via not in {"store", "queue"}:
            message = f'via must be "store" or "queue", not {via!r}'
            raise errors.ConfigurationError(message)
        self.app = app
        self.via = via
        self.guarded = authorize is not None or public
        self._authorize = authorize
        self._opened: OpenApplication | None = None
        self._client: Client | None = None
        self._tail: Tail | None = None
        self._pending: set[asyncio.Task[Outcome]] = set()

    # --- Living --------------------------------------------------------------

    @asynccontextmanager
    async def on(self, opened: OpenApplication) -> AsyncGenerator[None]:
        """Serve an opened application during the block; then finish what was begun."""
        process = opened.process
        async with AsyncExitStack() as stack:
            if self.via == "queue":
                from cqrs_es.client import Client  # noqa: PLC0415 - a function has no use for it

                client = Client(
                    service=process.service,
                    broker=process.broker,
                    storage=opened.storage,
                    max_message_bytes=process.settings.max_message_bytes,
                )
                self._client = await stack.enter_async_context(client)
            self._tail, self._opened = Tail(process), opened
            try:
                yield
            finally:
                self.leave()
                self._opened = None
                if self._pending:
                    await asyncio.wait(self._pending, timeout=process.settings.shutdown_timeout)
                await self._tail.close()
                self._tail = self._client = None

    def leave(self) -> None:
        """End the streams of events: their clients come back to whoever serves them then."""
        if self._tail is not None:
            self._tail.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or open and close the application for a server's start and end."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Exception as exc:  # noqa: BLE001 - every request is answered
            response = of_error(exc).response(scope.get("root_path", ""))
        await response(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with AsyncExitStack() as stack:
            try:
                opened = await stack.enter_async_context(self.app.open())
                await stack.enter_async_context(self.on(opened))
            except Exception as exc:
                await send({"type": "lifespan.startup.failed", "message": str(exc)})
                raise
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    # --- Routes --------------------------------------------------------------

    async def _answer(self, request: Request) -> Response:
        if not self.guarded and not (
            requests.is_local(request.scope.get("client"))
            and requests.is_local(request.scope.get("server"))
        ):
            detail = "without authorize the gateway serves its own machine only: see docs/http.md"
            raise Problem(HTTPStatus.FORBIDDEN, "denied", detail)
        requests.check_head(request)
        posts = request.method == "POST"
        match requests.segments(request.scope):
            case ["aggregates", aggregate_type, aggregate_id, "events"] if not posts:
                _check_method(request, "GET")
                return await self._stream(request, aggregate_type, aggregate_id)
            case ["aggregates", aggregate_type, aggregate_id, command]:
                _check_method(request, "POST")
                return await self._command(request, aggregate_type, aggregate_id, command)
            case ["outcomes", command_id]:
                _check_method(request, "GET")
                return await self._outcome(request, command_id)
            case ["views", name]:
                _check_method(request, "GET")
                return await self._rows(request, name)
            case ["views", name, view_id]:
                _check_method(request, "GET")
                return await self._row(request, name, view_id)
            case ["events"]:
                _check_method(request, "GET")
                return await self._events(request)
            case ["openapi.json" | "asyncapi.json" as name]:
                _check_method(request, "GET")
                return await self._schema(request, name)
            case _:
                raise not_found("unknown_route", "there is nothing at this path")

    @property
    def opened(self) -> OpenApplication:
        """The application that is served; raises a problem while there is none."""
        if self._opened is None:
            detail = "the application is not open yet, or not any more"
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "not_open", detail, headers=RETRY_AFTER)
        return self._opened

    async def _authorized(self, request: Request, action: Action) -> Mapping[str, str]:
        return await requests.authorized(self._authorize, request, action)

    # --- Commands ------------------------------------------------------------

    async def _command(
        self, request: Request, aggregate_type: str, aggregate_id: str, command: str
    ) -> Response:
        action = Action(
            kind="command",
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            command=command,
        )
        given = await self._authorized(request, action)
        definition = self._aggregate(aggregate_type)
        version = requests.command_version(request)
        if wire.is_internal(command) or not definition.takes(command):
            if is_of_newer_code(version):
                raise errors.UnknownVersion
            raise not_found("unknown_command", f"{aggregate_type} has no command of this name")
        expected = requests.expected_sequence(request)
        limit = self.opened.process.settings.max_message_bytes
        message = CommandMessage(
            id=self._command_id(request, given),
            type=command,
            aggregate_type=aggregate_type,
            aggregate_id=requests.checked_id(aggregate_id, "the aggregate's id"),
            metadata=requests.metadata_of(request, given),
            payload=await requests.payload_of(request, limit),
            expected_sequence=expected,
            version=version,
        )
        outcome = await self.outcome_of(message, requests.wait_seconds(request))
        if outcome is None:
            where = f"{request.scope.get('root_path', '')}/outcomes/{message.id}"
            content = {"command_id": message.id, "outcome": where}
            return _json(content, {"Location": where, **RETRY_AFTER}, HTTPStatus.ACCEPTED)
        if not outcome.accepted:
            raise of_outcome(outcome, conditional=expected is not None)
        return _json(wire.outcome_fields(outcome), _tagged(outcome.sequence))

    def _aggregate(self, aggregate_type: str) -> Any:
        """Return the definition of a type that is anybody's; a process manager is nobody's."""
        definition = self.opened.registry.aggregates.get(aggregate_type)
        if definition is None or definition.inputs is not None:
            raise not_found("unknown_aggregate_type", "there is no such aggregate type")
        return definition

    def _command_id(self, request: Request, given: Mapping[str, str]) -> str:
        key = requests.idempotency_key(request)
        if key is None:
            return new_command_id()
        known = requests.uuid_in(key)
        if known is not None:
            return known
        # Of two that `authorize` tells apart neither can meet the other's key.
        principal = given.get("principal")
        who = sorted(given.items()) if principal is None else principal
        text = orjson.dumps(["http", who, key]).decode()
        return self.opened.process.executor.causes.derived_id(text)

    async def outcome_of(
        self, message: CommandMessage, seconds: float = requests.WAIT_SECONDS
    ) -> Outcome | None:
        """Have a command decided; return None when that takes longer, and goes on."""
        opened = self.opened
        settings = opened.process.settings
        body = wire.encode_command(message)
        if len(body) > settings.max_message_bytes:
            raise too_large(settings.max_message_bytes)
        checked = wire.parse_command(body, settings.max_message_bytes)
        if self._client is not None:
            return await self._enqueued(self._client, checked, seconds)
        deciding = asyncio.create_task(opened.submit(checked, untrusted=True))
        self._pending.add(deciding)
        deciding.add_done_callback(self._finished)
        done, _ = await asyncio.wait({deciding}, timeout=seconds)
        if done:
            return deciding.result()
        if seconds and opened.process.executor.trouble is not None:
            raise errors.StoreUnavailable
        return None

    def _finished(self, task: asyncio.Task[Outcome]) -> None:
        self._pending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("command not decided", error=str(task.exception()))

    async def _enqueued(
        self, client: Client, message: CommandMessage, seconds: float
    ) -> Outcome | None:
        if not seconds:
            await client.send_many([message])
            return None
        try:
            return await client.execute(
                message.aggregate_type,
                message.aggregate_id,
                message.type,
                message.payload,
                timeout=seconds,
                command_id=message.id,
                metadata=message.metadata,
                expected_sequence=message.expected_sequence,
                version=message.version,
            )
        except errors.WaitTimeout:
            return None
        except errors.IdReused:
            return id_reused(message)

    async def _outcome(self, request: Request, command_id: str) -> Response:
        await self._authorized(request, Action(kind="outcome", command_id=command_id))
        known = requests.uuid_in(command_id)
        if known is None:
            raise bad_request("invalid_id", "a command's id is a UUID")
        found = await self.opened.outcome(known)
        if found is None:
            detail = "the command has no outcome: not sent, not decided yet, or long ago"
            raise not_found("unknown_outcome", detail, RETRY_AFTER)
        return _json(wire.outcome_fields(found))

    # --- Views ---------------------------------------------------------------

    def _view(self, name: str) -> str:
        definition = self.opened.registry.projections.get(name)
        if not isinstance(definition, ViewDefinition):
            raise not_found("unknown_view", "there is no view of this name")
        return name

    async def _row(self, request: Request, name: str, view_id: str) -> Response:
        await self._authorized(request, Action(kind="view", view=name, view_id=view_id))
        self._view(name)
        requests.checked_id(view_id, "the row's id")
        await self._wait_for_view(request, name)
        row = await self.opened.view_row(name, view_id)
        if row is None:
            raise not_found("unknown_id", f"{name} has no such row")
        headers = _tagged(row.version)
        if requests.is_unchanged(request, headers["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(row.payload, headers=headers, media_type=JSON)

    async def _rows(self, request: Request, name: str) -> Response:
        await self._authorized(request, Action(kind="view", view=name))
        self._view(name)
        after, limit = request.query_params.get("after", ""), requests.limit_of(request)
        if after:
            requests.checked_id(after, "after")
        await self._wait_for_view(request, name)
        rows = await self.opened.view_rows(name, after=after, limit=limit + 1)
        page = rows[:limit]
        headers = requests.link_to_next(request, page[-1].view_id, limit) if rows[limit:] else {}
        content = [
            {
                "view_id": row.view_id,
                "version": row.version,
                "payload": orjson.Fragment(row.payload),
            }
            for row in page
        ]
        return _json(content, headers)

    async def _wait_for_view(self, request: Request, name: str) -> None:
        """Wait until the view has seen the place that the query names."""
        opened = self.opened
        seen = requests.seen_of(request, opened.process.partitions)
        if seen is None:
            return
        views, made = opened.storage.views, opened.projection(name).fingerprint
        partition, offset = seen
        try:
            await wait_until_reached(views, name, seen, requests.wait_seconds(request), made)
        except errors.WaitTimeout as exc:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE, "view_behind", exc.message, headers=RETRY_AFTER
            ) from exc
        if offset == 0:
            return
        (event,) = await opened.storage.events.read_log(partition, offset - 1, 1)
        try:
            await refuse_parked(views, name, event.key, made)
        except errors.ViewFailed as exc:
            detail = f"{name} has parked this aggregate: see `cqrs-es parked list`"
            raise Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "view_parked", detail) from exc

    # --- Events --------------------------------------------------------------

    async def _stream(self, request: Request, aggregate_type: str, aggregate_id: str) -> Response:
        action = Action(kind="stream", aggregate_type=aggregate_type, aggregate_id=aggregate_id)
        await self._authorized(request, action)
        self._aggregate(aggregate_type)
        key = AggregateKey(aggregate_type, requests.checked_id(aggregate_id, "the aggregate's id"))
        limit, text = requests.limit_of(request), request.query_params.get("after", "0")
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > wire.MAX_SEQUENCE:
            raise bad_request("invalid_query", "after must be a sequence, a whole number from 0")
        opened, after = self.opened, int(text)
        (page,) = await opened.storage.events.load([LoadRequest(key, after)])
        if not page.events and not await self._exists(key):
            raise not_found("unknown_id", "there is no such aggregate")
        found = page.events[:limit]
        more = page.more or len(page.events) > limit
        headers = requests.link_to_next(request, found[-1].sequence, limit) if more else {}
        process = opened.process
        epoch = (await process.info.get(EPOCH_SECONDS)).log_epoch
        events = [to_cloudevent(event, f"/{process.service}", epoch) for event in found]
        return Response(b"[" + b",".join(events) + b"]", headers=headers, media_type=BATCH)

    async def _exists(self, key: AggregateKey) -> bool:
        (page,) = await self.opened.storage.events.load([LoadRequest(key)])
        return bool(page.events)

    async def _events(self, request: Request) -> Response:
        await self._authorized(request, Action(kind="events"))
        process = self.opened.process
        assert self._tail is not None  # noqa: S101 - it is there while the application is
        return await stream_of(request, self._tail, process)

    # --- Schemas -------------------------------------------------------------

    async def _schema(self, request: Request, name: str) -> Response:
        await self._authorized(request, Action(kind="schema"))
        from cqrs_es.schema import asyncapi, openapi  # noqa: PLC0415 - seldom asked for

        process = self.opened.process
        if name == "openapi.json":
            return _json(openapi(process.registry, process.service))
        broker_url = process.settings.broker_url
        return _json(asyncapi(process.registry, process.service, broker_url))


def _check_method(request: Request, method: str) -> None:
    allowed = {"GET", "HEAD"} if method == "GET" else {method}
    if request.method not in allowed:
        detail = f"this path takes {' and '.join(sorted(allowed))}"
        headers = {"Allow": ", ".join(sorted(allowed))}
        raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", detail, headers=headers)


def _tagged(version: int | None) -> dict[str, str]:
    return {} if version is None else {"ETag": f'"{version}"'}


def _json(
    content: object, headers: Mapping[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK
) -> Response:
    return Response(orjson.dumps(content), status.value, dict(headers or {}), JSON)
