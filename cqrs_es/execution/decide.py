"""Deciding commands for one aggregate, one upon the other, with no I/O of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.aggregate import NO_RETRIES
from cqrs_es.codec import to_json
from cqrs_es.execution.baselines import Baseline, freeze
from cqrs_es.execution.causes import ELAPSED, MOST_COMMANDS, Cause, Causes
from cqrs_es.execution.handling import run_handler
from cqrs_es.execution.keys import NONE, Claims, Keys
from cqrs_es.execution.policy import MAX_EVENTS_PER_COMMAND, NO_HOOKS, ExecutionPolicy, Hooks
from cqrs_es.execution.report import ids_of
from cqrs_es.execution.stages import Decided, Prepared, Submission
from cqrs_es.intents import Cancel, Later, Send
from cqrs_es.messages import (
    CommandContext,
    CommandMessage,
    Outcome,
    OutcomeError,
    OutcomeEvent,
    Status,
    is_of_newer_code,
)
from cqrs_es.ports.dead_letters import RECEIVED_AT, DeadLetter
from cqrs_es.ports.store import Chain, DecidedCommand, NewEvent, ScheduledCommand, Snapshot
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import storable, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from cqrs_es.definitions import AggregateDefinition, AnyAggregate
    from cqrs_es.ports.store import KeyMoves
    from cqrs_es.types import AggregateKey, JsonObject

log = get_logger("cqrs_es.execution")

# What a row of the log takes beside its payload, for the bound on an append's size.
ROW_BYTES: Final = 512
_CAUSES: Final = (Send, Later)


class Decider:
    """Decides what is prepared; knows the policy, the time, and whom to tell of handlers that fail.

    `begin(submission)` is asked before each command; where it says False the command is
    left out. Whatever a handler raises is its command's failure, until `ending` is set:
    from then on a cancellation is meant for the decider. `failures` counts what handlers raised.
    """

    def __init__(
        self,
        policy: ExecutionPolicy,
        now: Callable[[], datetime],
        partitions: int,
        causes: Causes,
        keys: Keys,
        begin: Callable[[Submission], bool] = lambda _: True,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self._policy = policy
        self._now = now
        self._partitions = partitions
        self._causes = causes
        self._keys = keys
        self._begin = begin
        self._hooks = hooks
        self.ending = False
        self.failures = 0

    async def decide(self, prepared: Prepared) -> Decided:
        """Decide the commands in order, up to one that has to wait for its next attempt."""
        lineage = _Lineage.of(prepared, self._keys)
        submissions: list[Submission] = []
        commands: list[DecidedCommand] = []
        later: _Later | None = None
        size = 0
        for index, submission in enumerate(prepared.submissions):
            if not self._begin(submission):
                continue
            row = submission.scheduled
            if row is not None and lineage is not None and row.timer in lineage.ended_timers:
                # It is looked up again when its end is committed.
                later = _Later(submission, 0.0, prepared.submissions[index + 1 :])
                break
            try:
                decided = await self._decide_until_settled(prepared, lineage, submission)
            except errors.NeedsNewerCode:
                if not commands:
                    raise
                # What is before it is committed, then it comes first.
                later = _Later(submission, 0.0, prepared.submissions[index + 1 :])
                break
            if isinstance(decided, _Later):
                later = replace(decided, behind=prepared.submissions[index + 1 :])
                break
            decided = self._with_consequences(prepared.definition, submission, decided)
            submissions.append(submission)
            commands.append(decided if row is None else self._renewed(row, decided))
            for event in decided.events:
                size += len(event.payload) + ROW_BYTES
            if (
                decided.holds_back
                and decided.dead_letter
                and (behind := prepared.submissions[index + 1 :])
            ):
                # They are looked up again when the failure is committed, and found held back.
                later = _Later(behind[0], 0.0, behind[1:])
                break
        return Decided(
            submissions=tuple(submissions),
            chain=Chain(
                key=prepared.key,
                partition=prepared.key.partition(self._partitions),
                base_sequence=None if lineage is None else lineage.base.sequence,
                commands=tuple(commands),
                snapshot=None if lineage is None else lineage.snapshot,
                moves=None if lineage is None else lineage.moves,
                keeps_outcomes=prepared.definition is not None
                and prepared.definition.outcomes == "for ever",
            ),
            baseline=None if lineage is None else lineage.baseline,
            size=size,
            waiting=() if later is None else (later.first, *later.behind),
            wait_seconds=0.0 if later is None else later.seconds,
        )

    def _with_consequences(
        self,
        definition: AggregateDefinition | None,
        submission: Submission,
        decided: DecidedCommand,
    ) -> DecidedCommand:
        """Tell a process manager of a rejection; have what follows on its own failure wait."""
        of_process = definition is not None and definition.inputs is not None
        if decided.outcome.status is Status.ACCEPTED and not of_process:
            return decided
        if not self._trusted(submission):
            return decided
        if of_process:
            return replace(decided, holds_back=True)
        error = decided.outcome.error
        if decided.outcome.status is Status.REJECTED and error is not None:
            refusal = self._causes.refusal(submission.message, error)
            if refusal is not None:
                return replace(decided, causes=(refusal,))
        return decided

    async def _decide_until_settled(
        self, prepared: Prepared, lineage: _Lineage | None, submission: Submission
    ) -> DecidedCommand | _Later:
        """Decide one command, at once again where the ladder says so."""
        while True:
            try:
                return await self._decide_one(prepared, lineage, submission)
            except BaseException as exc:
                if isinstance(exc, KeyboardInterrupt | errors.NeedsNewerCode):
                    raise
                if self.ending:
                    raise asyncio.CancelledError from exc
                _take_back_cancellations()
                self.failures += 1
                submission = replace(submission, failures=submission.failures + 1)
                delay = self._after_failure(prepared.definition, submission, exc)
                if delay is None:
                    return self._failed(
                        submission, "internal_error", _said(exc), detail=text_of(exc)
                    )
                if delay > 0:
                    return _Later(submission, delay)

    def _renewed(self, row: ScheduledCommand, decided: DecidedCommand) -> DecidedCommand:
        """Have a recurring command come again, whatever its outcome."""
        following = self._causes.renewed(row)
        return (
            decided if following is None else replace(decided, causes=(*decided.causes, following))
        )

    def _after_failure(
        self, definition: AggregateDefinition | None, submission: Submission, exc: BaseException
    ) -> float | None:
        """Record a handler's failure; return the wait before the next try, None for no more."""
        own = NO_RETRIES if definition is None else definition.retries
        delay = None
        if not _permanent(exc):
            delay = self._policy.retry_delay(submission.failures, exc, own)
        log.warning(
            "handler failed",
            **ids_of(submission.message),
            failures=submission.failures,
            retry_in=delay,
            exc_info=exc,
        )
        if delay is not None:
            self._hooks.meter.retry("handler")
        submission.span.failed(exc)
        if self._hooks.on_failure is not None:
            self._hooks.on_failure(submission.message, exc)
        return delay

    async def _decide_one(
        self, prepared: Prepared, lineage: _Lineage | None, submission: Submission
    ) -> DecidedCommand:
        message, definition = submission.message, prepared.definition
        if submission.condemned is not None:
            return self._failed(submission, "internal_error", submission.condemned)
        if submission.dropped:
            return _rejected(submission, "dropped", "an operator has dropped it", None)
        if definition is None or (definition.inputs is not None and not self._trusted(submission)):
            reason = f"aggregate type {message.aggregate_type!r} is unknown here"
            return self._failed(submission, "unknown_aggregate_type", reason)
        elapsed = message.type == ELAPSED
        if not definition.takes(message.type) or (elapsed and not self._trusted(submission)):
            return self._unknown_command(submission)
        payload = self._elapsed(submission) if elapsed else message.payload
        try:
            given = definition.read(message.type, payload, message.version)
        except errors.InvalidCommand as exc:
            return _rejected(submission, "invalid_command", exc.message, None)
        if lineage is None:
            failure = prepared.failure
            return self._failed(
                submission, "internal_error", _said(failure), detail=text_of(failure)
            )
        return await self._handle(definition, lineage, submission, given)

    def _unknown_command(self, submission: Submission) -> DecidedCommand:
        """Fail a command that the aggregate does not have; one with a version is newer code's."""
        message = submission.message
        reason = f"{message.aggregate_type} has no command {message.type!r}"
        if is_of_newer_code(message.version):
            raise errors.UnknownVersion(
                f"{reason}, and this is version {message.version}: newer code sent it; deploy that"
                " code, or an upcaster that raises InvalidCommand",
                type=message.type,
            )
        return self._failed(submission, "unknown_command", reason)

    def _trusted(self, submission: Submission) -> bool:
        """Tell whether only the framework can have made a command; a row may be a sender's."""
        message, row = submission.message, submission.scheduled
        if row is None:
            return not submission.untrusted
        return self._causes.signed(message.id, message.metadata)

    def _elapsed(self, submission: Submission) -> JsonObject:
        """Return a timer's payload, with when it was due, and the time."""
        payload, row = submission.message.payload, submission.scheduled
        now = self._now() if row is None else row.moment + row.late
        due = now if row is None else row.moment
        return payload | {"due": due.isoformat(), "now": now.isoformat()}

    async def _handle(
        self,
        definition: AggregateDefinition,
        lineage: _Lineage,
        submission: Submission,
        given: Sequence[object],
    ) -> DecidedCommand:
        """Run the handler on a scratch copy; only what it yields goes on into the lineage.

        A rule of a process manager refuses nothing, since nobody would hear it: it has failed.
        """
        message = submission.message
        expected = message.expected_sequence
        if expected is not None and expected != lineage.sequence:
            reason = f"the aggregate is at sequence {lineage.sequence}, not {expected}"
            return _rejected(submission, "conflict", reason, lineage.sequence)
        yielded = _Yielded(definition, message, self._policy.max_event_bytes)
        try:
            with submission.span.handling():
                state, services = lineage.scratch(), definition.services(_context(submission))
                for each in given:
                    if definition.inputs is not None and state.closed:
                        self._hooks.meter.closed_input(definition.type)
                        continue
                    await run_handler(
                        state,
                        each,
                        services,
                        on_yield=yielded.add,
                        seconds=definition.handler_timeout or self._policy.handler_timeout,
                    )
        except errors.DomainError as exc:
            if definition.inputs is not None:
                raise
            return _rejected(submission, exc.code, exc.message, lineage.sequence)
        except errors.TooLarge as exc:
            return self._failed(submission, "internal_error", exc.message)
        caused = self._caused(submission, lineage.sequence, yielded) if yielded.intents else ()
        ended = yielded.ended_timers if caused or yielded.cancelled else ()
        try:
            lineage.extend(yielded.events, submission.taken, ended)
        except _KeyTaken as exc:
            return _rejected(submission, f"{exc.name}_taken", str(exc), lineage.sequence)
        cancelled = tuple(yielded.cancelled)
        return _accepted(submission, lineage.sequence, yielded.events, caused, cancelled)

    def _caused(
        self, submission: Submission, sequence: int, yielded: _Yielded
    ) -> tuple[ScheduledCommand, ...]:
        """Make the rows of what the handler wants to happen, each caused by the event before it."""
        message, key = submission.message, submission.message.key
        rows: list[ScheduledCommand] = []
        for events_before, intent in yielded.intents:
            if not yielded.events and isinstance(intent, Send):
                name = yielded.definition.cls.__qualname__
                text = f"{name} sends a command without an event: the log must say why; yield one"
                raise errors.DefinitionError(text)
            number = sequence + max(1, events_before)
            cause_id = f"{key}/{number}" if yielded.events else message.id
            process = None if yielded.definition.inputs is None else key
            cause = Cause(cause_id, message.id, message.metadata, process, key)
            if isinstance(intent, Send):
                rows.append(self._causes.sent(intent, cause))
            else:
                rows.append(self._causes.timer(intent, key, cause))
        if len(rows) > MOST_COMMANDS:
            text = f"the command causes {len(rows)} commands; at most {MOST_COMMANDS} are allowed"
            raise errors.TooLarge(text)
        return tuple(rows)

    def _failed(
        self, submission: Submission, code: str, reason: str, *, detail: str | None = None
    ) -> DecidedCommand:
        """Fail a command; senders are told the reason, operators also find the detail."""
        message = submission.message
        letter = DeadLetter.of(
            message.body,
            reason=f"{code}: {detail or reason}",
            source="commands",
            seen_at=self._now(),
            limit=self._policy.max_message_bytes,
            command_id=message.id,
            headers={RECEIVED_AT: submission.received_at.isoformat()},
            attempts=max(1, submission.failures + submission.attempts),
        )
        outcome = _outcome(submission, Status.FAILED, error=OutcomeError(code, storable(reason)))
        return _decided(submission, outcome, dead_letter=letter)


class _Later(msgspec.Struct, frozen=True):
    """A command whose handler failed, the seconds until its next attempt, and those behind it."""

    first: Submission
    seconds: float
    behind: tuple[Submission, ...] = ()


class _KeyTaken(Exception):
    """Another aggregate has a value that this one would have."""

    def __init__(self, name: str) -> None:
        super().__init__(f"another aggregate has this {name}")
        self.name = name


class _Lineage:
    """An aggregate's state as the commands go on: its baseline plus what was accepted so far.

    It is advanced by the events as they will be read back, never by the
    handler's own objects: what can't be loaded again is found before it is
    stored, and state that a handler changed without an event leaves no trace.
    """

    def __init__(
        self, key: AggregateKey, definition: AggregateDefinition, base: Baseline, keys: Keys
    ) -> None:
        self._key = key
        self._definition = definition
        self._keys = keys
        self._held: Claims | None = None
        self._had: Claims = NONE
        self._claims: Claims = NONE
        self.base = base
        self.baseline = base
        self.snapshot: Snapshot | None = None
        self.ended_timers: set[str] = set()

    @classmethod
    def of(cls, prepared: Prepared, keys: Keys) -> _Lineage | None:
        """Begin with what was prepared, if the aggregate's state was needed and could be had."""
        if prepared.definition is None or prepared.baseline is None:
            return None
        return cls(prepared.key, prepared.definition, prepared.baseline, keys)

    @property
    def sequence(self) -> int:
        """The sequence of the last accepted event."""
        return self.baseline.sequence

    def scratch(self) -> Any:
        """Return a copy of the present state for a handler to work on."""
        return self.baseline.thaw(self._definition)

    @property
    def moves(self) -> KeyMoves | None:
        """How the accepted events move unique keys, None where they move none."""
        if self._held is None:
            return None
        return self._keys.moves(self._claims, (self._had | self._claims) - self._held)

    def extend(self, new: Sequence[NewEvent], taken: Claims, ended_timers: Sequence[str]) -> None:
        """Apply accepted events, taking the snapshot that falls due among them.

        Raises, with the lineage unchanged, what decoding, `apply`, `keys` or encoding
        raise, and `_KeyTaken` where the events would claim what is `taken`.
        """
        if new:
            self._apply(new, taken)
        if ended_timers:
            self.ended_timers.update(ended_timers)

    def _apply(self, new: Sequence[NewEvent], taken: Claims) -> None:
        due = self._snapshot_due(len(new))
        live, sequence, snapshot = self.scratch(), self.sequence, self.snapshot
        with_keys = self._definition.has_keys
        if with_keys and self._held is None:
            self._held = self._had = self._claimed_by(live)
        for event in new:
            live.apply(self._definition.events[event.event_type].codec.read_back(event.payload))
            sequence += 1
            if sequence == due:
                snapshot = self._snapshot(live, sequence)
        state = freeze(self._definition, live)
        if with_keys:
            self._hold(self._claimed_by(live), taken)
        base, new_snapshot = self.base, snapshot is not None
        self.snapshot = snapshot
        self.baseline = Baseline(
            state, sequence, base.snapshot + new_snapshot, base.mend_snapshot and not new_snapshot
        )

    def _hold(self, keys: Claims, taken: Claims) -> None:
        """Note what the state claims now; raise `_KeyTaken` where that is new and taken."""
        if keys == self._held:
            return
        new = keys - (self._held or NONE)
        if names := [key.name for key in sorted(new & taken)]:
            raise _KeyTaken(names[0])
        self._held, self._claims = keys, self._claims | new

    def _claimed_by(self, state: AnyAggregate) -> Claims:
        return self._keys.of(self._definition, state)

    def _snapshot_due(self, new_events: int) -> int | None:
        if self.base.mend_snapshot:
            return self.sequence + new_events
        return self._definition.source.snapshot_at(self.sequence, new_events)

    def _snapshot(self, live: AnyAggregate, sequence: int) -> Snapshot:
        """Encode the state; a later snapshot of the same commands takes the place of this one."""
        payload = self._definition.state.encode(live)
        return Snapshot(self._key, sequence, self.base.snapshot + 1, payload)


class _Yielded:
    """What one command yields: events, encoded as they come, and what is to happen next.

    Each intent is kept with the number of events before it.
    """

    def __init__(
        self, definition: AggregateDefinition, message: CommandMessage, max_event_bytes: int
    ) -> None:
        self.definition = definition
        self._metadata = to_json(dict(message.metadata)) if message.metadata else b"{}"
        self._max_event_bytes = max_event_bytes
        self.events: list[NewEvent] = []
        self.intents: list[tuple[int, Send | Later]] = []
        self.cancelled: list[str] = []

    @property
    def ended_timers(self) -> list[str]:
        """The timers that are cancelled or set anew."""
        set_anew = [intent.name for _, intent in self.intents if isinstance(intent, Later)]
        return [*self.cancelled, *set_anew]

    def add(self, yielded: object) -> None:
        """Take an event or an intent; raise `DefinitionError` for anything else."""
        if type(yielded) in self.definition.event_classes:
            self._add_event(yielded)
        elif isinstance(yielded, _CAUSES):
            self.intents.append((len(self.events), yielded))
        elif isinstance(yielded, Cancel):
            self._cancel(yielded.name)
        else:
            self._add_event(yielded)

    def _cancel(self, name: str) -> None:
        """End a timer; one that this very command has set is never written."""
        self.intents = [
            (events_before, intent)
            for events_before, intent in self.intents
            if not (isinstance(intent, Later) and intent.name == name)
        ]
        self.cancelled.append(name)

    def _add_event(self, event: object) -> None:
        """Encode an event; raise `DefinitionError` for a foreign class, `TooLarge` over limits."""
        known = self.definition.event_classes.get(type(event))
        if known is None:
            name = self.definition.cls.__qualname__
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


def _context(submission: Submission) -> CommandContext:
    message = submission.message
    return CommandContext(
        command_id=message.id,
        aggregate_type=message.aggregate_type,
        aggregate_id=message.aggregate_id,
        metadata=message.metadata,
        received_at=submission.received_at,
    )


# --- Outcomes ----------------------------------------------------------------


def _accepted(
    submission: Submission,
    sequence: int,
    events: Sequence[NewEvent],
    causes: tuple[ScheduledCommand, ...] = (),
    cancels: tuple[str, ...] = (),
) -> DecidedCommand:
    first = sequence - len(events) + 1
    numbered = [OutcomeEvent(event.event_type, n) for n, event in enumerate(events, first)]
    outcome = _outcome(submission, Status.ACCEPTED, sequence=sequence, events=tuple(numbered))
    return _decided(submission, outcome, events, causes=causes, cancels=cancels)


def _rejected(
    submission: Submission, code: str, reason: str, sequence: int | None
) -> DecidedCommand:
    error = OutcomeError(code, storable(reason))
    outcome = _outcome(submission, Status.REJECTED, sequence=sequence, error=error)
    return _decided(submission, outcome)


def _outcome(
    submission: Submission,
    status: Status,
    *,
    sequence: int | None = None,
    events: tuple[OutcomeEvent, ...] = (),
    error: OutcomeError | None = None,
) -> Outcome:
    message = submission.message
    return Outcome(
        command_id=message.id,
        status=status,
        aggregate_type=message.aggregate_type,
        aggregate_id=message.aggregate_id,
        sequence=sequence,
        events=events,
        error=error,
    )


def _decided(
    submission: Submission,
    outcome: Outcome,
    events: Sequence[NewEvent] = (),
    *,
    dead_letter: DeadLetter | None = None,
    causes: tuple[ScheduledCommand, ...] = (),
    cancels: tuple[str, ...] = (),
) -> DecidedCommand:
    return DecidedCommand(
        outcome=outcome,
        content_hash=submission.content_hash,
        events=tuple(events),
        dead_letter=dead_letter,
        causes=causes,
        cancels=cancels,
        replaces_failed=submission.retrying,
        attempted=submission.attempts > 0,
        scheduled=submission.scheduled is not None,
    )


# --- Failures ----------------------------------------------------------------


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
