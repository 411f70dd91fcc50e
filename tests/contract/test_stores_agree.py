"""Two stores that are given the same appends answer the same and end up the same."""

from __future__ import annotations

import asyncio
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cqrs_es.messages import Status
from cqrs_es.ports.store import Chain, LoadRequest
from cqrs_es.stores import storage_for
from tests.contract.building import (
    NOW,
    PARTITIONS,
    accepted,
    account,
    assert_complete,
    chain,
    events,
    letter,
    refused,
    snapshot,
    whole_log,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import DecidedCommand

T = TypeVar("T")
KEYS = tuple(account(id_) for id_ in ("a", "A", "b", "c d"))
COMMAND_IDS = tuple(f"00000000-0000-7000-8000-{n:012}" for n in range(30))


@st.composite
def chains(draw: st.DrawFn, index: int) -> Chain:
    """Draw a chain that fits the aggregate of that index, or only nearly."""
    key = KEYS[index]
    base = draw(st.one_of(st.none(), st.integers(0, 6)))
    commands: list[DecidedCommand] = []
    sequence = base
    for _ in range(draw(st.integers(1, 3))):
        command = draw(decided(index, sequence))
        commands.append(command)
        sequence = None if sequence is None else sequence + len(command.events)
    number = draw(st.one_of(st.none(), st.integers(1, 3)))
    taken = None if number is None or sequence is None else snapshot(key, sequence, number)
    return chain(key, base, *commands, snapshot=taken)


@st.composite
def decided(draw: st.DrawFn, index: int, sequence: int | None) -> DecidedCommand:
    """Draw a command for an aggregate that stands at `sequence`."""
    key, command_id = KEYS[index], draw(st.sampled_from(COMMAND_IDS))
    retry = draw(st.booleans())
    status: Status = draw(st.sampled_from(list(Status)))
    match status:
        case Status.ACCEPTED:
            made = () if sequence is None else events(draw(st.integers(0, 2)), sequence + 1)
            return accepted(
                key,
                sequence,
                made,
                command_id=command_id,
                attempted=draw(st.booleans()),
                replaces_failed=retry,
            )
        case Status.REJECTED:
            return refused(key, sequence, command_id=command_id, replaces_failed=retry)
        case Status.FAILED:
            return refused(
                key,
                sequence,
                status=Status.FAILED,
                command_id=command_id,
                dead_letter=letter(command_id),
                replaces_failed=retry,
            )


appends = st.sets(st.integers(0, len(KEYS) - 1), min_size=1).flatmap(
    lambda indices: st.tuples(*(chains(index) for index in sorted(indices)))
)


class Stores(RuleBasedStateMachine):
    """The in-memory store beside SQLite, which decides on what it reads with SQL."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._runner = asyncio.Runner()
        urls = ("memory://", f"sqlite:///{Path(self._folder.name) / 'store.db'}")
        self._stores = [storage_for(url) for url in urls]
        self._both(_begin)

    def teardown(self) -> None:
        self._both(lambda storage: storage.close())
        self._runner.close()
        self._folder.cleanup()

    def _both(self, ask: Callable[[Storage], Awaitable[T]]) -> T:
        """Ask both stores; return the answer that they agree on."""

        async def ask_all() -> list[T]:
            return [await ask(storage) for storage in self._stores]

        first, second = self._runner.run(ask_all())
        assert first == second
        return first

    @rule(chains=appends, minutes=st.integers(0, 3))
    def append(self, chains: tuple[Chain, ...], minutes: int) -> None:
        """Append to some aggregates, recorded at some time."""
        moment = NOW + timedelta(minutes=minutes)
        self._both(lambda storage: storage.events.append(chains, moment))

    @rule(index=st.integers(0, len(KEYS) - 1), count=st.integers(0, 3), data=st.data())
    def append_where_it_stands(self, index: int, count: int, data: st.DataObject) -> None:
        """Append to one aggregate what fits it, unless the command has an outcome."""
        key = KEYS[index]
        [loaded] = self._both(lambda s: s.events.load([LoadRequest(key)]))
        command_id = data.draw(st.sampled_from(COMMAND_IDS))
        made = events(count, len(loaded.events) + 1)
        command = accepted(key, len(loaded.events), made, command_id=command_id)
        fitting = chain(key, len(loaded.events), command)
        self._both(lambda storage: storage.events.append([fitting], NOW))

    @rule(attempts=st.dictionaries(st.sampled_from(COMMAND_IDS), st.integers(0, 2)))
    def record_attempts(self, attempts: dict[str, int]) -> None:
        """Record attempts."""
        self._both(lambda storage: storage.events.record_attempts(attempts))
        self._both(lambda storage: storage.events.find_attempts(COMMAND_IDS))

    @rule(minutes=st.integers(0, 4))
    def prune(self, minutes: int) -> None:
        """Delete old outcomes."""
        moment = NOW + timedelta(minutes=minutes)
        self._both(lambda storage: storage.events.prune_outcomes(moment, 1000))

    @rule(command_id=st.sampled_from(COMMAND_IDS))
    def drop_letter(self, command_id: str) -> None:
        """Forget a dead letter."""
        self._both(lambda storage: storage.dead_letters.drop(command_id))

    @invariant()
    def they_hold_the_same(self) -> None:
        """Log, outcomes, snapshots and dead letters are the same, and the log has no hole."""
        assert_complete(self._both(whole_log))
        self._both(_contents)


async def _begin(storage: Storage) -> None:
    await storage.open()
    await storage.initialise(PARTITIONS)


async def _contents(storage: Storage) -> tuple[Any, ...]:
    loaded = await storage.events.load([LoadRequest(key, snapshot=True) for key in KEYS])
    return (
        [(found.snapshot, list(found.events)) for found in loaded],
        await storage.events.find_outcomes(COMMAND_IDS),
        await storage.dead_letters.page(),
        await storage.dead_letters.count(),
    )


TestStoresAgree = Stores.TestCase
TestStoresAgree.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
