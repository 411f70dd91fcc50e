"""What a command is at each stage of its way through the executor.

    CommandMessage ─submit─▶ Submission ─load─▶ Prepared ─decide─▶ Decided ─append─▶ Outcome

A `Prepared` and a `Decided` hold the submissions for one aggregate that go
together. Each stage is made once and never changed: a submission that goes
round again is a new one with the same answer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from cqrs_es.telemetry.tracing import NO_SPAN, CommandSpan

if TYPE_CHECKING:
    from datetime import datetime

    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.execution.baselines import Baseline
    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.store import Chain, ScheduledCommand, UniqueKey
    from cqrs_es.types import AggregateKey

Answer: TypeAlias = "asyncio.Future[Outcome]"


class Submission(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A command that waits for its outcome.

    `attempts`: how often it was tried before by processes that died of it, as
    the store counts. `retrying`: a stored outcome `failed` is to be replaced.
    `condemned`: why it must fail without being tried again. `failures`: how
    often its handler failed here. `uncertain`: it was part of an append whose
    commit is unknown. `alone`: it was part of one that the store refused, so it
    is decided and appended by itself. `scheduled`: the row that it was taken from, whose
    deletion is part of deciding it. `again`: it was decided before, so that its row may be gone
    by now. `untrusted`: anybody may have sent it, so it can't be
    one that only the framework sends. `dropped`: an operator gives it up, so it is rejected.
    `fresh`: its id was made for it just now, so that it has no outcome yet.
    `taken`: unique keys that another aggregate held when it was to be appended. `seen`: the
    aggregate's sequence as a conflict told it. `conflicts`: how many there were.
    `received_at`: see `CommandContext`.
    """

    message: CommandMessage
    content_hash: str
    answer: Answer
    received_at: datetime
    attempts: int = 0
    retrying: bool = False
    condemned: str | None = None
    failures: int = 0
    uncertain: bool = False
    alone: bool = False
    scheduled: ScheduledCommand | None = None
    again: bool = False
    untrusted: bool = False
    dropped: bool = False
    fresh: bool = False
    taken: frozenset[UniqueKey] = frozenset()
    seen: int = 0
    conflicts: int = 0
    span: CommandSpan = NO_SPAN


class Prepared(msgspec.Struct, frozen=True, eq=False):
    """Commands for one aggregate that can be decided, one after another.

    `definition` is None for an unknown aggregate type; `baseline` is None where
    no command needs it, or where loading it failed: then `failure` is why.
    """

    key: AggregateKey
    submissions: tuple[Submission, ...]
    definition: AggregateDefinition | None
    baseline: Baseline | None = None
    failure: BaseException | None = None


class Decided(msgspec.Struct, frozen=True, eq=False):
    """Commands for one aggregate with their outcomes, ready to be appended as `chain`.

    `baseline` is the aggregate's once that is committed, None where it has none
    to keep. `waiting` are the commands behind one whose handler failed: they are
    decided again after `wait_seconds`. `size` is about how many bytes an append carries.
    """

    submissions: tuple[Submission, ...]
    chain: Chain
    baseline: Baseline | None
    size: int
    waiting: tuple[Submission, ...] = ()
    wait_seconds: float = 0.0

    @property
    def key(self) -> AggregateKey:
        """The aggregate."""
        return self.chain.key
