"""The function's handler: what Lambda calls, for each kind of event that it brings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from cqrs_es import errors
from cqrs_es.http.gateway import Gateway
from cqrs_es.ports.broker import Delivery
from cqrs_es.runtime.consumer import CommandWorker
from cqrs_es.runtime.handed import consumed
from cqrs_es.serverless.asgi import answered
from cqrs_es.serverless.collecting import uncollected
from cqrs_es.settings import Settings
from cqrs_es.telemetry import logs
from cqrs_es.telemetry.lines import get_logger, put_on_lines

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from cqrs_es.application import Application
    from cqrs_es.http.requests import Authorize
    from cqrs_es.runtime.process import Process
    from cqrs_es.serverless.pump import Pump

log = get_logger("cqrs_es.serverless")

# Before the deadline: to hand back what is not settled, and for the answer to arrive.
ENDING_SECONDS: Final = 5.0
ANSWERING_SECONDS: Final = 0.5
_WANTED: Final = (
    "an HTTP request (API Gateway's HTTP API or a function URL, payload format 2.0), records of a"
    ' FIFO queue or of a DynamoDB stream, a scheduled event, or {"pump": {}}'
)


class Context(Protocol):
    """What a function is told about its invocation."""

    @property
    def aws_request_id(self) -> str:
        """The invocation's id."""
        ...

    def get_remaining_time_in_millis(self) -> int:
        """Return for how long this invocation may still go on."""
        ...


def handler(
    app: Application,
    *,
    authorize: Authorize | None = None,
    gateway: Gateway | None = None,
    asgi: ASGIApp | None = None,
) -> Handler:
    """Make a function's handler of an application; see docs/serverless.md.

    HTTP is answered by a `Gateway` with `authorize`, or by `gateway`, or by `asgi`, a web
    application in which that is mounted, and whose own lifespan never runs.
    """
    if gateway is None:
        gateway = Gateway(app, authorize=authorize)
    elif authorize is not None:
        message = "give authorize to the gateway, not beside it"
        raise errors.ConfigurationError(message)
    if gateway.app is not app or gateway.via != "store":
        message = 'the gateway of a function is of the same application, with via="store"'
        raise errors.ConfigurationError(message)
    return Handler(app, gateway, asgi or gateway)


class Handler:
    """Handles one event after another, in one event loop, with one opened application.

    The application is opened by the first event and never closed: a function is not told when
    it ends, and between two events it is frozen. So nothing is kept that is not in the store.
    """

    def __init__(self, app: Application, gateway: Gateway, asgi: ASGIApp) -> None:
        self._app = app
        self._gateway = gateway
        self._asgi = asgi
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: _Opened | None = None

    def __call__(self, event: Mapping[str, Any], context: Context) -> dict[str, Any]:
        """Handle an event; raises what has to come again, or has to be seen by somebody."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(self._handle(event, context))

    def close(self) -> None:
        """Close the application, and its connections: for tests, since Lambda never asks."""
        if self._loop is not None:
            if self._opened is not None:
                self._loop.run_until_complete(self._opened.open_until.aclose())
            self._loop.close()
            self._loop = self._opened = None

    async def _handle(self, event: Mapping[str, Any], context: Context) -> dict[str, Any]:
        structlog.contextvars.clear_contextvars()
        put_on_lines(request_id=context.aws_request_id)
        deadline = asyncio.get_running_loop().time() + context.get_remaining_time_in_millis() / 1000

        def seconds(reserve: float) -> float:
            return deadline - reserve - asyncio.get_running_loop().time()

        match event:
            case {"version": "2.0", "requestContext": {"http": _}}:
                await self._open_for_request()
                return await answered(self._asgi, event, max(0.0, seconds(ANSWERING_SECONDS)))
            case {"Records": [{"eventSource": "aws:sqs"}, *_] as records}:
                opened = await self._open()
                return await opened.decide(records, seconds(ENDING_SECONDS))
            case {"Records": [{"eventSource": "aws:dynamodb"}, *_] as records}:
                opened = await self._open()
                if not opened.rings(records):
                    return {"rung": False}
                return await opened.pump(seconds(ENDING_SECONDS))
            case {"detail-type": "Scheduled Event"} | {"pump": _}:
                opened = await self._open()
                return await opened.pump(seconds(ENDING_SECONDS), chores=True)
            case _:
                message = f"no event that is known; the handler takes {_WANTED}"
                raise errors.ConfigurationError(message)

    async def _open_for_request(self) -> None:
        """Open the application; without one the gateway answers that there is none yet."""
        try:
            await self._open()
        except errors.Unavailable as exc:
            log.warning("application not opened", error=exc.message)

    async def _open(self) -> _Opened:
        if self._opened is None:
            settings = Settings.from_environment()
            logs.configure(settings.log_level, settings.log_format)
            if settings.embedded:
                message = (
                    "what a function writes to its own disk or memory is lost: set"
                    " CQRS_ES_STORE_URL to a store on a server, dynamodb://region/prefix say"
                )
                raise errors.SettingsError(message)
            with uncollected():
                self._opened = await self._opened_with(settings)
        return self._opened

    async def _opened_with(self, settings: Settings) -> _Opened:
        async with AsyncExitStack() as stack:
            opening = self._app.open(settings, reach_broker=False)
            opened = await stack.enter_async_context(opening)
            await stack.enter_async_context(self._gateway.on(opened))
            return _Opened(opened.process, stack.pop_all())


class _Opened:
    """The opened application, as invocations use it."""

    def __init__(self, process: Process, open_until: AsyncExitStack) -> None:
        self._process = process
        self.open_until = open_until
        self._worker = CommandWorker(process)
        self._pump: Pump | None = None

    # --- Commands ------------------------------------------------------------

    async def decide(self, records: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
        """Have the commands of a queue's records decided; name those that are to come again."""
        groups: dict[str, list[Delivery]] = {}
        for record in records:
            groups.setdefault(_group_of(record), []).append(_delivery_of(record))
        if seconds > 0:
            left = await consumed(self._worker, self._process, groups.values(), seconds)
        else:
            left = [delivery for some in groups.values() for delivery in some]
            log.error(
                "no time to decide commands: give the function a longer time-out",
                commands=len(left),
                seconds_needed=ENDING_SECONDS,
            )
        return {"batchItemFailures": [{"itemIdentifier": delivery.tag} for delivery in left]}

    # --- What follows from events --------------------------------------------

    def rings(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether a stream's records say that the log has grown; they tell no more than that.

        Raises `ConfigurationError` for the stream of another table.
        """
        from cqrs_es.stores.dynamodb.storage import DynamoStorage  # noqa: PLC0415 - not on SQL

        storage = self._process.storage
        if not isinstance(storage, DynamoStorage):
            message = "records of a DynamoDB stream, but the store is another: end that mapping"
            raise errors.ConfigurationError(message)
        return any(storage.has_grown(record) for record in records)

    async def pump(self, seconds: float, *, chores: bool = False) -> dict[str, Any]:
        """Do what follows from all that is committed, for so many seconds."""
        if seconds <= 0:
            log.warning("no time to pump: give the function a longer time-out")
            return {"idle": False}
        if self._pump is None:
            from cqrs_es.serverless.pump import Pump  # noqa: PLC0415 - few functions ring

            self._pump = Pump(self._process, self._worker)
        if chores:
            await self._pump.chores()
        pumped = await self._pump.run(seconds)
        return {"idle": pumped.idle, **pumped.done}


def _group_of(record: Mapping[str, Any]) -> str:
    group = record.get("attributes", {}).get("MessageGroupId")
    if group is None or not str(record.get("eventSourceARN", "")).endswith(".fifo"):
        message = (
            f"{record.get('eventSourceARN')} is no FIFO queue, so commands would be decided in any"
            " order: map the function to a queue whose name ends in .fifo"
        )
        raise errors.ConfigurationError(message)
    return str(group)


def _delivery_of(record: Mapping[str, Any]) -> Delivery:
    attributes = record["attributes"]
    return Delivery(
        partition=0,
        body=record["body"].encode(),
        tag=record["messageId"],
        redelivered=int(attributes["ApproximateReceiveCount"]) > 1,
        queued_at=int(attributes["SentTimestamp"]) / 1000,
    )
