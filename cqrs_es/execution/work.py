"""The pieces that a command passes through the executor as: jobs, and their chains."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from cqrs_es.messages import CommandMessage, Outcome, OutcomeError, Status
from cqrs_es.ports.store import Chain, Snapshot
from cqrs_es.telemetry.tracing import NO_SPAN, CommandSpan
from cqrs_es.types import storable

if TYPE_CHECKING:
    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.execution.baselines import Baseline
    from cqrs_es.ports.store import DecidedCommand
    from cqrs_es.types import AggregateKey

Answer: TypeAlias = "asyncio.Future[Outcome]"


@dataclass(slots=True, eq=False)
class Job:
    """One command in hand, until its answer is known.

    `attempts`: how often it was tried before by processes that died of it, as
    the store counts. `retrying`: a stored outcome `failed` is to be replaced.
    `condemned`: why it must fail without being tried again. `uncertain`: it
    was part of an append whose commit is unknown. `alone`: it was part of one
    that the store refused, so it is decided and appended by itself.
    """

    message: CommandMessage
    content_hash: str
    answer: Answer
    attempts: int = 0
    retrying: bool = False
    condemned: str | None = None
    failures: int = 0
    uncertain: bool = False
    alone: bool = False
    span: CommandSpan = NO_SPAN
    followers: list[Job] = field(default_factory=list["Job"])


@dataclass(slots=True, eq=False)
class Work:
    """The jobs of one aggregate that are decided and committed together.

    `held` are those that had to wait for a retry of the first among them, for
    `hold_seconds`.
    """

    key: AggregateKey
    jobs: list[Job]
    definition: AggregateDefinition | None = None
    baseline: Baseline | None = None
    load_failure: BaseException | None = None
    decided: list[DecidedCommand] = field(default_factory=list["DecidedCommand"])
    result: Baseline | None = None
    new_snapshot: tuple[int, bytes] | None = None
    held: list[Job] = field(default_factory=list[Job])
    hold_seconds: float = 0.0

    @property
    def size(self) -> int:
        """About how many bytes an append of the decided commands carries."""
        return sum(len(event.payload) + 512 for d in self.decided for event in d.events)

    def chain(self, partitions: int) -> Chain:
        """Return what is to be appended, to a log of so many partitions."""
        return Chain(
            key=self.key,
            partition=self.key.partition(partitions),
            base_sequence=None if self.baseline is None else self.baseline.sequence,
            commands=tuple(self.decided),
            snapshot=self._snapshot(),
        )

    def _snapshot(self) -> Snapshot | None:
        if self.new_snapshot is None or self.result is None:
            return None
        sequence, state = self.new_snapshot
        return Snapshot(self.key, sequence, self.result.snapshot, state)


def refusal(
    message: CommandMessage,
    status: Status,
    code: str,
    reason: str,
    *,
    sequence: int | None = None,
) -> Outcome:
    """Make the outcome of a command that was not accepted."""
    return Outcome(
        command_id=message.id,
        status=status,
        aggregate_type=message.aggregate_type,
        aggregate_id=message.aggregate_id,
        sequence=sequence,
        error=OutcomeError(code, storable(reason)),
    )


def id_reused(message: CommandMessage) -> Outcome:
    """Make the outcome of a command whose id belongs to another; it is never stored."""
    reason = "this command id was used for a command with another content; send a new id"
    return refusal(message, Status.REJECTED, "id_reused", reason)
