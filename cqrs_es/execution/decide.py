"""Deciding a chain of commands for one aggregate, one upon the other, with no I/O of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from cqrs_es import errors
from cqrs_es.codec import to_json
from cqrs_es.execution.baselines import Baseline
from cqrs_es.execution.handling import run_handler
from cqrs_es.execution.hooks import NO_HOOKS, Hooks
from cqrs_es.execution.policy import MAX_EVENTS_PER_COMMAND, ExecutionPolicy
from cqrs_es.execution.report import ids_of
from cqrs_es.execution.work import Job, Work, refusal
from cqrs_es.messages import CommandContext, CommandMessage, Outcome, OutcomeEvent, Status
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import DecidedCommand, NewEvent
from cqrs_es.types import text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from cqrs_es.definitions import AggregateDefinition, AnyAggregate

log = structlog.get_logger("cqrs_es.execution")


class Decider:
    """Decides works; knows the policy, the time, and whom to tell of handlers that fail.

    Whatever a handler raises is its command's failure, until `ending` is set: from then on a
    cancellation is meant for the decider.
    """

    def __init__(
        self,
        policy: ExecutionPolicy,
        now: Callable[[], datetime],
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self._policy = policy
        self._now = now
        self._hooks = hooks
        self.ending = False

    async def decide(self, work: Work) -> None:
        """Decide the work's jobs in order, filling `decided`, `result` and perhaps `held`."""
        lineage = _Lineage(work) if work.baseline is not None else None
        for index, job in enumerate(work.jobs):
            decided = await self._decide_or_hold(work, lineage, job)
            if decided is None:
                work.held = work.jobs[index:]
                break
            work.decided.append(decided)
        if lineage is not None:
            work.result, work.new_snapshot = lineage.result, lineage.snapshot

    async def _decide_or_hold(
        self, work: Work, lineage: _Lineage | None, job: Job
    ) -> DecidedCommand | None:
        """Decide one job, at once again where the ladder says so; None to wait first."""
        while True:
            try:
                return await self._decide_one(work, lineage, job)
            except BaseException as exc:
                if isinstance(exc, KeyboardInterrupt):
                    raise
                if self.ending:
                    raise asyncio.CancelledError from exc
                _take_back_cancellations()
                job.failures += 1
                delay = self._after_failure(job, exc)
                if delay is None:
                    return self._failed(job, "internal_error", _said(exc), detail=text_of(exc))
                if delay > 0:
                    work.hold_seconds = delay
                    return None

    def _after_failure(self, job: Job, exc: BaseException) -> float | None:
        """Record a handler's failure; return the wait before the next try, None for no more."""
        delay = None if _permanent(exc) else self._policy.retry_delay(job.failures)
        log.warning(
            "handler failed",
            **ids_of(job.message),
            failures=job.failures,
            retry_in=delay,
            exc_info=exc,
        )
        if delay is not None:
            self._hooks.meter.retry("handler")
        job.span.failed(exc)
        if self._hooks.on_failure is not None:
            self._hooks.on_failure(job.message, exc)
        return delay

    async def _decide_one(self, work: Work, lineage: _Lineage | None, job: Job) -> DecidedCommand:
        if job.condemned is not None:
            return self._failed(job, "internal_error", job.condemned)
        if work.definition is None:
            reason = f"aggregate type {job.message.aggregate_type!r} is unknown here"
            return self._failed(job, "unknown_aggregate_type", reason)
        codec = work.definition.commands.get(job.message.type)
        if codec is None:
            reason = f"{job.message.aggregate_type} has no command {job.message.type!r}"
            return self._failed(job, "unknown_command", reason)
        try:
            command = codec.convert(job.message.payload)
        except errors.InvalidCommand as exc:
            return _decided(job, _rejected(job, "invalid_command", exc.message, None))
        if work.load_failure is not None or lineage is None:
            failure = work.load_failure
            return self._failed(job, "internal_error", _said(failure), detail=text_of(failure))
        return await self._handle(work.definition, lineage, job, command)

    async def _handle(
        self, definition: AggregateDefinition, lineage: _Lineage, job: Job, command: object
    ) -> DecidedCommand:
        """Run the handler on a scratch copy; only what it yields goes on into the lineage."""
        expected = job.message.expected_sequence
        if expected is not None and expected != lineage.sequence:
            reason = f"the aggregate is at sequence {lineage.sequence}, not {expected}"
            return _decided(job, _rejected(job, "conflict", reason, lineage.sequence))
        collected = _CollectedEvents(definition, job.message, self._policy.max_event_bytes)
        try:
            with job.span.handling():
                await run_handler(
                    lineage.scratch(),
                    command,
                    definition.services(_context(job.message)),
                    on_event=collected.add,
                    seconds=definition.handler_timeout or self._policy.handler_timeout,
                )
        except errors.DomainError as exc:
            return _decided(job, _rejected(job, exc.code, exc.message, lineage.sequence))
        except errors.TooLarge as exc:
            return self._failed(job, "internal_error", exc.message)
        lineage.extend(collected.events)
        return _decided(job, _accepted(job, lineage.sequence, collected.events), collected.events)

    def _failed(
        self, job: Job, code: str, reason: str, *, detail: str | None = None
    ) -> DecidedCommand:
        """Fail a command; senders are told the reason, operators also find the detail."""
        letter = DeadLetter.of(
            job.message.body,
            reason=f"{code}: {detail or reason}",
            source="commands",
            seen_at=self._now(),
            limit=self._policy.max_message_bytes,
            command_id=job.message.id,
            attempts=max(1, job.failures + job.attempts),
        )
        outcome = refusal(job.message, Status.FAILED, code, reason)
        return _decided(job, outcome, dead_letter=letter)


class _Lineage:
    """An aggregate's state as the chain goes on: the baseline plus what was accepted so far.

    It is advanced by the events as they will be read back, never by the
    handler's own objects: what can't be loaded again is found before it is
    stored, and state that a handler changed without an event leaves no trace.
    """

    def __init__(self, work: Work) -> None:
        assert work.definition is not None  # noqa: S101 - works with a baseline have one
        assert work.baseline is not None  # noqa: S101
        self._definition = work.definition
        self._base = work.baseline
        self._encoded = work.baseline.state
        self._live: AnyAggregate | None = None
        self.sequence = work.baseline.sequence
        self.snapshot: tuple[int, bytes] | None = None

    @property
    def result(self) -> Baseline:
        """The baseline that the aggregate has once the chain is committed."""
        if self.snapshot is not None:
            return Baseline(self._encoded, self.sequence, self._base.snapshot + 1)
        return Baseline(self._encoded, self.sequence, self._base.snapshot, self._base.mend_snapshot)

    def scratch(self) -> Any:
        """Return a copy of the present state for a handler to work on."""
        return self._definition.state.decode(self._encoded)

    def extend(self, new: Sequence[NewEvent]) -> None:
        """Apply accepted events, taking the snapshot that falls due among them.

        Raises, with the lineage unchanged, what decoding, `apply` or encoding raise.
        """
        if not new:
            return
        due = self._snapshot_due(len(new))
        live, sequence, snapshot = self.scratch(), self.sequence, self.snapshot
        for event in new:
            live.apply(self._definition.events[event.event_type].codec.decode(event.payload))
            sequence += 1
            if sequence == due:
                snapshot = (sequence, self._definition.state.encode(live))
        self._encoded = self._definition.state.encode(live)
        self.sequence, self.snapshot = sequence, snapshot

    def _snapshot_due(self, new_events: int) -> int | None:
        if self._base.mend_snapshot:
            return self.sequence + new_events
        return self._definition.source.snapshot_at(self.sequence, new_events)


class _CollectedEvents:
    """The events one command yields, encoded as they come."""

    def __init__(
        self, definition: AggregateDefinition, message: CommandMessage, max_event_bytes: int
    ) -> None:
        self._definition = definition
        self._metadata = to_json(dict(message.metadata))
        self._max_event_bytes = max_event_bytes
        self.events: list[NewEvent] = []

    def add(self, event: object) -> None:
        """Encode an event; raise `DefinitionError` for a foreign class, `TooLarge` over limits."""
        known = self._definition.event_classes.get(type(event))
        if known is None:
            name = self._definition.cls.__qualname__
            message = f"{name} yielded a {type(event).__qualname__}, which is not one of its events"
            raise errors.DefinitionError(message)
        payload = known.codec.encode(event)
        if len(payload) > self._max_event_bytes:
            message = f"a {known.spec.name} of {len(payload)} bytes is over CQRS_ES_MAX_EVENT_BYTES"
            raise errors.TooLarge(message)
        if len(self.events) == MAX_EVENTS_PER_COMMAND:
            message = f"the command yielded more than {MAX_EVENTS_PER_COMMAND} events"
            raise errors.TooLarge(message)
        spec = known.spec
        self.events.append(NewEvent(spec.name, spec.version, payload, self._metadata))


def _context(message: CommandMessage) -> CommandContext:
    return CommandContext(
        command_id=message.id,
        aggregate_type=message.aggregate_type,
        aggregate_id=message.aggregate_id,
        metadata=message.metadata,
    )


def _accepted(job: Job, sequence: int, events: Sequence[NewEvent]) -> Outcome:
    first = sequence - len(events) + 1
    return Outcome(
        command_id=job.message.id,
        status=Status.ACCEPTED,
        aggregate_type=job.message.aggregate_type,
        aggregate_id=job.message.aggregate_id,
        sequence=sequence,
        events=tuple(
            OutcomeEvent(event.event_type, number) for number, event in enumerate(events, first)
        ),
    )


def _rejected(job: Job, code: str, reason: str, sequence: int | None) -> Outcome:
    return refusal(job.message, Status.REJECTED, code, reason, sequence=sequence)


def _decided(
    job: Job,
    outcome: Outcome,
    events: Sequence[NewEvent] = (),
    dead_letter: DeadLetter | None = None,
) -> DecidedCommand:
    return DecidedCommand(
        outcome=outcome,
        content_hash=job.content_hash,
        events=tuple(events),
        dead_letter=dead_letter,
        replaces_failed=job.retrying,
        attempted=job.attempts > 0,
    )


def _take_back_cancellations() -> None:
    """Forget that a handler cancelled its own task; nobody else does before the end."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


def _permanent(exc: BaseException) -> bool:
    """Tell whether trying again at once could not help: the definitions or the data are wrong."""
    return isinstance(exc, errors.ConfigurationError | errors.UndecodableRow)


def _said(exc: BaseException | None) -> str:
    """Say what went wrong in words fit for a sender: no traceback, no payload."""
    if isinstance(exc, errors.CqrsError):
        return exc.message
    return f"the handler raised {type(exc).__name__}"
