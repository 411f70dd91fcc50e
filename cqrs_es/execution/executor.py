"""The executor: takes commands, answers each with its outcome.

Batches come from concurrency, not from a timer. Two things go on side by side:
one task prepares (looks up known commands, loads aggregates, starts deciding),
another appends whatever is decided by the time the last append is done. So a
slow handler delays only its own aggregate, and while one batch is appended
the next is prepared. Neither task waits for work: it is started when there is
some, and a command that comes alone goes the whole way in one task. `Inbox`
says how a command moves, `stages` what it is meanwhile.

Why every command is answered once and rightly, whatever is lost on the way:
a command is answered only after a commit that holds its outcome, or from an
outcome found in the store. Anything that goes wrong before the commit leaves
nothing behind, and the command goes round again from the look-up on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from msgspec.structs import replace

from cqrs_es import errors, wire
from cqrs_es.execution.baselines import Baseline, BaselineCache, BaselineLoader
from cqrs_es.execution.causes import Causes
from cqrs_es.execution.decide import Decider
from cqrs_es.execution.inbox import Inbox, known_outcome
from cqrs_es.execution.keys import Keys
from cqrs_es.execution.policy import NO_HOOKS, ExecutionPolicy, Hooks
from cqrs_es.execution.report import Counts, Reporter
from cqrs_es.execution.retry import Outage
from cqrs_es.execution.stages import Answer, Decided, Prepared, Submission
from cqrs_es.messages import Status
from cqrs_es.ports.store import IMMEDIATELY, Committed
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.tracing import NO_SPAN, CommandSpan
from cqrs_es.types import time_of

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.execution.baselines import Found
    from cqrs_es.messages import CommandMessage
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.store import ChainResult, EventStore, ScheduledCommand, StoredOutcome
    from cqrs_es.registry import Registry
    from cqrs_es.types import AggregateKey

log = get_logger("cqrs_es.execution")

CANCELLATION_SECONDS: Final = 2.0

_Decidable: TypeAlias = "tuple[AggregateKey, tuple[Submission, ...], Found | None]"
"""Commands for one aggregate, and what was found of it."""


class Executor:
    """Executes commands against one event store; an async context manager."""

    def __init__(
        self,
        registry: Registry,
        events: EventStore,
        *,
        partitions: int,
        clock: Clock,
        secret: bytes = b"",
        policy: ExecutionPolicy | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self._registry = registry
        self._events = events
        self._clock = clock
        self._hooks = hooks
        policy = policy or ExecutionPolicy()
        # Two, since a store that can be read but not written to answers every look-up.
        self._reading = Outage(clock, policy.patience, hooks.meter)
        self._writing = Outage(clock, policy.patience, hooks.meter)
        self._baselines = BaselineCache(policy.cache_bytes)
        self._loader = BaselineLoader(events, self._baselines, self._reading)
        self._reporter = Reporter(clock.monotonic, hooks.meter)
        self._inbox = Inbox(policy.batch_size, self._reporter, self._wake)
        self.causes = Causes(registry, partitions, secret, policy.max_message_bytes, clock.now)
        self.keys = Keys(secret, partitions)
        self._decider = Decider(
            policy, clock.now, partitions, self.causes, self.keys, self._inbox.begin, hooks
        )
        self._tasks: set[asyncio.Task[None]] = set()
        # Whether a task does so, or is started to.
        self._preparing = self._appending = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop at once; what is not answered yet is cancelled. Call `drain` first to finish it.

        A handler that ignores its cancellation is not waited for; its result is discarded. An
        append that has been sent can't be cancelled: it may commit.
        """
        self._decider.ending = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=CANCELLATION_SECONDS)
            if left:
                appending = self._appending
                log.error(
                    "tasks go on after their cancellation", tasks=len(left), appending=appending
                )
        self._inbox.cancel_all()

    # --- For callers ---------------------------------------------------------

    def submit(  # noqa: PLR0913 - one argument for each thing that is known of a command
        self,
        message: CommandMessage,
        *,
        retrying: bool = False,
        attempts: int = 0,
        condemned: str | None = None,
        scheduled: ScheduledCommand | None = None,
        untrusted: bool = False,
        dropped: bool = False,
        received_at: datetime | None = None,
        fresh: bool = False,
        span: CommandSpan = NO_SPAN,
    ) -> Answer:
        """Take a command and return its outcome's future; never blocks.

        Commands for one aggregate are decided in the order in which they are
        submitted. The future raises `NeedsNewerCode` where newer code is needed,
        `Withdrawn` after `withdraw`, and `StoreUnavailable` or another `StoreError`
        where the store refuses; the command may then be submitted again. That of a
        `scheduled` command raises `ScheduleGone` where its row is there no more.
        `received_at` is the broker's word for it, or what was noted of it before.
        """
        submission = Submission(
            message=message,
            content_hash=message.content_hash(),
            answer=asyncio.get_running_loop().create_future(),
            received_at=received_at or _received_at(message, scheduled) or self._clock.now(),
            attempts=attempts,
            retrying=retrying,
            condemned=condemned,
            scheduled=scheduled,
            untrusted=untrusted,
            dropped=dropped,
            fresh=fresh,
            span=span,
        )
        if span is not NO_SPAN:
            submission.answer.add_done_callback(span.end)
        self._inbox.add(submission)
        return submission.answer

    def withdraw(self, answers: Collection[Answer]) -> None:
        """Give commands up that are not begun: their futures raise `Withdrawn`.

        One whose handler runs is decided and appended; its future gets the outcome.
        """
        self._inbox.withdraw(answers)

    @property
    def counts(self) -> Counts:
        """What was done since the executor was started."""
        return self._reporter.counts

    @property
    def pending(self) -> int:
        """How many different commands are not answered yet."""
        return len(self._inbox)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be committed at present; None when all is well."""
        return self._writing.reason or self._reading.reason

    async def drain(self) -> None:
        """Wait until every command taken so far is answered."""
        await self._inbox.wait_idle()

    # --- Preparing: look up, load, begin to decide ---------------------------

    def _wake(self) -> None:
        """Have what is ready prepared, unless somebody is at it."""
        if not self._preparing and not self._decider.ending:
            self._preparing = True
            self._start(self._prepare_ready())

    async def _prepare_ready(self) -> None:
        """Prepare until nothing is ready; what comes alone is decided and appended here, too."""
        alone: _Decidable | None = None
        try:
            while alone is None and (taken := self._inbox.take()):
                at_hand = self._at_hand(taken)
                decidable = await self._prepared(taken) if at_hand is None else [at_hand]
                if len(taken) == len(decidable) == 1:
                    alone = decidable[0]
                else:
                    for each in decidable:
                        self._start(self._decide_beside(each))
        finally:
            self._preparing = False
        if alone is not None:
            if self._inbox.is_ready:
                self._wake()
            await self._decide_alone(alone)

    def _at_hand(self, taken: Sequence[tuple[Submission, ...]]) -> _Decidable | None:
        """Return a command that came alone, with its aggregate, where the store need not be asked.

        Preparing it as a batch of one takes seven times as long, a tenth of a command in memory.
        """
        submissions = taken[0]
        if len(taken) != 1 or len(submissions) != 1:
            return None
        (alone,) = submissions
        key = alone.message.key
        definition = self._definition(key)
        if not alone.fresh or alone.again or definition is None or not self._inbox.holds(alone):
            return None
        cached = self._baselines.get(key) if _state_needed(submissions, definition) else None
        return None if cached is None else (key, submissions, cached)

    async def _prepared(self, taken: Sequence[tuple[Submission, ...]]) -> list[_Decidable]:
        """Return what is to be decided, with what was found of each aggregate."""
        try:
            return await self._prepare(taken)
        except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
            self._give_up(taken, exc)
            return []

    async def _prepare(self, taken: Sequence[tuple[Submission, ...]]) -> list[_Decidable]:
        with self._reporter.timing("lookup"):
            unknown = await self._answer_known(taken)
        if not unknown:
            self._reporter.report(taken)
            return []
        wanted = {
            key: definition
            for key, submissions in unknown.items()
            if (definition := self._definition(key)) and _state_needed(submissions, definition)
        }
        with self._reporter.timing("load"):
            found = await self._loader.find(wanted)
        return [(key, submissions, found.get(key)) for key, submissions in unknown.items()]

    async def _answer_known(
        self, taken: Sequence[tuple[Submission, ...]]
    ) -> dict[AggregateKey, tuple[Submission, ...]]:
        """Answer the commands that have an outcome; return the others by aggregate.

        Aggregates with nothing left to do are released.
        """
        ids = [
            each.message.id
            for submissions in taken
            for each in submissions
            if each.again or not each.fresh
        ]
        known: Mapping[str, StoredOutcome] = {}
        if ids:
            known = await self._reading.wait_out(lambda: self._events.find_outcomes(ids))
            await self._fail_cancelled(taken, known)
        unknown: dict[AggregateKey, tuple[Submission, ...]] = {}
        for submissions in taken:
            key = submissions[0].message.key
            left = self._unanswered(submissions, known)
            if left:
                unknown[key] = left
            else:
                self._inbox.release(key)
        return unknown

    async def _fail_cancelled(
        self, taken: Sequence[tuple[Submission, ...]], known: Mapping[str, StoredOutcome]
    ) -> None:
        """Give up scheduled commands that were cancelled; rows of those decided go."""
        scheduled = {
            each.message.id: each
            for submissions in taken
            for each in submissions
            if each.scheduled is not None
        }
        if not scheduled:
            return
        if decided := scheduled.keys() & known.keys():
            await self._reading.wait_out(lambda: self._events.unschedule(decided))
        # The append finds out of one that was read a moment ago.
        doubtful = {id_ for id_, each in scheduled.items() if each.again} - decided
        if not doubtful:
            return
        rows = await self._reading.wait_out(lambda: self._events.find_scheduled(doubtful))
        for command_id in doubtful - rows.keys():
            self._inbox.fail(scheduled[command_id], errors.ScheduleGone())

    def _unanswered(
        self, submissions: Iterable[Submission], known: Mapping[str, StoredOutcome]
    ) -> tuple[Submission, ...]:
        left: list[Submission] = []
        for each in submissions:
            if not self._inbox.holds(each):
                continue
            outcome = known_outcome(each, known.get(each.message.id))
            if outcome is None:
                left.append(each)
            else:
                self._inbox.answer(each, outcome)
        return tuple(left)

    def _definition(self, key: AggregateKey) -> AggregateDefinition | None:
        return self._registry.aggregates.get(key.type)

    async def _decide_beside(self, decidable: _Decidable) -> None:
        """Decide in a task of its own; all that is decided in one turn of the loop is appended."""
        if await self._decide(decidable):
            self._wake_appending()

    async def _decide_alone(self, decidable: _Decidable) -> None:
        """Decide and append in this task, unless the handler may have had it cancelled."""
        failures, task = self._decider.failures, asyncio.current_task()
        if not await self._decide(decidable):
            return
        if failures != self._decider.failures or (task is not None and task.cancelling()):
            self._wake_appending()
        elif not self._appending:
            self._appending = True
            await self._append_decided()

    async def _decide(self, decidable: _Decidable) -> bool:
        key, submissions, found = decidable
        try:
            prepared = await self._with_baseline(key, submissions, found)
            with self._reporter.timing("decide"):
                decided = await self._decider.decide(prepared)
        except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
            self._give_up([submissions], exc)
            return False
        self._inbox.put(decided)
        return True

    async def _with_baseline(
        self, key: AggregateKey, submissions: tuple[Submission, ...], found: Found | None
    ) -> Prepared:
        """Complete what was found of the aggregate; a failure of its own is kept for the outcome.

        Raises `UnknownEvent` and `StoreUnavailable`: the commands are not to blame.
        """
        definition = self._definition(key)
        if definition is None or found is None:
            return Prepared(key, submissions, definition)
        try:
            baseline = (
                found
                if isinstance(found, Baseline)
                else await self._loader.baseline(definition, key, found)
            )
            _check_whole(key, baseline, submissions)
        except (errors.StoreUnavailable, errors.NeedsNewerCode, KeyboardInterrupt):
            raise
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001 - an apply can raise anything
            return Prepared(key, submissions, definition, failure=exc)
        return Prepared(key, submissions, definition, baseline)

    # --- Appending -----------------------------------------------------------

    def _wake_appending(self) -> None:
        """Have what is decided appended, unless somebody is at it."""
        if not self._appending and not self._decider.ending:
            self._appending = True
            self._start(self._append_decided())

    async def _append_decided(self) -> None:
        """Append what is decided, until nothing is."""
        try:
            while taken := self._inbox.take_decided():
                for decided in taken:
                    if not decided.submissions:
                        self._release(decided)
                await self._commit([decided for decided in taken if decided.submissions])
        finally:
            self._appending = False

    async def _commit(self, batch: Sequence[Decided]) -> None:
        """Append what is decided, all of which is settled one way or another afterwards."""
        if not batch:
            return
        try:
            results = await self._append(batch)
        except (errors.TooLarge, errors.UndecodableRow) as exc:
            await self._commit_in_parts(batch, exc)
        except errors.StoreUnavailable as exc:
            await self._go_round_again(batch, exc)
        except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
            self._give_up((_all_of(decided) for decided in batch), exc)
        else:
            self._conclude(batch, results)

    async def _append(self, batch: Sequence[Decided]) -> list[ChainResult]:
        chains = [decided.chain for decided in batch]
        tracing = self._hooks.tracing.appending(each.span for d in batch for each in d.submissions)
        with self._reporter.timing("append"), tracing:
            return await self._events.append(chains, self._clock.now())

    def _conclude(self, batch: Sequence[Decided], results: Sequence[ChainResult]) -> None:
        self._writing.over()
        for decided, result in zip(batch, results, strict=True):
            self._settle(decided, result)
        self._reporter.committed([decided.submissions for decided in batch])
        if self._hooks.on_commit is not None:
            self._hooks.on_commit()
        if self._hooks.on_scheduled is not None and (partitions := _scheduled_in(batch)):
            self._hooks.on_scheduled(partitions)

    async def _commit_in_parts(self, batch: Sequence[Decided], exc: errors.CqrsError) -> None:
        """Find the aggregate, then the command, that the store can't take; the others commit."""
        if len(batch) > 1:
            for decided in batch:
                await self._commit([decided])
            return
        (decided,) = batch
        again = [replace(each, alone=True) for each in _all_of(decided)]
        if len(decided.submissions) == 1:
            again[0] = replace(again[0], condemned=exc.message)
        self._again(decided.key, again)

    def _settle(self, decided: Decided, result: ChainResult) -> None:
        if not isinstance(result, Committed):
            self._reporter.conflict(decided.submissions[0])
            for each in decided.submissions:
                each.span.conflicted()
            taken, seen = result.taken, result.actual or 0
            # What was taken before is kept: the next refusal could else undo the last, for ever.
            again = [
                replace(
                    each,
                    taken=(each.taken | taken) if taken else taken,
                    seen=seen,
                    conflicts=each.conflicts + 1,
                )
                for each in decided.submissions
            ]
            self._again(decided.key, [*again, *decided.waiting])
            return
        if decided.baseline is not None:
            self._baselines.put(decided.key, decided.baseline)
        for each, outcome in zip(decided.submissions, result.outcomes, strict=True):
            if outcome.status is Status.REJECTED and self.causes.signed(
                each.message.id, each.message.metadata
            ):
                self._reporter.refused(each.message, outcome)
            self._inbox.answer(each, outcome)
        self._release(decided)

    def _again(self, key: AggregateKey, submissions: Sequence[Submission]) -> None:
        """Decide commands again, on what the store holds now."""
        self._baselines.drop(key)
        self._inbox.release(key, submissions)

    def _release(self, decided: Decided) -> None:
        """Let the aggregate's next commands come, after the wait that a retry asks for."""
        if decided.waiting:
            self._start(self._release_later(decided))
        else:
            self._inbox.release(decided.key)

    async def _release_later(self, decided: Decided) -> None:
        await self._clock.sleep(decided.wait_seconds)
        self._inbox.release(decided.key, decided.waiting)

    async def _go_round_again(self, batch: Sequence[Decided], exc: errors.StoreUnavailable) -> None:
        """After an append whose commit is unknown: look the outcomes up, never write blindly."""
        for decided in batch:
            self._baselines.drop(decided.key)
        try:
            await self._writing.pause(exc)
        except errors.StoreUnavailable as final:
            self._give_up((_all_of(decided) for decided in batch), final)
            return
        for decided in batch:
            again = [replace(each, uncertain=True) for each in decided.submissions]
            self._again(decided.key, [*again, *decided.waiting])

    def _give_up(self, lines: Iterable[tuple[Submission, ...]], exc: Exception) -> None:
        """Hand an error that is not the commands' own to whoever submitted them."""
        for submissions in lines:
            for each in submissions:
                self._inbox.fail(each, exc)
            self._again(submissions[0].message.key, ())

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _received_at(message: CommandMessage, row: ScheduledCommand | None) -> datetime | None:
    """Return what a command itself says of when it was received; see `CommandContext`."""
    if row is not None and row.moment != IMMEDIATELY:
        return row.moment
    return wire.moment_or_none(message.sent_at) or time_of(message.id)


def _check_whole(key: AggregateKey, baseline: Baseline, submissions: Iterable[Submission]) -> None:
    """Raise `BrokenLog` where the store has later events than those that can be read.

    Where a hole begins, reading a stream ends; what is decided there would conflict for ever.
    """
    for each in submissions:
        if baseline.sequence < each.seen:
            message = f"{key}: event {baseline.sequence + 1} is missing before {each.seen}"
            raise errors.BrokenLog(message)


def _state_needed(submissions: Iterable[Submission], definition: AggregateDefinition) -> bool:
    for each in submissions:  # not `any`, which makes a generator: it is asked for each command
        if each.condemned is None and definition.takes(each.message.type):
            return True
    return False


def _all_of(decided: Decided) -> tuple[Submission, ...]:
    return (*decided.submissions, *decided.waiting)


def _scheduled_in(batch: Sequence[Decided]) -> set[int]:
    """Return the partitions in which commands were scheduled."""
    return {
        caused.partition
        for decided in batch
        for command in decided.chain.commands
        for caused in command.causes
    }
