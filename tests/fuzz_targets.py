"""What reads others' bytes, as targets of fuzzing: `tests/fuzz.py` runs them.

A target is given any bytes. It raises only where the code under test raises something that it
does not promise to, or reads back another value than was written.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import io
import logging
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Final, cast
from urllib.parse import unquote_to_bytes

import orjson
import structlog
import typer

from cqrs_es import cloudevents, errors, wire
from cqrs_es.cli.invocation import Invocation
from cqrs_es.cli.main import cli
from cqrs_es.client.subscription import FileCursor
from cqrs_es.http import Gateway
from cqrs_es.messages import StoredEvent
from cqrs_es.settings import Settings
from cqrs_es.types import AggregateKey
from worker.app import app as bank

Target = Callable[[bytes], None]
NOW: Final = datetime(2026, 11, 29, tzinfo=UTC)
ACCOUNT: Final = bank.registry.aggregates["account"]
EVENTS: Final = sorted(ACCOUNT.events)
COMMANDS: Final = sorted(ACCOUNT.commands)
SECONDS: Final = 20.0
IN_MEMORY: Final = Settings(store_url="memory://", broker_url="memory://")
GOING_ON: Final = {"run", "worker", "relay", "projector", "reactor", "serve", "tail", "rebuild"}

gateway = Gateway(bank)
program = typer.main.get_command(cli)


def message(body: bytes) -> None:
    """Read a message of the queue; what it says stands in what is written of it."""
    wire.command_id_of(body)
    try:
        read = wire.parse_sent(body, NOW)
    except errors.InvalidMessage:
        return
    again = wire.parse_command(wire.encode_command(read, read.sent_at), trusted=True)
    assert again.payload == read.payload
    assert (again.id, again.key, again.metadata) == (read.id, read.key, read.metadata)


def outcome(body: bytes) -> None:
    """Read an outcome, as the client gets it."""
    with contextlib.suppress(errors.UndecodableRow):
        wire.decode_outcome(body)


def event(body: bytes) -> None:
    """Read an event of the topic, which anybody may have written there."""
    cloudevents.offset_in(body)
    try:
        read, epoch = cloudevents.from_cloudevent(body)
    except errors.UndecodableRow:
        return
    again, _ = cloudevents.from_cloudevent(cloudevents.to_cloudevent(read, "/bank", epoch))
    assert (again.key, again.sequence, again.offset) == (read.key, read.sequence, read.offset)


def stored(body: bytes) -> None:
    """Read an event and a snapshot of a store."""
    name = EVENTS[body[0] % len(EVENTS)] if body else EVENTS[0]
    row = StoredEvent(
        key=AggregateKey("account", "a"),
        sequence=1,
        event_type=name,
        event_version="1.0",
        payload=body[1:],
        metadata=b"{}",
        partition=0,
        offset=1,
        command_id=None,
        recorded_at=NOW,
    )
    with contextlib.suppress(errors.UndecodableRow, errors.UnknownEvent):
        ACCOUNT.decode(row)
    with contextlib.suppress(ValueError):
        ACCOUNT.state.decode_exactly(body[1:])


def command(body: bytes) -> None:
    """Read the payload of a command as its sender may have it."""
    name = COMMANDS[body[0] % len(COMMANDS)] if body else COMMANDS[0]
    try:
        payload: Any = orjson.loads(body[1:])
    except ValueError:
        return
    if isinstance(payload, dict):
        with contextlib.suppress(errors.InvalidCommand):
            ACCOUNT.read(name, cast("dict[str, Any]", payload))


def cursor(body: bytes) -> None:
    """Read a subscriber's file."""
    path = Path(gettempdir()) / "fuzzed-cursor.json"
    path.write_bytes(body)
    with contextlib.suppress(errors.ConfigurationError):
        asyncio.run(FileCursor(path).load())


def http(body: bytes) -> None:
    """Ask the gateway: a line with the method and the target, lines of headers, a body."""
    head, _, content = body.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    method, _, target = first.partition(b" ")
    headers = [(name, value) for name, _, value in (line.partition(b":") for line in lines)]
    status = _serving().run(_asked(method, target, headers, content))
    assert status < HTTPStatus.INTERNAL_SERVER_ERROR, status


@functools.cache
def _serving() -> asyncio.Runner:
    """Open the bank behind its gateway, for as long as the process lives."""
    runner, stack = asyncio.Runner(), AsyncExitStack()
    opened = runner.run(stack.enter_async_context(bank.open(IN_MEMORY)))
    runner.run(stack.enter_async_context(gateway.on(opened)))
    atexit.register(runner.close)
    atexit.register(lambda: runner.run(stack.aclose()))  # the last one registered is the first
    return runner


async def _asked(
    method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
) -> int:
    """Give a request to the gateway as a server does that lets everything through."""
    path, _, query = target.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method.decode("latin-1").upper(),
        "scheme": "http",
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    answers: list[Any] = []
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(asked, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        answers.append(message)

    await asyncio.wait_for(gateway(scope, receive, send), SECONDS)
    status: int = answers[0]["status"]
    return status


@contextlib.contextmanager
def _logs_as_they_are() -> Generator[None]:
    """Undo what the command line does to the logs of its process."""
    root, known, configured = logging.getLogger(), structlog.get_config(), structlog.is_configured()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(capture=False)
        structlog.reset_defaults()
        if configured:
            structlog.configure(**known)


def arguments(body: bytes) -> None:
    """Give the command line words, one on each line; verbs that go on are left out."""
    words = body.decode("utf-8", "replace").replace("\0", "").split("\n")
    if GOING_ON.intersection(words):
        return
    quiet = io.TextIOWrapper(io.BytesIO(), errors="replace")
    with (
        _logs_as_they_are(),
        contextlib.suppress(SystemExit, errors.CqrsError),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        program.main(words, prog_name="cqrs-es", obj=Invocation())


TARGETS: Final[dict[str, Target]] = {
    target.__name__: target
    for target in (message, outcome, event, stored, command, cursor, http, arguments)
}

_ID: Final = "0192f0c1-2b3c-7d4e-8f50-61728394a5b6"
_COMMAND: Final = {
    "id": _ID,
    "type": "DepositMoney",
    "aggregate_type": "account",
    "aggregate_id": "ACCT-1",
    "payload": {"amount": "10.50"},
    "metadata": {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
    "expected_sequence": 3,
    "reply_to": "replies.one",
    "sent_at": "2026-11-29T00:00:00Z",
    "version": "1.0",
}
_EVENT: Final[dict[str, Any]] = {
    "specversion": "1.0",
    "type": EVENTS[0],
    "subject": "ACCT-1",
    "time": "2026-11-29T00:00:00.123456Z",
    "data": {},
    "aggregatetype": "account",
    "aggregatesequence": "1",
    "eventversion": "1.0",
    "partition": 0,
    "offset": "1",
    "logepoch": _ID,
    "metadata": "{}",
    "commandid": _ID,
}
_POST: Final = b"POST /aggregates/account/ACCT-1/DepositMoney"
EXAMPLES: Final[dict[str, list[bytes]]] = {
    "message": [
        orjson.dumps(_COMMAND),
        orjson.dumps({"schedule": _COMMAND, "due": "2026-11-30T00:00:00+01:00"}),
    ],
    "outcome": [
        orjson.dumps(
            {
                "command_id": _ID,
                "status": "accepted",
                "aggregate_type": "account",
                "aggregate_id": "ACCT-1",
                "sequence": 1,
                "partition": 0,
                "offset": "1",
                "events": [{"type": "AccountOpened", "sequence": 1}],
                "error": {"code": "c", "message": "m"},
                "duplicate": False,
            }
        )
    ],
    "event": [orjson.dumps(_EVENT)],
    "stored": [
        bytes([number]) + orjson.dumps({"account_id": "a", "amount": "1.5", "balance": "2"})
        for number in range(len(EVENTS))
    ],
    "command": [
        bytes([number]) + orjson.dumps({"account_id": "a", "amount": "1.5", "atm_id": "b"})
        for number in range(len(COMMANDS))
    ],
    "cursor": [orjson.dumps({"log_epoch": _ID, "offsets": {"0": 12, "1": 5}})],
    "http": [
        _POST + b'\ncontent-type: application/json\nidempotency-key: "k"\n\n' + b'{"amount":"1"}',
        _POST + b'\nif-match: "3"\nprefer: wait=1\n\n{}',
        b'GET /views/account_summary/ACCT-1?seen=0:1\nif-none-match: W/"1"\n\n',
        b"GET /views/account_summary?limit=10&after=a\n\n",
        b"GET /commands/0192f0c1-2b3c-7d4e-8f50-61728394a5b6\n\n",
        b"GET /aggregates/account/ACCT-1/events?after=0\n\n",
        b"GET /openapi.json\n\n",
    ],
    "arguments": [
        b"view\naccount_summary\nACCT-1",
        b"send\naccount\nACCT-1\nDepositMoney\n{}",
        b"outcome\n" + _ID.encode(),
        b"stream\naccount\nACCT-1\n--after\n3",
        b"scheduled\nlist\n--limit\n5",
        b"dead\nlist",
        b"check\n--stored",
        b"schema\nexport",
    ],
}
