"""What a handler wants to happen next, beside its events: commands to others, and timers.

An intent is yielded like an event. It becomes a row of `outgoing_commands` in the
transaction that writes the events, so it happens exactly if they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from cqrs_es import errors
from cqrs_es.messages import command
from cqrs_es.types import shown

MAX_TIMER_NAME_CHARACTERS: Final = 100


@dataclass(frozen=True, slots=True)
class Send:
    """A command to another aggregate, at once or at a moment; see `send`.

    Of a command that is only named, `payload` has the fields.
    """

    target: type[Any] | str
    aggregate_id: str
    command: object
    at: datetime | None = None
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Later:
    """A timer of the aggregate itself; see `later`."""

    name: str
    at: datetime | None = None
    after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """The end of a timer that has not fired; see `cancel`."""

    name: str


Intent: TypeAlias = Send | Later | Cancel


@command
class Elapsed:
    """A timer of the aggregate has elapsed: declare it among the commands of one that sets any.

    `due` is the moment it was set for, `now` when it is handled: later, after an
    outage for example, so that the handler may ignore what is stale.
    """

    name: str
    due: datetime
    now: datetime


def send(
    target: type[Any] | str,
    aggregate_id: str,
    command: object,
    payload: Mapping[str, Any] | None = None,
    *,
    at: datetime | None = None,
) -> Send:
    """Send a command to an aggregate, at once unless `at` says when.

    `target` is the aggregate's class, or `"<service>:<type>"` for another service's, which
    `app.remote` names. What that one takes is a `@command` of one's own, named and formed
    as it is there, or its name and payload: `send("billing:account", id, "Charge", {…})`.
    Raises `DefinitionError` for a moment without a time zone.
    """
    _check_moment(at)
    return Send(target, aggregate_id, command, at, payload)


def later(name: str, *, after: timedelta | None = None, at: datetime | None = None) -> Later:
    """Set a timer of this aggregate, which gets `Elapsed(name, …)` then.

    A timer of the same name is replaced. Give `after`, a span counted from now by the
    store's clock, or `at`. Raises `DefinitionError` for neither, both, or no time zone.
    """
    if (after is None) == (at is None):
        message = f"later({name!r}) takes either after=… or at=…"
        raise errors.DefinitionError(message)
    _check_moment(at)
    check_timer_name(name)
    return Later(name, at, after)


def cancel(name: str) -> Cancel:
    """End a timer of this aggregate; nothing happens where there is none of that name."""
    check_timer_name(name)
    return Cancel(name)


def _check_moment(at: datetime | None) -> None:
    if at is not None and at.tzinfo is None:
        message = f"{at} has no time zone: datetime(…, tzinfo=UTC)"
        raise errors.DefinitionError(message)


def check_timer_name(name: str) -> None:
    """Raise `DefinitionError` for what no timer may be called."""
    most = MAX_TIMER_NAME_CHARACTERS
    if not 1 <= len(name) <= most or not name.isprintable() or name.startswith("$"):
        message = f"a timer's name has 1 to {most} printable characters, the first no $: not "
        message += shown(name)
        raise errors.DefinitionError(message)
