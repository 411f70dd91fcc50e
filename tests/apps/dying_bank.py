"""The bank in a process that kills itself at a given instant, as a power cut would.

`DIES_AT` names one of `INSTANTS` and how many times it is to come first: `"committed 3"`.
What is instrumented is the ports, from outside: the program that dies is the one that is shipped.
"""

from __future__ import annotations

import functools
import os
import signal
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from cqrs_es.brokers.amqp import broker as _amqp
from cqrs_es.brokers.amqp import consuming as _amqp_consuming
from cqrs_es.brokers.redis import broker as _redis
from cqrs_es.brokers.redis import commands as _redis_commands
from cqrs_es.ports.broker import Broker, CommandIntake
from cqrs_es.ports.leases import Leases
from cqrs_es.ports.store import EventStore
from cqrs_es.ports.views import SqlTables, ViewTransaction
from cqrs_es.stores.mysql import session as _mysql
from cqrs_es.stores.postgres import session as _postgres
from cqrs_es.stores.sql import storage as _storage
from cqrs_es.stores.sql.pool import ServerSession
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["INSTANTS", "app"]

_LOADED: Final = (
    _amqp,
    _amqp_consuming,
    _redis,
    _redis_commands,
    _mysql,
    _postgres,
    _storage,
)  # their classes are instrumented

# The role that dies there; whose method; before it, or after it has done (or brought) something.
INSTANTS: Final[dict[str, tuple[str, type, str, str]]] = {
    "taken": ("worker", CommandIntake, "receive", "after"),
    "decided": ("worker", EventStore, "append", "before"),
    "in the append's transaction": ("worker", EventStore, "append", "before commit"),
    "committed": ("worker", EventStore, "append", "after commit"),
    "replied": ("worker", Broker, "reply", "after"),
    "settled": ("worker", CommandIntake, "settle", "after"),
    "read for the topic": ("relay", EventStore, "read_log", "after"),
    "published": ("relay", Broker, "publish", "after"),
    "marked": ("relay", Leases, "advance_mark", "after"),
    "read for a view": ("projector", EventStore, "read_log", "after"),
    "in the view's transaction": ("projector", ViewTransaction, "advance", "before commit"),
    "view committed": ("projector", ViewTransaction, "advance", "after commit"),
    "before the switch": ("rebuild", ViewTransaction, "set_generation", "before"),
    "in the switch": ("rebuild", ViewTransaction, "set_generation", "before commit"),
    "after the switch": ("rebuild", ViewTransaction, "set_generation", "after commit"),
    "before the name leads there": ("rebuild", SqlTables, "publish", "before"),
    "after the name leads there": ("rebuild", SqlTables, "publish", "after"),
}

_in_it: ContextVar[bool] = ContextVar("in_it", default=False)
_left = 0


def _die() -> None:
    """Kill the process when the instant has come often enough."""
    global _left  # noqa: PLW0603 - of a process that has one purpose
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def _implementations(base: type, method: str) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        if method in vars(subclass):
            yield subclass
        yield from _implementations(subclass, method)


def _instrument(base: type, method: str, when: str) -> None:
    implementations = list(_implementations(base, method))
    assert implementations, f"nobody has {base.__name__}.{method}"
    for implementation in implementations:
        _wrap(implementation, method, when)


def _replace(cls: type, method: str, by: object) -> None:
    setattr(cls, method, by)


def _wrap(cls: type, method: str, when: str) -> None:
    call = vars(cls)[method]

    @functools.wraps(call)
    async def wrapped(self: object, *args: Any, **kwargs: Any) -> Any:
        if when == "before":
            _die()
        if when.endswith("commit"):
            _in_it.set(True)
        result = await call(self, *args, **kwargs)
        if when == "after" and (result is None or result):
            _die()
        return result

    _replace(cls, method, wrapped)


def _wrap_commit(cls: type, when: str) -> None:
    call = vars(cls)["commit"]

    @functools.wraps(call)
    async def wrapped(self: object) -> None:
        if _in_it.get() and when == "before commit":
            _die()
        await call(self)
        if _in_it.get() and when == "after commit":
            _die()

    _replace(cls, "commit", wrapped)


def _instrument_at(instant: str) -> None:
    _, base, method, when = INSTANTS[instant]
    _instrument(base, method, when)
    if when.endswith("commit"):
        for session in _implementations(ServerSession, "commit"):
            _wrap_commit(session, when)


if "DIES_AT" in os.environ:
    _instant, _, _times = os.environ["DIES_AT"].rpartition(" ")
    _left = int(_times)
    _instrument_at(_instant)
