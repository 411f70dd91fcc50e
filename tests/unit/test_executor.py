"""The executor: order, isolation, conflicts, outages, retries, cancellation."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog

from cqrs_es import errors
from cqrs_es.aggregate import AggregateSourced
from cqrs_es.codec import to_json
from cqrs_es.execution.executor import Executor
from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.messages import CommandMessage, Outcome, Status, spec_of
from cqrs_es.ports.store import IMMEDIATELY, PAGE_LIMIT, LoadRequest, ScheduledCommand
from cqrs_es.stores import storage_for
from cqrs_es.testing import FakeClock
from cqrs_es.types import AggregateKey, new_command_id
from tests.faulty import FaultyStorage
from tests.samples import (
    Add,
    AddAfterCall,
    AddEach,
    AddThenCrash,
    AddUpTo,
    Crash,
    Refuse,
    Services,
    counting_app,
)
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
    from datetime import datetime

    from cqrs_es.aggregate import SourceOfTruth
    from cqrs_es.execution.stages import Answer
    from cqrs_es.ports.store import Chain, ChainResult, StoredOutcome

PARTITIONS = 1
ADDS = [Add(n) for n in range(2, 12)]


@dataclass
class Rig:
    """An executor on a store in memory that fails on request, and a clock that stands still."""

    storage: FaultyStorage
    executor: Executor
    clock: FakeClock
    services: Services

    def submit(
        self, id_: str, command: object, *, command_id: str | None = None, **options: Any
    ) -> Answer:
        return self.executor.submit(message(id_, command, command_id), **options)

    async def total(self, id_: str) -> int:
        return sum(await self.numbers(id_))

    async def numbers(self, id_: str) -> list[int]:
        """Read what was added to a counter, in the order of its events."""
        key = AggregateKey("counter", id_)
        (loaded,) = await self.storage.events.load([LoadRequest(key)])
        return [orjson.loads(event.payload)["n"] for event in loaded.events]


def message(id_: str, command: object, command_id: str | None = None) -> CommandMessage:
    return CommandMessage(
        command_id or new_command_id(),
        spec_of(type(command)).name,
        "counter",
        id_,
        orjson.loads(to_json(command)),
        body=to_json(command),
    )


@asynccontextmanager
async def executing(
    storage: FaultyStorage | None = None,
    policy: ExecutionPolicy | None = None,
    source: SourceOfTruth | None = None,
) -> AsyncGenerator[Rig]:
    """Run an executor, beside others where a storage is given."""
    storage = storage or FaultyStorage(storage_for("memory://"))
    await storage.initialise(PARTITIONS)
    clock, services = FakeClock(), Services()
    executor = Executor(
        counting_app(services, source=source).registry,
        storage.events,
        partitions=PARTITIONS,
        clock=clock,
        policy=policy,
    )
    async with executor:
        yield Rig(storage, executor, clock, services)


@pytest.fixture(autouse=True)
def logged() -> Iterator[None]:
    """Keep tracebacks from being drawn: that takes longer than the tests."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with executing() as rig:
        yield rig


async def answered(answers: Sequence[Answer]) -> list[Outcome]:
    async with asyncio.timeout(10):
        return list(await asyncio.gather(*answers))


def statuses(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.status.value for outcome in outcomes]


class Gate:
    """A hook of a service that waits until the test lets it go."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.calls = 0

    async def __call__(self) -> None:
        self.calls += 1
        self.entered.set()
        await self.open.wait()


class Failing:
    """A hook of a service that fails so many times, then works."""

    def __init__(self, times: int, error: BaseException | None = None) -> None:
        self.calls = 0
        self._times = times
        self._error = error or Crash("not now")

    async def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error


# --- Order and batches -------------------------------------------------------


async def test_commands_of_one_aggregate_are_decided_in_order(rig: Rig) -> None:
    """The events are in the order of submission, however the commands were batched."""
    answers: list[Answer] = []
    for n in range(300):
        answers.append(rig.submit("A", Add(n)))
        if n % 7 == 0:
            await asyncio.sleep(0)
    outcomes = await answered(answers)
    assert await rig.numbers("A") == list(range(300))
    assert [outcome.sequence for outcome in outcomes] == list(range(1, 301))


async def test_a_batch_comes_from_concurrency() -> None:
    """What is submitted at once is committed at once, up to the size of a batch."""
    async with executing(policy=ExecutionPolicy(batch_size=50)) as rig:
        await answered([rig.submit(f"A{n % 20}", Add(n)) for n in range(100)])
        assert rig.executor.counts.batches == 2
        assert rig.executor.counts.accepted == 100


async def test_a_slow_handler_delays_only_its_own_aggregate(rig: Rig) -> None:
    """Others are decided and committed while it waits; its own later commands wait with it."""
    gate = rig.services.hooks["slow"] = Gate()
    slow = rig.submit("slow", AddAfterCall("slow", 1))
    behind = rig.submit("slow", Add(2))
    await gate.entered.wait()
    assert statuses(await answered([rig.submit(f"A{n}", Add(n)) for n in range(20)])) == (
        ["accepted"] * 20
    )
    assert not slow.done()
    assert not behind.done()
    gate.open.set()
    await answered([slow, behind])
    assert await rig.numbers("slow") == [1, 2]


async def test_what_comes_while_one_is_looked_up_does_not_wait_for_its_handler(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that came alone is decided where it was prepared; who came meanwhile goes on."""
    look, looking, go_on = rig.storage.events.find_outcomes, asyncio.Event(), asyncio.Event()

    async def find_outcomes(ids: Collection[str]) -> dict[str, StoredOutcome]:
        looking.set()
        await go_on.wait()
        return await look(ids)

    monkeypatch.setattr(rig.storage.events, "find_outcomes", find_outcomes)
    gate = rig.services.hooks["slow"] = Gate()
    slow = rig.submit("A", AddAfterCall("slow", 1))
    await looking.wait()
    quick = rig.submit("B", Add(1))
    go_on.set()
    assert (await answered([quick]))[0].accepted
    assert not slow.done()
    gate.open.set()
    assert (await answered([slow]))[0].accepted


async def test_a_slow_handler_beside_others_in_one_batch(rig: Rig) -> None:
    """The others of the batch that it was taken with do not wait for it."""
    gate = rig.services.hooks["slow"] = Gate()
    slow = rig.submit("slow", AddAfterCall("slow", 1))
    others = [rig.submit(f"A{n}", Add(n)) for n in range(20)]
    await answered(others)
    assert not slow.done()
    gate.open.set()
    await answered([slow])


async def test_d7_a_command_sees_nothing_of_one_that_failed_before_it() -> None:
    """A handler that yields and then raises leaves no trace for the next in its batch."""
    async with executing(policy=ExecutionPolicy(retry_delays=())) as rig:
        crashed, good = await answered(
            [rig.submit("A", AddThenCrash(100)), rig.submit("A", AddUpTo(5, limit=10))]
        )
    assert (crashed.status, good.status) == (Status.FAILED, Status.ACCEPTED)
    assert await rig.numbers("A") == [5]


# --- One id, one outcome -----------------------------------------------------


async def test_b18_one_id_submitted_a_hundred_times_at_once(rig: Rig) -> None:
    """One outcome, one set of events, 99 marked duplicate."""
    command_id = new_command_id()
    answers = [rig.submit("A", AddEach([1, 2]), command_id=command_id) for _ in range(100)]
    outcomes = await answered(answers)
    assert sorted(outcome.duplicate for outcome in outcomes) == [False] + [True] * 99
    assert {outcome.events for outcome in outcomes} == {outcomes[0].events}
    assert await rig.numbers("A") == [1, 2]


async def test_b18_one_id_at_two_executors() -> None:
    """The append of one conflicts, and it then answers from the store."""
    storage = FaultyStorage(storage_for("memory://"))
    async with executing(storage) as one, executing(storage) as other:
        command_id = new_command_id()
        outcomes = await answered(
            [
                rig.submit("A", Add(1), command_id=command_id)
                for _ in range(50)
                for rig in (one, other)
            ]
        )
        assert sorted(outcome.duplicate for outcome in outcomes) == [False] + [True] * 99
        assert await one.numbers("A") == [1]


async def test_a_duplicate_in_a_batch_of_its_aggregate(rig: Rig) -> None:
    """Its place in the order is that of the first; what comes between is not disturbed."""
    command_id = new_command_id()
    outcomes = await answered(
        [
            rig.submit("A", Add(1), command_id=command_id),
            rig.submit("A", Add(2)),
            rig.submit("A", Add(1), command_id=command_id),
        ]
    )
    assert [outcome.duplicate for outcome in outcomes] == [False, False, True]
    assert await rig.numbers("A") == [1, 2]


async def test_one_id_for_two_contents_at_once(rig: Rig) -> None:
    """The first is decided, the other told that the id is taken, on the same aggregate or not."""
    command_id = new_command_id()
    outcomes = await answered(
        [
            rig.submit("A", Add(1), command_id=command_id),
            rig.submit("A", Add(2), command_id=command_id),
            rig.submit("B", Add(1), command_id=command_id),
        ]
    )
    codes = [outcome.error and outcome.error.code for outcome in outcomes]
    assert codes == [None, "id_reused", "id_reused"]
    assert (await rig.numbers("A"), await rig.numbers("B")) == ([1], [])


async def test_a_reused_id_of_a_row_is_an_error_in_the_log(rig: Rig) -> None:
    """Nobody waits for its answer, and its row goes: so an operator is told."""
    command_id = new_command_id()
    await answered([rig.submit("A", Add(1), command_id=command_id)])
    other = message("A", Add(2), command_id)
    row = ScheduledCommand.of(other, IMMEDIATELY, PARTITIONS)
    with structlog.testing.capture_logs() as logs:
        (outcome,) = await answered([rig.executor.submit(other, scheduled=row)])
    assert outcome.error is not None
    assert outcome.error.code == "id_reused"
    (told,) = [line for line in logs if line["log_level"] == "error"]
    assert (told["event"], told["command_id"]) == ("command id reused: not decided", command_id)


# --- Conflicts ---------------------------------------------------------------


async def test_b20_a_stale_cached_aggregate_never_decides() -> None:
    """What A has cached is checked when it is committed: B's deposit counts at A."""
    storage = FaultyStorage(storage_for("memory://"))
    async with executing(storage) as a, executing(storage) as b:
        await answered([a.submit("X", Refuse())])
        await answered([b.submit("X", Add(-100))])
        (outcome,) = await answered([a.submit("X", AddUpTo(60, limit=0))])
    assert outcome.accepted
    assert outcome.sequence == 2
    assert await a.numbers("X") == [-100, 60]


async def test_a_stale_rejection_is_not_stored() -> None:
    """A rejection is a decision too: it is made again when another writer was there first."""
    storage = FaultyStorage(storage_for("memory://"))
    async with executing(storage) as a, executing(storage) as b:
        await answered([a.submit("X", Add(0))])
        await answered([b.submit("X", Add(-100))])
        (outcome,) = await answered([a.submit("X", AddUpTo(60, limit=10))])
        assert outcome.accepted
        assert a.executor.counts.conflicts == 1


async def test_writers_that_meet_lose_nothing() -> None:
    """Two executors on one aggregate: every command is accepted once, in each one's order."""
    storage = FaultyStorage(storage_for("memory://"))
    async with executing(storage) as a, executing(storage) as b:
        answers: list[Answer] = []
        for n in range(100):
            answers += [a.submit("X", Add(n)), b.submit("X", Add(1000 + n))]
            await asyncio.sleep(0)
        await answered(answers)
        numbers = await a.numbers("X")
    assert [n for n in numbers if n < 1000] == list(range(100))
    assert [n - 1000 for n in numbers if n >= 1000] == list(range(100))


async def test_a_conflict_of_one_aggregate_is_not_the_others() -> None:
    """The others of the batch commit; only the stale one goes round again."""
    storage = FaultyStorage(storage_for("memory://"))
    async with executing(storage) as a, executing(storage) as b:
        await answered([a.submit("X", Add(0))])
        await answered([b.submit("X", Add(0))])
        await answered([a.submit("X", Add(1)), *(a.submit(f"A{n}", Add(1)) for n in range(9))])
        assert a.executor.counts.conflicts == 1
        assert a.executor.counts.batches == 3


async def test_conflicts_that_do_not_end_are_told() -> None:
    """A command that another writer is always quicker than is named, each hundred times."""
    inner = storage_for("memory://")
    async with executing(FaultyStorage(inner)) as quicker:
        storage = FaultyStorage(inner)
        append, times = storage.events.append, iter(range(110))

        async def overtaken(chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
            if next(times, None) is not None:
                await quicker.submit("X", Add(0))
            return await append(chains, recorded_at)

        with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.setattr(storage.events, "append", overtaken)
            async with executing(storage) as rig:
                (outcome,) = await answered([rig.submit("X", Add(1))])
    assert outcome.accepted
    (line,) = [line for line in logs if line["log_level"] == "warning"]
    assert line["event"] == "conflicts do not end"
    assert (line["command_id"], line["conflicts"]) == (outcome.command_id, 100)


# --- The store is away -------------------------------------------------------


async def patiently(rig: Rig, answers: Sequence[Answer]) -> list[Outcome]:
    """Let time pass until all is answered."""

    async def done() -> bool:
        rig.clock.advance_to_next(within=60.0)
        return all(answer.done() for answer in answers)

    await eventually(done)
    return await answered(answers)


@pytest.mark.parametrize("times", [0, 3])
async def test_an_append_whose_commit_is_unknown_had_been_committed(rig: Rig, times: int) -> None:
    """Its outcomes are found, once the store answers: not lost, not doubled, no duplicates."""
    rig.storage.faults.after("append", errors.StoreUnavailable())
    rig.storage.faults.before("find_outcomes", None, *[errors.StoreUnavailable()] * times)
    outcomes = await patiently(rig, [rig.submit("A", Add(n)) for n in (1, 2, 3)])
    assert statuses(outcomes) == ["accepted"] * 3
    assert [outcome.duplicate for outcome in outcomes] == [False] * 3
    assert [outcome.offset for outcome in outcomes] == [1, 2, 3]
    assert await rig.numbers("A") == [1, 2, 3]
    assert rig.executor.counts.duplicate == 0


async def test_an_id_that_was_made_just_now_is_looked_up_once_it_may_be_known(rig: Rig) -> None:
    """Nobody looks for its outcome before there can be one; after a lost answer it is found."""
    (outcome,) = await patiently(rig, [rig.submit("A", Add(1), fresh=True)])
    assert outcome.accepted
    assert rig.storage.faults.calls["find_outcomes"] == 0
    rig.storage.faults.after("append", errors.StoreUnavailable())
    (outcome,) = await patiently(rig, [rig.submit("A", Add(2), fresh=True)])
    assert (outcome.accepted, outcome.duplicate) == (True, False)
    assert rig.storage.faults.calls["find_outcomes"] == 1
    assert await rig.numbers("A") == [1, 2]


async def test_an_append_that_failed_is_made_again(rig: Rig) -> None:
    """Nothing was committed: the commands are decided again and committed once."""
    rig.storage.faults.before("append", *[errors.StoreUnavailable()] * 5)
    outcomes = await patiently(rig, [rig.submit("A", Add(n)) for n in (1, 2, 3)])
    assert statuses(outcomes) == ["accepted"] * 3
    assert await rig.numbers("A") == [1, 2, 3]
    assert rig.storage.faults.calls["append"] == 6


async def test_a_duplicate_of_a_command_whose_commit_is_unknown(rig: Rig) -> None:
    """The command itself is no duplicate, its duplicate is one."""
    rig.storage.faults.after("append", errors.StoreUnavailable())
    command_id = new_command_id()
    outcomes = await patiently(
        rig, [rig.submit("A", Add(1), command_id=command_id) for _ in range(2)]
    )
    assert [outcome.duplicate for outcome in outcomes] == [False, True]
    assert await rig.numbers("A") == [1]


async def test_the_queue_is_not_burned_through_while_the_store_is_away(rig: Rig) -> None:
    """One batch probes, ever more slowly; nobody is answered until the store is back."""
    rig.storage.faults.before("find_outcomes", *[errors.StoreUnavailable()] * 12)
    answers = [rig.submit(f"A{n}", Add(1)) for n in range(500)]
    await eventually(lambda: _true(rig.executor.trouble is not None))
    assert not any(answer.done() for answer in answers)
    await patiently(rig, answers)
    assert rig.storage.faults.calls["find_outcomes"] == 13
    assert rig.clock.monotonic() > 10.0
    assert rig.executor.trouble is None


async def _true(value: object) -> object:
    return value


async def test_patience_ends() -> None:
    """Callers are told that the store is away; what they submit later is handled."""
    async with executing(policy=ExecutionPolicy(patience=10.0)) as rig:
        rig.storage.faults.before("append", *[errors.StoreUnavailable()] * 100)
        answers = [rig.submit("A", Add(1)), rig.submit("B", Add(1))]
        with pytest.raises(errors.StoreUnavailable):
            await patiently(rig, answers)
        assert all(isinstance(a.exception(), errors.StoreUnavailable) for a in answers)
        assert rig.executor.pending == 0


async def test_a_store_that_refuses_is_no_outage(rig: Rig) -> None:
    """A full disk reaches the caller at once as what it is; then work goes on."""
    rig.storage.faults.before("append", errors.StoreFull())
    with pytest.raises(errors.StoreFull):
        await answered([rig.submit("A", Add(1))])
    await answered([rig.submit("A", Add(2))])
    assert await rig.numbers("A") == [2]


async def test_a_store_that_refuses_to_load_while_duplicates_are_answered(rig: Rig) -> None:
    """Aggregates answered from the store and aggregates given up both go on afterwards."""
    known = new_command_id()
    await answered([rig.submit("A", Add(1), command_id=known)])
    rig.storage.faults.calls.clear()
    rig.storage.faults.before("load", errors.StoreCorrupt())
    duplicate = rig.submit("A", Add(1), command_id=known)
    doomed = rig.submit("B", Add(1))
    # Both are taken now; the next ones queue behind them.
    await eventually(lambda: _true(rig.storage.faults.calls["find_outcomes"]), every=0)
    behind = [rig.submit("A", Add(2)), rig.submit("B", Add(2)), rig.submit("A", Add(3))]
    (outcome,) = await answered([duplicate])
    assert outcome.duplicate
    with pytest.raises(errors.StoreCorrupt):
        await answered([doomed])
    assert statuses(await answered(behind)) == ["accepted"] * 3
    assert (await rig.numbers("A"), await rig.numbers("B")) == ([1, 2, 3], [2])


async def test_a_command_waiting_for_a_retry_beside_an_outage(rig: Rig) -> None:
    """It is tried again once, not twice, when the append beside it failed."""
    failing = rig.services.hooks["flaky"] = Failing(2)
    rig.storage.faults.before("append", *[errors.StoreUnavailable()] * 2)
    flaky = rig.submit("flaky", AddAfterCall("flaky", 1))
    outcomes = await patiently(rig, [flaky, rig.submit("A", Add(1))])
    assert statuses(outcomes) == ["accepted"] * 2
    assert await rig.numbers("flaky") == [1]
    await rig.executor.drain()
    assert failing.calls == 3
    assert rig.executor.counts.accepted == 2
    assert rig.executor.counts.conflicts == 0


# --- The retry ladder --------------------------------------------------------


async def test_the_retry_ladder(rig: Rig) -> None:
    """At once, then after 0.2, 1 and 5 s, each give or take a quarter; then it has failed."""
    failing = rig.services.hooks["down"] = Failing(99)
    answer = rig.submit("A", AddAfterCall("down", 1))
    for calls, seconds in ((2, 0.2), (3, 1.0), (4, 5.0)):
        await eventually(lambda: _true(rig.clock.sleepers))
        assert failing.calls == calls
        before = rig.clock.monotonic()
        assert rig.clock.advance_to_next(within=60.0)
        waited = rig.clock.monotonic() - before
        assert 0.75 * seconds <= waited <= 1.25 * seconds
    (outcome,) = await answered([answer])
    assert failing.calls == 5
    assert outcome.status is Status.FAILED
    assert outcome.error is not None
    assert outcome.error.code == "internal_error"
    (letter,) = await rig.storage.dead_letters.page()
    assert (letter.id, letter.attempts) == (outcome.command_id, 5)
    assert "Crash" in letter.reason


async def test_a_service_that_fails_once_then_works(rig: Rig) -> None:
    """The second attempt comes at once, and nobody notices."""
    rig.services.hooks["flaky"] = Failing(1)
    (outcome,) = await answered([rig.submit("A", AddAfterCall("flaky", 1))])
    assert outcome.accepted
    assert rig.clock.monotonic() == 0.0
    assert await rig.storage.dead_letters.count() == 0


async def test_a_waiting_retry_holds_back_its_own_aggregate_only(rig: Rig) -> None:
    """Commands before it are committed, commands behind it wait, other aggregates go on."""
    rig.services.hooks["flaky"] = Failing(2)
    before = rig.submit("A", Add(1))
    flaky = rig.submit("A", AddAfterCall("flaky", 2))
    behind = rig.submit("A", Add(3))
    other = rig.submit("B", Add(4))
    await answered([before, other])
    assert await rig.numbers("A") == [1]
    assert not flaky.done()
    assert not behind.done()
    await patiently(rig, [flaky, behind])
    assert await rig.numbers("A") == [1, 2, 3]


async def test_a_handler_that_ends_the_program_or_cancels_itself_fails(rig: Rig) -> None:
    """`SystemExit` and `CancelledError` out of a handler are failures like any other."""
    for error in (SystemExit(3), asyncio.CancelledError()):
        rig.services.hooks["mad"] = Failing(99, error)
        (outcome,) = await patiently(rig, [rig.submit("A", AddAfterCall("mad", 1))])
        assert outcome.status is Status.FAILED
    (outcome,) = await answered([rig.submit("A", Add(1))])
    assert outcome.accepted


class Odd(BaseException):
    """What no `except Exception` catches, such as a test framework's own failures."""


class Unspeakable(Exception):
    """An error that can't even be shown."""

    def __repr__(self) -> str:
        raise LookupError

    __str__ = __repr__


@pytest.mark.parametrize(
    "error", [Odd(), GeneratorExit(), BaseExceptionGroup("", [Odd()]), Unspeakable()]
)
async def test_whatever_a_handler_raises_is_its_commands_failure(
    rig: Rig, error: BaseException
) -> None:
    """Nobody waits for ever, and the aggregate goes on."""
    rig.services.hooks["mad"] = Failing(99, error)
    mad, good = await patiently(
        rig, [rig.submit("A", AddAfterCall("mad", 1)), rig.submit("A", Add(1))]
    )
    assert mad.status is Status.FAILED
    assert good.accepted


async def test_a_handler_that_cancels_its_own_task_fails(rig: Rig) -> None:
    """It is not taken for the executor's end, and what comes next is not cancelled with it."""

    async def cancel() -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        await asyncio.sleep(0)

    rig.services.hooks["mad"] = cancel
    mad, good = await patiently(
        rig, [rig.submit("A", AddAfterCall("mad", 1)), rig.submit("A", Add(1))]
    )
    assert mad.status is Status.FAILED
    assert good.accepted


@pytest.mark.parametrize("fails", [False, True])
async def test_a_handler_that_cancels_its_own_task_and_goes_on(rig: Rig, *, fails: bool) -> None:
    """What it decides is appended all the same, and it is not the append that is cancelled."""
    calls = itertools.count()

    async def cancel() -> None:
        if next(calls) == 0:
            task = asyncio.current_task()
            assert task
            task.cancel()
            if fails:
                raise Crash

    rig.services.hooks["mad"] = cancel
    for n in (1, 2):
        (outcome,) = await patiently(rig, [rig.submit("A", AddAfterCall("mad", n))])
        assert outcome.accepted
    assert await rig.numbers("A") == [1, 2]


async def test_an_async_handler_that_never_returns_times_out() -> None:
    """It is ended by its deadline and fails; its aggregate goes on."""
    policy = ExecutionPolicy(handler_timeout=0.01, retry_delays=(0.0,))
    async with executing(policy=policy) as rig:
        gate = rig.services.hooks["hangs"] = Gate()
        hung, good = await answered(
            [rig.submit("A", AddAfterCall("hangs", 1)), rig.submit("A", Add(2))]
        )
    assert gate.calls == 2
    assert hung.error is not None
    assert "HANDLER_TIMEOUT" in hung.error.message
    assert good.accepted
    assert await rig.numbers("A") == [2]


# --- Cancellation ------------------------------------------------------------


async def test_a_caller_that_goes_away_does_not_take_the_command_along(rig: Rig) -> None:
    """Its answer is cancelled; the command is committed all the same, and can be looked up."""
    gate = rig.services.hooks["slow"] = Gate()
    command_id = new_command_id()
    answer = rig.submit("A", AddAfterCall("slow", 1), command_id=command_id)
    await gate.entered.wait()
    answer.cancel()
    gate.open.set()
    await rig.executor.drain()
    assert await rig.numbers("A") == [1]
    (again,) = await answered([rig.submit("A", AddAfterCall("slow", 1), command_id=command_id)])
    assert again.duplicate


async def test_a_caller_that_goes_away_before_its_command_is_begun(rig: Rig) -> None:
    """It is decided all the same, and the executor comes to rest."""
    gate = rig.services.hooks["slow"] = Gate()
    slow, late = rig.submit("A", AddAfterCall("slow", 1)), rig.submit("A", Add(2))
    await gate.entered.wait()
    late.cancel()
    gate.open.set()
    await answered([slow])
    await asyncio.wait_for(rig.executor.drain(), 10)
    assert await rig.numbers("A") == [1, 2]


async def test_ending_an_executor_cancels_what_is_not_answered() -> None:
    """Nobody waits for ever for an executor that is gone."""
    async with executing() as rig:
        gate = rig.services.hooks["slow"] = Gate()
        command_id = new_command_id()
        slow = [rig.submit("A", AddAfterCall("slow", 1), command_id=command_id) for _ in range(2)]
        await gate.entered.wait()
    assert all(answer.cancelled() for answer in slow)
    assert await rig.numbers("A") == []


# --- Stopping ----------------------------------------------------------------


async def test_withdrawing_ends_a_chain_after_the_command_in_progress(rig: Rig) -> None:
    """What is begun is committed; the rest is given back, and can be decided elsewhere."""
    gate = rig.services.hooks["slow"] = Gate()
    first, *others = [rig.submit("A", command) for command in [AddAfterCall("slow", 1), *ADDS]]
    other = rig.submit("A", Add(50))
    await gate.entered.wait()
    late = rig.submit("A", Add(100))
    rig.executor.withdraw([first, *others, late])
    gate.open.set()
    await answered([first, other])
    for answer in [*others, late]:
        with pytest.raises(errors.Withdrawn):
            await answer
    assert await rig.numbers("A") == [1, 50]
    assert statuses(await answered([rig.submit("A", command) for command in ADDS])) == [
        "accepted"
    ] * len(ADDS)


async def test_withdrawing_what_others_wait_for_too(rig: Rig) -> None:
    """A command that somebody else asked for as well is decided for both."""
    gate = rig.services.hooks["slow"] = Gate()
    slow = rig.submit("A", AddAfterCall("slow", 1))
    await gate.entered.wait()
    command_id = new_command_id()
    ours = rig.submit("A", Add(2), command_id=command_id)
    theirs = rig.submit("A", Add(2), command_id=command_id)
    rig.executor.withdraw([ours])
    gate.open.set()
    outcomes = await answered([slow, ours, theirs])
    assert statuses(outcomes) == ["accepted"] * 3


async def test_withdrawing_all_that_waits(rig: Rig) -> None:
    """Nothing is left to wait for, and the aggregate takes commands as before."""
    gate = rig.services.hooks["slow"] = Gate()
    slow = rig.submit("A", AddAfterCall("slow", 1))
    await gate.entered.wait()
    rest = [rig.submit("A", Add(n)) for n in (2, 3)]
    rig.executor.withdraw(rest)
    gate.open.set()
    await answered([slow])
    await rig.executor.drain()
    assert rig.executor.pending == 0
    assert all(isinstance(answer.exception(), errors.Withdrawn) for answer in rest)
    await answered([rig.submit("A", Add(4))])
    assert await rig.numbers("A") == [1, 4]


# --- States ------------------------------------------------------------------


async def test_a_state_that_json_cannot_hold_is_no_failure_where_nothing_stores_it() -> None:
    """An event-sourced total beyond 64 bits goes on, in one batch and after a reload."""
    async with executing() as rig:
        for _ in range(2):
            outcomes = await answered([rig.submit("A", Add(2**62)) for _ in range(4)])
            assert statuses(outcomes) == ["accepted"] * 4
        assert await rig.total("A") == 2**65


async def test_a_state_that_cannot_be_stored_fails_its_command_at_once() -> None:
    """Where a snapshot is due the reason is given, without a retry, and others go on."""
    async with executing(source=AggregateSourced()) as rig:
        outcomes = await answered([rig.submit("A", Add(n)) for n in (*[2**62] * 4, 1)])
        assert statuses(outcomes) == [*["accepted"] * 3, "failed", "accepted"]
        error = outcomes[3].error
        assert error is not None
        assert error.message.startswith("Counter.total: integer exceeds 64-bit range")


async def test_a_state_too_large_to_be_cached_is_loaded_each_time() -> None:
    """The cache has room for one of two aggregates; both are right."""
    async with executing(policy=ExecutionPolicy(cache_bytes=700)) as rig:
        for _ in range(3):
            await answered([rig.submit(id_, Add(1)) for id_ in "AB"])
        assert [await rig.total(id_) for id_ in "AB"] == [3, 3]


async def test_a_long_stream_is_read_in_pages_while_others_go_on(rig: Rig) -> None:
    """Commands of other aggregates are decided between the pages."""
    await answered([rig.submit("long", AddEach([1] * (PAGE_LIMIT * 3 + 5)))])
    async with executing(rig.storage) as fresh:
        before = rig.storage.faults.calls["load"]
        slow, other = fresh.submit("long", Add(1)), fresh.submit("other", Add(1))
        (done,) = await answered([other])
        assert done.accepted
        assert not slow.done()
        (outcome,) = await answered([slow])
        assert outcome.sequence == PAGE_LIMIT * 3 + 6
        assert rig.storage.faults.calls["load"] == before + 4


# --- Too large for the store -------------------------------------------------


def refuse_numbers_from(least: int, rig: Rig) -> None:
    """Let the store refuse an append with an event that is too large for it."""

    def refuse(chains: Sequence[Chain]) -> None:
        for chain in chains:
            for command in chain.commands:
                if any(orjson.loads(event.payload)["n"] >= least for event in command.events):
                    raise errors.TooLarge

    rig.storage.faults.refuse_append = refuse


async def test_a_result_too_large_for_the_store_fails_alone(rig: Rig) -> None:
    """Not those of other aggregates in its append, nor those beside it in its own chain."""
    refuse_numbers_from(1000, rig)
    answers = [rig.submit("A", Add(n)) for n in (1, 1000, 2, 3)]
    answers += [rig.submit(f"B{n}", Add(n)) for n in range(10)]
    outcomes = await patiently(rig, answers)
    assert statuses(outcomes) == ["accepted", "failed", *["accepted"] * 12]
    assert outcomes[1].error is not None
    assert outcomes[1].error.code == "internal_error"
    assert await rig.numbers("A") == [1, 2, 3]
    (letter,) = await rig.storage.dead_letters.page()
    assert letter.id == outcomes[1].command_id


async def test_an_outage_while_the_too_large_is_looked_for(rig: Rig) -> None:
    """What was committed already is not taken up again."""
    refuse_numbers_from(1000, rig)
    answers = [rig.submit(id_, Add(n)) for id_, n in (("A", 1), ("B", 1000), ("C", 3))]
    rig.storage.faults.after("append", None, errors.StoreUnavailable())
    outcomes = await patiently(rig, answers)
    assert statuses(outcomes) == ["accepted", "failed", "accepted"]
    assert [outcome.duplicate for outcome in outcomes] == [False] * 3
    counts = rig.executor.counts
    assert (counts.accepted, counts.failed, counts.duplicate) == (2, 1, 0)
    more = await patiently(rig, [rig.submit(id_, Add(5)) for id_ in "ABC"])
    assert statuses(more) == ["accepted"] * 3
    assert [await rig.numbers(id_) for id_ in "ABC"] == [[1, 5], [5], [3, 5]]


async def test_an_event_over_the_limit_of_bytes() -> None:
    """It is refused before the store sees it, without a retry."""
    policy = ExecutionPolicy(max_event_bytes=10)
    async with executing(policy=policy) as rig:
        outcomes = await answered([rig.submit("A", Add(1)), rig.submit("A", Add(10**9))])
        assert statuses(outcomes) == ["accepted", "failed"]
        assert await rig.storage.dead_letters.count() == 1
