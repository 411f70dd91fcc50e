"""The executor: takes commands, answers each with its outcome.

Batches come from concurrency, not from a timer. Two loops run side by side:
one prepares (looks up known commands, loads aggregates, starts deciding), the
other commits whatever is decided by the time the last commit is done. So a
slow handler delays only its own aggregate, and while one batch is committed
the next is prepared.

Why every command is answered once and rightly, whatever is lost on the way:
a command is answered only after a commit that holds its outcome, or from an
outcome found in the store. Anything that goes wrong before the commit leaves
nothing behind, and the command goes round again from the look-up on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from cqrs_es import errors
from cqrs_es.execution.baselines import BaselineCache
from cqrs_es.execution.decide import Decider
from cqrs_es.execution.lanes import Lanes
from cqrs_es.execution.loading import BaselineLoader
from cqrs_es.execution.outage import Outage
from cqrs_es.execution.policy import MAX_APPEND_BYTES, ExecutionPolicy
from cqrs_es.execution.report import Counts, Reporter
from cqrs_es.execution.work import Answer, Job, Work, id_reused
from cqrs_es.messages import CommandMessage, Outcome, Status
from cqrs_es.ports.store import Chain, Committed, Snapshot, StoredOutcome
from cqrs_es.telemetry.meter import NO_METER, Meter
from cqrs_es.telemetry.tracing import NO_SPAN, NO_TRACING, CommandSpan, Tracing
from cqrs_es.types import partition_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.store import ChainResult, EventStore
    from cqrs_es.registry import Registry


class Executor:
    """Executes commands against one event store; an async context manager.

    `on_failure` is told of every exception that a handler raises unexpectedly.
    `on_commit` is called after each commit that wrote events.
    """

    def __init__(  # noqa: PLR0913 - one argument for each part it works with
        self,
        registry: Registry,
        events: EventStore,
        *,
        partitions: int,
        clock: Clock,
        policy: ExecutionPolicy | None = None,
        on_failure: Callable[[CommandMessage, BaseException], None] | None = None,
        on_commit: Callable[[], None] | None = None,
        meter: Meter = NO_METER,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._tracing = tracing
        self._registry = registry
        self._events = events
        self._partitions = partitions
        self._clock = clock
        self._policy = policy or ExecutionPolicy()
        self._on_commit = on_commit
        self._decider = Decider(self._policy, clock.now, on_failure, meter)
        # Two, since a store that can be read but not written to answers every look-up.
        self._reading = Outage(clock, self._policy.patience, meter)
        self._writing = Outage(clock, self._policy.patience, meter)
        self._lanes = Lanes()
        self._baselines = BaselineCache(self._policy.cached_aggregates)
        self._loader = BaselineLoader(events, self._baselines, self._reading)
        self._decided: list[Work] = []
        self._commands_decided = 0
        self._something_decided = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._in_hand: dict[str, Job] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reporter = Reporter(clock.monotonic, meter)

    async def __aenter__(self) -> Self:
        self._start(self._prepare_forever())
        self._start(self._commit_forever())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop at once; what is not answered yet is cancelled. Call `drain` first to finish it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in list(self._in_hand.values()):
            job.answer.cancel()
            for follower in job.followers:
                follower.answer.cancel()

    # --- For callers ---------------------------------------------------------

    def submit(
        self,
        message: CommandMessage,
        *,
        retrying: bool = False,
        attempts: int = 0,
        condemned: str | None = None,
        span: CommandSpan = NO_SPAN,
    ) -> Answer:
        """Take a command and return its outcome's future; never blocks.

        Commands for one aggregate are decided in the order in which they are
        submitted. The future raises `UnknownEvent` where newer code is needed,
        and `StoreUnavailable` or another `StoreError` where the store refuses;
        the command may then be submitted again.
        """
        job = Job(
            message=message,
            content_hash=message.content_hash(),
            answer=asyncio.get_running_loop().create_future(),
            attempts=attempts,
            retrying=retrying,
            condemned=condemned,
            span=span,
        )
        if span is not NO_SPAN:
            job.answer.add_done_callback(span.end)
        self._take_in(job)
        return job.answer

    @property
    def counts(self) -> Counts:
        """What was done since the executor was started."""
        return self._reporter.counts

    @property
    def in_hand(self) -> int:
        """How many different commands are not answered yet."""
        return len(self._in_hand)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be committed at present; None when all is well."""
        return self._writing.reason or self._reading.reason

    async def drain(self) -> None:
        """Wait until every command taken so far is answered."""
        await self._idle.wait()

    # --- Intake --------------------------------------------------------------

    def _take_in(self, job: Job) -> None:
        leader = self._in_hand.get(job.message.id)
        if leader is not None:
            leader.followers.append(job)
            return
        self._in_hand[job.message.id] = job
        self._idle.clear()
        self._lanes.add(job)

    # --- Preparing: look up, load, begin to decide ---------------------------

    async def _prepare_forever(self) -> None:
        while True:
            await self._lanes.wait_ready()
            await self._room.wait()
            works = [
                Work(jobs[0].message.key, jobs)
                for jobs in self._lanes.take(self._policy.batch_size)
            ]
            try:
                await self._prepare(works)
            except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
                self._give_up(works, exc)

    async def _prepare(self, works: list[Work]) -> None:
        with self._reporter.timing("lookup"):
            await self._answer_known(works)
        unknown = [work for work in works if work.jobs]
        if not unknown:
            self._reporter.report(works)
        for work in unknown:
            work.definition = self._registry.aggregates.get(work.key.type)
        with self._reporter.timing("load"):
            await self._loader.find_baselines(unknown)
        for work in unknown:
            self._start(self._decide(work))

    async def _answer_known(self, works: Sequence[Work]) -> None:
        """Answer the commands that have an outcome; release aggregates with nothing left to do."""
        ids = [job.message.id for work in works for job in work.jobs]
        known = await self._reading.wait_out(lambda: self._events.find_outcomes(ids))
        if not known:
            return
        for work in works:
            work.jobs = [job for job in work.jobs if not self._answer_if_known(job, known)]
            if not work.jobs:
                self._lanes.release(work.key)

    def _answer_if_known(self, job: Job, known: Mapping[str, StoredOutcome]) -> bool:
        stored = known.get(job.message.id)
        if stored is None or _to_be_replaced(job, stored):
            return False
        self._answer(job, _known_outcome(job, stored))
        return True

    async def _decide(self, work: Work) -> None:
        try:
            if isinstance(work.load_failure, errors.UnknownEvent):
                raise work.load_failure  # noqa: TRY301 - it takes the same way out as any other
            with self._reporter.timing("decide"):
                await self._decider.decide(work)
        except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
            self._give_up([work], exc)
            return
        self._decided.append(work)
        self._commands_decided += len(work.decided)
        self._something_decided.set()
        if self._commands_decided >= self._policy.batch_size:
            self._room.clear()

    # --- Committing ----------------------------------------------------------

    async def _commit_forever(self) -> None:
        while True:
            await self._something_decided.wait()
            works = self._take_decided()
            for work in works:
                if not work.decided:
                    self._release(work)
            await self._commit([work for work in works if work.decided])

    def _take_decided(self) -> list[Work]:
        """Take what is decided, at least one work, within the bounds of one append."""
        commands = size = taken = 0
        for work in self._decided:
            commands += len(work.decided)
            size += work.size
            if taken and (commands > self._policy.batch_size or size > MAX_APPEND_BYTES):
                break
            taken += 1
        works, self._decided = self._decided[:taken], self._decided[taken:]
        self._commands_decided -= sum(len(work.decided) for work in works)
        if not self._decided:
            self._something_decided.clear()
        if self._commands_decided < self._policy.batch_size:
            self._room.set()
        return works

    async def _commit(self, works: Sequence[Work]) -> None:
        """Append works, all of which are settled one way or another when this returns."""
        if not works:
            return
        try:
            results = await self._append(works)
        except (errors.TooLarge, errors.UndecodableRow) as exc:
            await self._commit_in_parts(works, exc)
        except errors.StoreUnavailable as exc:
            await self._go_round_again(works, exc)
        except Exception as exc:  # noqa: BLE001 - the callers are told, each by its future
            self._give_up(works, exc)
        else:
            self._conclude(works, results)

    def _conclude(self, works: Sequence[Work], results: Sequence[ChainResult]) -> None:
        self._writing.over()
        for work, result in zip(works, results, strict=True):
            self._settle(work, result)
        self._reporter.committed(works)
        if self._on_commit is not None:
            self._on_commit()

    async def _append(self, works: Sequence[Work]) -> list[ChainResult]:
        chains = [_chain(work, self._partitions) for work in works]
        with self._reporter.timing("append"), self._tracing.appending(_spans(works)):
            return await self._events.append(chains, self._clock.now())

    async def _commit_in_parts(self, works: Sequence[Work], exc: errors.CqrsError) -> None:
        """Find the work, then the command, that the store can't take; the others commit."""
        if len(works) > 1:
            for work in works:
                await self._commit([work])
            return
        (work,) = works
        if len(work.decided) == 1:
            work.jobs[0].condemned = exc.message
        for job in work.jobs:
            job.alone = True
        self._baselines.drop(work.key)
        self._lanes.release(work.key, work.jobs)

    def _settle(self, work: Work, result: ChainResult) -> None:
        if not isinstance(result, Committed):
            self._decide_again(work)
            return
        if work.result is not None:
            self._baselines.put(work.key, work.result)
        for job, outcome in zip(work.jobs, result.outcomes, strict=False):
            self._answer(job, outcome)
        self._release(work)

    def _decide_again(self, work: Work) -> None:
        """Send a chain that met a conflict round again, on what the store holds now."""
        self._reporter.conflict()
        for job in work.jobs:
            job.span.conflicted()
        self._baselines.drop(work.key)
        self._lanes.release(work.key, work.jobs)

    def _release(self, work: Work) -> None:
        """Let the aggregate's next commands come, after the wait that a retry asks for."""
        if work.held:
            self._start(self._release_later(work))
        else:
            self._lanes.release(work.key)

    async def _release_later(self, work: Work) -> None:
        await self._clock.sleep(work.hold_seconds)
        self._lanes.release(work.key, work.held)

    async def _go_round_again(self, works: Sequence[Work], exc: errors.StoreUnavailable) -> None:
        """After an append whose commit is unknown: look the outcomes up, never write blindly."""
        for work in works:
            for job in work.jobs:
                job.uncertain = True
            self._baselines.drop(work.key)
        try:
            await self._writing.pause(exc)
        except errors.StoreUnavailable as final:
            self._give_up(works, final)
            return
        for work in works:
            self._lanes.release(work.key, work.jobs)

    # --- Answering -----------------------------------------------------------

    def _answer(self, job: Job, outcome: Outcome) -> None:
        """Give a job its outcome, and those that follow it theirs."""
        self._forget(job)
        self._resolve(job, outcome)
        reused = outcome.error is not None and outcome.error.code == "id_reused"
        for follower in job.followers:
            if reused:
                self._take_in(follower)
            elif follower.content_hash == job.content_hash:
                self._resolve(follower, replace(outcome, duplicate=True))
            else:
                self._resolve(follower, id_reused(follower.message))

    def _resolve(self, job: Job, outcome: Outcome) -> None:
        self._reporter.answered(job.message, outcome)
        if not job.answer.done():
            job.answer.set_result(outcome)

    def _give_up(self, works: Iterable[Work], exc: Exception) -> None:
        """Hand an error that is not the commands' own to whoever submitted them."""
        for work in works:
            if not work.jobs:  # all were answered from the store: its aggregate is released
                continue
            for job in work.jobs:
                if self._in_hand.get(job.message.id) is job:
                    self._forget(job)
                    for asker in [job, *job.followers]:
                        if not asker.answer.done():
                            asker.answer.set_exception(exc)
            self._baselines.drop(work.key)
            self._lanes.release(work.key)

    def _forget(self, job: Job) -> None:
        self._in_hand.pop(job.message.id, None)
        if not self._in_hand:
            self._idle.set()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _to_be_replaced(job: Job, stored: StoredOutcome) -> bool:
    return (
        job.retrying
        and stored.outcome.status is Status.FAILED
        and stored.content_hash == job.content_hash
    )


def _known_outcome(job: Job, stored: StoredOutcome) -> Outcome:
    """Answer a command that has an outcome: it is a duplicate, unless it is our own late news."""
    if stored.content_hash != job.content_hash:
        return id_reused(job.message)
    return replace(stored.outcome, duplicate=not job.uncertain)


def _spans(works: Sequence[Work]) -> Iterator[CommandSpan]:
    return (job.span for work in works for job in work.jobs[: len(work.decided)])


def _chain(work: Work, partitions: int) -> Chain:
    return Chain(
        key=work.key,
        partition=partition_of(work.key.type, work.key.id, partitions),
        base_sequence=None if work.baseline is None else work.baseline.sequence,
        commands=tuple(work.decided),
        snapshot=_snapshot(work),
    )


def _snapshot(work: Work) -> Snapshot | None:
    if work.new_snapshot is None or work.result is None:
        return None
    sequence, state = work.new_snapshot
    return Snapshot(work.key, sequence, work.result.snapshot, state)
