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
from typing import TYPE_CHECKING, Final, Self

import structlog

from cqrs_es import errors
from cqrs_es.execution.answers import Answers, known_outcome
from cqrs_es.execution.baselines import BaselineCache
from cqrs_es.execution.decide import Decider
from cqrs_es.execution.decided import Decided
from cqrs_es.execution.hooks import NO_HOOKS, Hooks
from cqrs_es.execution.lanes import Lanes
from cqrs_es.execution.loading import BaselineLoader
from cqrs_es.execution.outage import Outage
from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.execution.report import Counts, Reporter
from cqrs_es.execution.work import Answer, Job, Work
from cqrs_es.ports.store import Committed
from cqrs_es.telemetry.tracing import NO_SPAN, CommandSpan

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.store import ChainResult, EventStore, StoredOutcome
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.execution")

CANCELLATION_SECONDS: Final = 2.0


class Executor:
    """Executes commands against one event store; an async context manager."""

    def __init__(
        self,
        registry: Registry,
        events: EventStore,
        *,
        partitions: int,
        clock: Clock,
        policy: ExecutionPolicy | None = None,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self._registry = registry
        self._events = events
        self._partitions = partitions
        self._clock = clock
        self._policy = policy or ExecutionPolicy()
        self._hooks = hooks
        self._decider = Decider(self._policy, clock.now, hooks)
        # Two, since a store that can be read but not written to answers every look-up.
        self._reading = Outage(clock, self._policy.patience, hooks.meter)
        self._writing = Outage(clock, self._policy.patience, hooks.meter)
        self._lanes = Lanes()
        self._baselines = BaselineCache(self._policy.cached_aggregates)
        self._loader = BaselineLoader(events, self._baselines, self._reading)
        self._decided = Decided(self._policy.batch_size)
        self._reporter = Reporter(clock.monotonic, hooks.meter)
        self._answers = Answers(self._reporter)
        self._tasks: set[asyncio.Task[None]] = set()

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
        """Stop at once; what is not answered yet is cancelled. Call `drain` first to finish it.

        A handler that ignores its cancellation is left behind: nothing comes of it any more.
        """
        self._decider.ending = True
        for task in self._tasks:
            task.cancel()
        _, left = await asyncio.wait(self._tasks, timeout=CANCELLATION_SECONDS)
        if left:
            log.error("handlers ignore their cancellation", handlers=len(left))
        self._answers.cancel_all()

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
        return len(self._answers)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be committed at present; None when all is well."""
        return self._writing.reason or self._reading.reason

    async def drain(self) -> None:
        """Wait until every command taken so far is answered."""
        await self._answers.wait_idle()

    # --- Intake --------------------------------------------------------------

    def _take_in(self, job: Job) -> None:
        if self._answers.admit(job):
            self._lanes.add(job)

    # --- Preparing: look up, load, begin to decide ---------------------------

    async def _prepare_forever(self) -> None:
        while True:
            await self._lanes.wait_ready()
            await self._decided.wait_room()
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
        outcome = known_outcome(job, known.get(job.message.id))
        if outcome is None:
            return False
        self._answer(job, outcome)
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
        self._decided.put(work)

    # --- Committing ----------------------------------------------------------

    async def _commit_forever(self) -> None:
        while True:
            works = await self._decided.take()
            for work in works:
                if not work.decided:
                    self._release(work)
            await self._commit([work for work in works if work.decided])

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
        if self._hooks.on_commit is not None:
            self._hooks.on_commit()

    async def _append(self, works: Sequence[Work]) -> list[ChainResult]:
        chains = [work.chain(self._partitions) for work in works]
        with self._reporter.timing("append"), self._hooks.tracing.appending(_spans(works)):
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
        for follower in self._answers.give(job, outcome):
            self._take_in(follower)

    def _give_up(self, works: Iterable[Work], exc: Exception) -> None:
        """Hand an error that is not the commands' own to whoever submitted them."""
        for work in works:
            if not work.jobs:  # all were answered from the store: its aggregate is released
                continue
            for job in work.jobs:
                self._answers.fail(job, exc)
            self._baselines.drop(work.key)
            self._lanes.release(work.key)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _spans(works: Sequence[Work]) -> Iterator[CommandSpan]:
    return (job.span for work in works for job in work.jobs[: len(work.decided)])
