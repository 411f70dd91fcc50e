"""An application in a process that kills itself at a given instant, as a power cut would.

`DIES_AT` names one of `INSTANTS` and how many times it is to come first: `"committed 3"`.
What is instrumented is the ports, from outside: the program that dies is the one that is shipped.

A transaction on DynamoDB is one request, which what it depends on was read before. So who dies in
it has read, and sent nothing; who dies once it is sent leaves a request that the server gets to
when the sender is gone. An append may be several of them.
"""

from __future__ import annotations

import contextvars
import functools
import os
import signal
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiohttp.http_writer import StreamWriter

from cqrs_es.brokers import memory as _memory
from cqrs_es.brokers.amqp import broker as _amqp
from cqrs_es.brokers.amqp import consuming as _amqp_consuming
from cqrs_es.brokers.redis import broker as _redis
from cqrs_es.brokers.redis import commands as _redis_commands
from cqrs_es.brokers.sqs import SqsBroker
from cqrs_es.cli import entry
from cqrs_es.ports.broker import Broker, CommandIntake
from cqrs_es.ports.leases import Leases
from cqrs_es.ports.store import EventStore
from cqrs_es.ports.views import SqlTables, ViewTransaction
from cqrs_es.runtime import due as _due
from cqrs_es.runtime.relay_loop import RELAY_MARK
from cqrs_es.serverless.pump import Pump
from cqrs_es.stores.dynamodb import fitting
from cqrs_es.stores.dynamodb import storage as _dynamodb
from cqrs_es.stores.dynamodb.places import LEASES
from cqrs_es.stores.dynamodb.table import Table
from cqrs_es.stores.mysql import session as _mysql
from cqrs_es.stores.postgres import session as _postgres
from cqrs_es.stores.sql import storage as _storage
from cqrs_es.stores.sql.pool import ServerSession
from cqrs_es.stores.sqlite.connection import Connection
from cqrs_es.stores.sqlite.session import LocalSession

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cqrs_es.stores.dynamodb.actions import Action

_LOADED: Final = (
    _amqp,
    _amqp_consuming,
    _due,
    _dynamodb,
    _memory,
    _mysql,
    _postgres,
    _redis,
    _redis_commands,
    _storage,
)  # their classes are instrumented


def _has_rows(*arguments: Any) -> bool:
    """Tell whether an append decides rows of `outgoing_commands`."""
    return any(command.scheduled for chain in arguments[0] for command in chain.commands)


def _is_of_a_view(projector: str, *_: object) -> bool:
    """Tell whether a checkpoint is a projector's: the pump has one, and the relay's mark is one."""
    return not projector.startswith("$")


def _is_the_mark(projector: str, *_: object) -> bool:
    return projector == RELAY_MARK


def _is_an_event(_service: str, operation: str) -> bool:
    return operation == "publish"


def _is_a_lease(action: Action, *_: object) -> bool:
    return "Put" in action and bool(action["Put"]["Item"]["pk"] == {"S": LEASES})


def _are_rows(requests: Sequence[Mapping[str, Any]]) -> bool:
    return str(requests[0]["DeleteRequest"]["Key"]["pk"]["S"]).startswith("views/")


LEASED, FUNCTIONS, SQL, DYNAMODB = "leased", "functions", "sql", "dynamodb"
FEW_ACTIONS: Final = 20
"""So many items are a transaction where an append is to be several, for which the load is small."""


@dataclass(frozen=True, slots=True)
class Instant:
    """Who dies, of whose method: before it, or after it has done (or brought) something.

    `of` tells by a call's arguments whether it counts. `on`: where alone there is such an instant.
    """

    role: str
    port: type
    method: str
    when: str
    of: Callable[..., bool] = lambda *_: True
    on: tuple[str, ...] = ()


INSTANTS: Final[dict[str, Instant]] = {
    "taken": Instant("worker", CommandIntake, "receive", "after"),
    "decided": Instant("worker", EventStore, "append", "before"),
    "in the append's transaction": Instant("worker", EventStore, "append", "before commit"),
    "append sent": Instant("worker", EventStore, "append", "commit sent", on=(DYNAMODB,)),
    "between the append's transactions": Instant(
        "worker", EventStore, "append", "between commits", on=(DYNAMODB,)
    ),
    "committed": Instant("worker", EventStore, "append", "after commit"),
    "replied": Instant("worker", Broker, "reply", "after"),
    "settled": Instant("worker", CommandIntake, "settle", "after"),
    "rows taken": Instant("due", EventStore, "due", "after"),
    "rows decided": Instant("due", EventStore, "append", "before", _has_rows),
    "rows in the append's transaction": Instant(
        "due", EventStore, "append", "before commit", _has_rows
    ),
    "append of rows sent": Instant(
        "due", EventStore, "append", "commit sent", _has_rows, on=(DYNAMODB,)
    ),
    "rows gone": Instant("due", EventStore, "append", "after commit", _has_rows),
    "rows in hand": Instant("due", Pump, "_take_in_hand", "after", on=(FUNCTIONS,)),
    "rows still in hand": Instant("due", Pump, "_let_go", "before", on=(FUNCTIONS,)),
    "read for the topic": Instant("relay", EventStore, "read_log", "after"),
    "published": Instant("relay", Broker, "publish", "after"),
    "some published": Instant("relay", SqsBroker, "_call", "after", _is_an_event, on=(FUNCTIONS,)),
    "in the mark's transaction": Instant(
        "relay", ViewTransaction, "advance", "before commit", _is_the_mark, on=(FUNCTIONS,)
    ),
    "mark committed": Instant(
        "relay", ViewTransaction, "advance", "after commit", _is_the_mark, on=(FUNCTIONS,)
    ),
    "marked": Instant("relay", Leases, "advance_mark", "after", on=(LEASED,)),
    "some leases taken": Instant(
        "relay", Table, "write", "after", _is_a_lease, on=(DYNAMODB, LEASED)
    ),
    "read for a view": Instant("projector", EventStore, "read_log", "after"),
    "in the view's transaction": Instant(
        "projector", ViewTransaction, "advance", "before commit", _is_of_a_view
    ),
    "view sent": Instant(
        "projector", ViewTransaction, "advance", "commit sent", _is_of_a_view, on=(DYNAMODB,)
    ),
    "view committed": Instant(
        "projector", ViewTransaction, "advance", "after commit", _is_of_a_view
    ),
    "read for a reactor": Instant("reactor", EventStore, "read_log", "after"),
    "in the reactor's transaction": Instant(
        "reactor", ViewTransaction, "schedule", "before commit"
    ),
    "reactor's rows sent": Instant(
        "reactor", ViewTransaction, "schedule", "commit sent", on=(DYNAMODB,)
    ),
    "rows added": Instant("reactor", ViewTransaction, "schedule", "after commit"),
    "before the switch": Instant("rebuild", ViewTransaction, "set_generation", "before"),
    "in the switch": Instant("rebuild", ViewTransaction, "set_generation", "before commit"),
    "switch sent": Instant(
        "rebuild", ViewTransaction, "set_generation", "commit sent", on=(DYNAMODB,)
    ),
    "after the switch": Instant("rebuild", ViewTransaction, "set_generation", "after commit"),
    "some rows of an old generation gone": Instant(
        "drop", Table, "_delete_batch", "after", _are_rows, on=(DYNAMODB,)
    ),
    "before the name leads there": Instant("rebuild", SqlTables, "publish", "before", on=(SQL,)),
    "after the name leads there": Instant("rebuild", SqlTables, "publish", "after", on=(SQL,)),
}

# Of a call that counts: which of its transactions is next, 0 outside.
_in_it: ContextVar[int] = ContextVar("in_it", default=0)
_in_request: ContextVar[bool] = ContextVar("in_request", default=False)
_left = 0


def _die() -> None:
    """Kill the process when the instant has come often enough."""
    global _left  # noqa: PLW0603 - of a process that has one purpose
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def _implementations(base: type, method: str) -> Iterator[type]:
    if method in vars(base) and not getattr(base, "__abstractmethods__", None):
        yield base
    subclass: type
    for subclass in base.__subclasses__():
        yield from _implementations(subclass, method)


def _replace(owner: object, name: str, by: object) -> None:
    setattr(owner, name, by)


def _wrap(cls: type, instant: Instant) -> None:
    call, when = vars(cls)[instant.method], instant.when

    @functools.wraps(call)
    async def wrapped(self: object, *args: Any, **kwargs: Any) -> Any:
        counts = instant.of(*args)
        if counts and when == "before":
            _die()
        if "commit" in when:
            _in_it.set(int(counts))
        result = await call(self, *args, **kwargs)
        if counts and when == "after" and result != []:
            _die()
        return result

    _replace(cls, instant.method, wrapped)


def _wrap_commit(cls: type, when: str) -> None:
    call = vars(cls)["commit"]

    @functools.wraps(call)
    async def wrapped(self: object) -> None:
        if _in_it.get() and when == "before commit":
            _die()
        await call(self)
        if _in_it.get() and when == "after commit":
            _die()
        _in_it.set(0)

    _replace(cls, "commit", wrapped)


def _wrap_local_commit(when: str) -> None:
    """Do the same of SQLite, whose sessions are on threads of their own."""
    commit, visit = LocalSession.commit, Connection._visit

    def committed(self: LocalSession) -> None:
        if _in_it.get() and when == "before commit":
            _die()
        commit(self)
        if _in_it.get() and when == "after commit":
            _die()

    async def visited(self: Connection, function: Callable[[], Any], *rest: Any) -> Any:
        return await visit(self, partial(contextvars.copy_context().run, function), *rest)

    _replace(LocalSession, "commit", committed)
    _replace(Connection, "_visit", visited)


def _wrap_transact(when: str) -> None:
    """Do the same of DynamoDB, where all of a transaction is one request."""
    call, written = Table.transact, StreamWriter.write_eof

    async def transact(self: Table, actions: Sequence[Action]) -> None:
        number = _in_it.get()
        if (number and when == "before commit") or (number > 1 and when == "between commits"):
            _die()
        _in_request.set(number > 0 and when == "commit sent")
        try:
            await call(self, actions)
        finally:
            _in_request.set(False)
        if number and when == "after commit":
            _die()
        _in_it.set(number + 1 if number and when == "between commits" else 0)

    async def write_eof(self: StreamWriter, chunk: bytes = b"") -> None:
        await written(self, chunk)
        if _in_request.get():
            _die()

    _replace(Table, "transact", transact)
    _replace(StreamWriter, "write_eof", write_eof)
    if when == "between commits":
        _replace(fitting, "MAX_ACTIONS", FEW_ACTIONS)


def _instrument_at(instant: Instant) -> None:
    implementations = list(_implementations(instant.port, instant.method))
    assert implementations, f"nobody has {instant.port.__name__}.{instant.method}"
    for implementation in implementations:
        _wrap(implementation, instant)
    if "commit" in instant.when:
        _wrap_transact(instant.when)
        for session in _implementations(ServerSession, "commit"):
            _wrap_commit(session, instant.when)
        _wrap_local_commit(instant.when)


def die_as_told() -> None:
    """Instrument what `DIES_AT` names, if there is such a variable."""
    global _left  # noqa: PLW0603 - see `_die`
    if "DIES_AT" in os.environ:
        instant, _, times = os.environ["DIES_AT"].rpartition(" ")
        _left = int(times)
        _instrument_at(INSTANTS[instant])


def main(arguments: list[str]) -> None:
    """Run a verb in a process that was forked for it."""
    die_as_told()
    entry.main(arguments)
