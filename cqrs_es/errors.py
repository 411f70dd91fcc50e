"""Every error of the framework, grouped by what the caller can do about it.

The docstring of a class is its default message and names the remedy; facts
about the case are on attributes.
"""

from __future__ import annotations

import inspect
import re
from typing import ClassVar, cast


class CqrsError(Exception):
    """An error of cqrs-es; see its class for what to do."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or default_message(type(self)))

    @property
    def message(self) -> str:
        """What happened and what to do about it, as one sentence."""
        return str(self)


# --- The domain said no: raised by authors, answered to the sender -----------


class DomainError(Exception):
    """A business rule refused the command.

    Subclass it per rule. The docstring's first line is the message and the
    class name in snake case is the code, unless `code` or a message is given.
    """

    code: ClassVar[str] = "domain_error"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in cls.__dict__:
            cls.code = snake_case(cls.__name__)

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or default_message(type(self)))

    @property
    def message(self) -> str:
        """The reason that the sender of the command is given."""
        return str(self)


# --- Retry: the same call may succeed later ----------------------------------


class Unavailable(CqrsError):
    """A server can't be reached; nothing is lost, try again when it is back."""


class StoreUnavailable(Unavailable):
    """The event store can't be reached; check CQRS_ES_STORE_URL and the server, then try again."""


class StoreLocked(StoreUnavailable):
    """Another process holds the event store's write lock; try again when it has finished."""


class RolledBack(StoreUnavailable):
    """The store rolled the transaction back (a deadlock, a lock's timeout); try it again."""


class StoreNotPrimary(StoreUnavailable):
    """The event store's server takes no writes; let CQRS_ES_STORE_URL lead to the primary."""


class StoreRefusing(StoreUnavailable):
    """The event store's server refuses for a time; see its log, then try again."""


class StoreSlow(StoreUnavailable):
    """A statement took too long; look at the event store's load and locks, then try again."""


class BrokerUnavailable(Unavailable):
    """The broker can't be reached; check CQRS_ES_BROKER_URL and the server, then try again."""


class Conflict(CqrsError):
    """Something was changed by somebody else meanwhile; load it again and decide again."""

    def __init__(
        self,
        message: str | None = None,
        *,
        expected: int | None = None,
        actual: int | None = None,
    ) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class CheckpointMoved(Conflict):
    """Another process projects the same partition; read the checkpoint again."""


class LeaseLost(CqrsError):
    """Another process owns the partition now; stop working on it."""


class Withdrawn(CqrsError):
    """The process stops, and the command was not begun; submit it again, here or elsewhere."""


class ScheduleGone(CqrsError):
    """The scheduled command was cancelled before it was decided."""


class WaitTimeout(CqrsError):
    """What was waited for did not happen in time; it may still happen, ask again."""


# --- Fix the input -----------------------------------------------------------


class InvalidMessage(CqrsError):
    """The message breaks the contract for command messages; correct it and send it again."""


class InvalidCommand(CqrsError):
    """The command's payload does not fit its type; correct the named field."""


class IdReused(CqrsError):
    """The command id was used for another command; whoever makes the ids gave one out twice."""

    def __init__(self, command_id: str) -> None:
        self.command_id = command_id
        message = (
            f"command id {command_id} was used for a command with another content: nothing"
            " was done. Send a new command by a new id, and the same command by its own"
        )
        super().__init__(message)


class NotFound(CqrsError):
    """There is nothing by that name; check the spelling and the type."""


class CommandRejected(CqrsError):
    """The command was rejected; `code` says by which rule."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CommandFailed(CqrsError):
    """The command failed and is among the dead letters; fix the cause, then `dead retry`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- Fix the configuration ---------------------------------------------------


class ConfigurationError(CqrsError):
    """The settings or the application's definitions do not fit together."""


class SettingsError(ConfigurationError):
    """A setting has a value that can't be used; see `cqrs-es --help` for the settings."""


class DefinitionError(ConfigurationError):
    """A message, aggregate, view or upcaster is declared wrongly."""


class NotStorable(DefinitionError):
    """A value would not be read back as it is; fix the code that makes it, or the field's type."""


class TooManyHops(DefinitionError):
    """Commands cause commands without end; break the circle."""


class StoreNotInitialised(ConfigurationError):
    """The store has no tables yet; run `cqrs-es init` first.

    `partitions` is how many it has where only newer tables are missing.
    """

    def __init__(self, message: str | None = None, *, partitions: int | None = None) -> None:
        super().__init__(message)
        self.partitions = partitions


class StoreMissing(StoreNotInitialised):
    """There is no such database; check CQRS_ES_STORE_URL, or make it by `cqrs-es init`."""


class WrongService(ConfigurationError):
    """The store belongs to another service; give each service a store of its own."""


class ForeignTable(ConfigurationError):
    """A table of the store's belongs to another program; use a database of the service's own."""


class SchemaTooNew(ConfigurationError):
    """The store was migrated by a newer version of cqrs-es; upgrade this program."""


class PartitionsMismatch(ConfigurationError):
    """CQRS_ES_PARTITIONS differs from the store's; P is fixed when a store is created."""


class EventsGone(ConfigurationError):
    """The topic no longer holds events that were not read yet; read them from the store."""


# --- The store refuses, and will until somebody fixes it ---------------------


class StoreError(CqrsError):
    """The event store refused the operation; see the cause."""


class StoreUnusable(StoreError):
    """The event store can't be used until somebody fixes it."""


class StoreFull(StoreUnusable):
    """The event store's disk is full; make room, nothing was written."""


class StoreReadOnly(StoreUnusable):
    """The event store can't be written to; check the permissions of its file and folder."""


class StoreCorrupt(StoreUnusable):
    """The event store's file is damaged or is no database; restore it from a backup."""


class TransactionEnded(StoreError):
    """The transaction has ended; await each of its statements before its block ends."""


class TooLarge(StoreError):
    """The result is larger than the store can take; yield fewer or smaller events."""


# --- Report a bug, or fix the data ------------------------------------------


class UndecodableRow(CqrsError):
    """A stored row does not fit its type; add an upcaster or fix the row."""

    def __init__(
        self,
        message: str | None = None,
        *,
        type: str | None = None,  # noqa: A002 - the field's own name
        sequence: int | None = None,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.sequence = sequence


class NeedsNewerCode(UndecodableRow):
    """Newer code has written or sent it; deploy that code."""


class UnknownEvent(NeedsNewerCode):
    """A stored event has a type or version that this code does not know; deploy newer code."""


class UnknownVersion(NeedsNewerCode):
    """A command has a later version than this code knows; it waits for that code: deploy it."""


class BrokenLog(CqrsError):
    """The log has a hole or ends before a checkpoint: restore it, then `init --new-epoch`."""


class ViewFailed(CqrsError):
    """A view can't apply an event; fix the view and try again."""


class ViewLost(CqrsError):
    """A view's table is gone though its checkpoints say that it held rows; rebuild the view."""


class ViewMisfit(CqrsError):
    """A row or table of a view is not as this code makes it; rebuild the view."""


class ViewBehind(CqrsError):
    """No projector has filled the view for this code yet; wait until `status` says so."""


class TooManyParked(CqrsError):
    """A view fails on too many aggregates; fix the view, then start its projector again."""


class HandlerTimeout(CqrsError):
    """The handler took longer than CQRS_ES_HANDLER_TIMEOUT."""


def innermost(exc: Exception) -> Exception:
    """Return the first error within nested groups; an error alone is its own."""
    error: Exception = exc
    while isinstance(error, ExceptionGroup):
        group = cast("ExceptionGroup[Exception]", error)
        error = group.exceptions[0]
    return error


def default_message(cls: type[BaseException]) -> str:
    """Return the first line of a class's own docstring, or its name in words."""
    documented = cls.__dict__.get("__doc__")
    if not documented:
        return snake_case(cls.__name__).replace("_", " ")
    return inspect.cleandoc(documented).split("\n", 1)[0]


def snake_case(name: str) -> str:
    """Return `FundsNotAvailable` as `funds_not_available`, `ATMRefused` as `atm_refused`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return words.lower()
