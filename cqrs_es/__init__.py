"""CQRS and event sourcing: the pure core, free of I/O.

Everything that a domain module needs is here; processes, stores and brokers
are in `cqrs_es.application`, test kits in `cqrs_es.testing`.

Each name is imported when it is first used: the command line can so listen for
signals before it has imported anything that takes time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cqrs_es.aggregate import BUGS, Aggregate, Retries
    from cqrs_es.errors import CqrsError, DomainError
    from cqrs_es.intents import Elapsed, Intent, Send, cancel, later, send
    from cqrs_es.messages import (
        CommandContext,
        Envelope,
        Outcome,
        OutcomeError,
        OutcomeEvent,
        Status,
        command,
        event,
    )
    from cqrs_es.reactor import Input, ProcessManager, Reactor, Refused
    from cqrs_es.types import AggregateKey, Version
    from cqrs_es.upcasting import Upcaster, drops, renames, upcaster
    from cqrs_es.view import View

__all__ = [
    "BUGS",
    "Aggregate",
    "AggregateKey",
    "CommandContext",
    "CqrsError",
    "DomainError",
    "Elapsed",
    "Envelope",
    "Input",
    "Intent",
    "Outcome",
    "OutcomeError",
    "OutcomeEvent",
    "ProcessManager",
    "Reactor",
    "Refused",
    "Retries",
    "Send",
    "Status",
    "Upcaster",
    "Version",
    "View",
    "cancel",
    "command",
    "drops",
    "event",
    "later",
    "renames",
    "send",
    "upcaster",
]
_MODULES = ("aggregate", "errors", "intents", "messages", "reactor", "types", "upcasting", "view")


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = [import_module(f"{__name__}.{module}") for module in _MODULES]
        globals().update({each: _found(each, modules) for each in __all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _found(name: str, modules: list[Any]) -> Any:
    return next(getattr(module, name) for module in modules if hasattr(module, name))
