"""CQRS and event sourcing: the pure core, free of I/O.

Everything that a domain module needs is here; processes, stores and brokers
are in `cqrs_es.application`, test kits in `cqrs_es.testing`.
"""

from cqrs_es.aggregate import Aggregate
from cqrs_es.errors import CqrsError, DomainError
from cqrs_es.intents import Elapsed, Intent, cancel, later, send
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
from cqrs_es.types import AggregateKey, Version
from cqrs_es.upcasting import Upcaster, drops, renames, upcaster
from cqrs_es.view import View

__all__ = [
    "Aggregate",
    "AggregateKey",
    "CommandContext",
    "CqrsError",
    "DomainError",
    "Elapsed",
    "Envelope",
    "Intent",
    "Outcome",
    "OutcomeError",
    "OutcomeEvent",
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
