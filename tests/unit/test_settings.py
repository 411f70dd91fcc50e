"""Every setting acts, as an operator gives it: by the environment."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, cast

import pytest

from cqrs_es import Aggregate, command, errors, event
from cqrs_es.application import Application
from cqrs_es.client import Client, SyncClient
from cqrs_es.settings import Settings
from cqrs_es.testing import FakeClock
from cqrs_es.types import new_command_id
from tests.bank_data import PROJECT
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.store import Chain, ChainResult, LoadedAggregate, LoadRequest

# Settings that act in a process or on the command line, and the tests that show it.
ELSEWHERE: Final = {
    "app": "tests/integration/test_cli_errors.py::test_the_flag_goes_before_the_environment",
    "shutdown_timeout": "tests/integration/test_cli_run.py"
    "::test_the_first_signal_gives_only_so_much_time",
    "health_port": "tests/integration/test_probes.py::test_the_port_from_the_environment",
    "wait_for_views": "tests/integration/test_view_versions.py::test_ready_waits_for_views",
    "log_level": "tests/integration/test_log_lines.py::test_level_and_format_by_environment",
    "log_format": "tests/integration/test_log_lines.py::test_level_and_format_by_environment",
}


@command
class Write:
    text: str


@command
class Hang:
    pass


@event
class Written:
    text: str


@dataclass
class Note(Aggregate[Write | Hang, Written, None], type="note"):
    async def handle(self, command: Write | Hang, services: None) -> list[Written]:
        del services
        if isinstance(command, Hang):
            await asyncio.Event().wait()
            return []
        return [Written(command.text)]

    def apply(self, event: Written) -> None:
        pass


app = Application("notes")
app.aggregate(Note)


def settings(**given: object) -> Settings:
    """Read settings as a process does; those not given are for a store in memory."""
    environment = {"store_url": "memory://", **given}
    return Settings.from_environment(
        {f"CQRS_ES_{name.upper()}": str(value) for name, value in environment.items()}
    )


async def store_url(tmp_path: Path) -> None:
    """Name where events are kept."""
    path = tmp_path / "here.db"
    async with app.open(settings(store_url=f"sqlite:///{path}")):
        assert path.exists()


async def broker_url() -> None:
    """Name the broker: here one that nobody runs."""
    with pytest.raises(errors.BrokerUnavailable, match=r"127\.0\.0\.1:9"):
        async with app.open(settings(broker_url="redis://127.0.0.1:9/0")):
            pass


async def service() -> None:
    """Name the topic, and with it the source of events."""
    async with app.open(settings(service="shop")) as opened, opened.running():
        await opened.execute(Note, "1", Write("x"))
        feed = await opened.process.broker.subscribe({0: 0})
        (arrived,) = await feed.receive(1)
        assert b'"source":"/shop"' in arrived.body


async def partitions() -> None:
    """Set the number of partitions of a new store."""
    async with app.open(settings(partitions=3)) as opened:
        assert (await opened.storage.info()).partitions == 3


async def batch_size() -> None:
    """Bound the commands of a transaction."""
    appended: list[int] = []
    async with app.open(settings(batch_size=2)) as opened:
        append = opened.storage.events.append

        async def counting(chains: Sequence[Chain], *rest: Any) -> list[ChainResult]:
            appended.append(len(chains))
            return await append(chains, *rest)

        cast("Any", opened.storage.events).append = counting
        await asyncio.gather(*(opened.execute(Note, str(n), Write("x")) for n in range(6)))
    assert max(appended) <= 2
    assert sum(appended) == 6


async def cache_bytes() -> None:
    """Bound what is kept of aggregates: with nothing, each command loads its own."""
    assert await _loads_of_two_commands(Settings().cache_bytes) == 1
    assert await _loads_of_two_commands(0) == 2


async def _loads_of_two_commands(cache_bytes: int) -> int:
    loaded: list[LoadRequest] = []
    async with app.open(settings(cache_bytes=cache_bytes)) as opened:
        load = opened.storage.events.load

        async def counting(requests: Sequence[LoadRequest]) -> Sequence[LoadedAggregate]:
            loaded.extend(requests)
            return await load(requests)

        cast("Any", opened.storage.events).load = counting
        for _ in range(2):
            await opened.execute(Note, "1", Write("x"))
    return len(loaded)


async def handler_timeout() -> None:
    """End a handler that takes longer."""
    clock = FakeClock()
    async with app.open(settings(handler_timeout=0.01), clock=clock) as opened:
        hanging = asyncio.create_task(opened.execute(Note, "1", Hang()))

        async def failed() -> bool:
            clock.advance(1)
            return hanging.done()

        await eventually(failed)
        assert (await hanging).status == "failed"


async def lease_seconds() -> None:
    """Set for how long a partition is leased."""
    async with app.open(settings(lease_seconds=77)) as opened, opened.running({"worker"}):
        leases = opened.storage.leases
        await eventually(leases.members)
        (member,) = await leases.members()
        left = member.expires_at - opened.process.clock.now()
        assert 60 < left.total_seconds() <= 77


async def outcome_retention_days() -> None:
    """Forget outcomes that are older."""
    clock, command_id = FakeClock(), new_command_id()
    async with app.open(settings(outcome_retention_days=2), clock=clock) as opened:
        await opened.execute(Note, "1", Write("x"), command_id=command_id)
        async with opened.running({"worker"}):
            clock.advance(1.9 * 86_400)
            await eventually(opened.storage.leases.held)
            assert await opened.outcome(command_id) is not None
            clock.advance(0.2 * 86_400)

            async def forgotten() -> bool:
                clock.advance(1)
                return await opened.outcome(command_id) is None

            await eventually(forgotten)


async def event_retention() -> None:
    """Bound what the topic keeps."""
    async with app.open(settings(event_retention=2)) as opened, opened.running():
        broker = opened.process.broker
        for _ in range(5):
            await opened.execute(Note, "1", Write("x"))

        async def published() -> bool:
            return await broker.topic_end(0) == 5

        await eventually(published)
        feed = await broker.subscribe({0: 0})
        assert [arrived.offset for arrived in await feed.receive(9)] == [4, 5]


async def max_event_bytes() -> None:
    """Refuse larger events."""
    async with app.open(settings(max_event_bytes=1024)) as opened:
        assert (await opened.execute(Note, "1", Write("x" * 900))).accepted
        outcome = await opened.execute(Note, "1", Write("x" * 1100))
        assert outcome.error is not None
        assert "is over CQRS_ES_MAX_EVENT_BYTES" in outcome.error.message


async def max_message_bytes() -> None:
    """Refuse larger commands, in the process as on the way through the broker."""
    small, large = Write("x" * 900), Write("x" * 300_000)
    async with app.open(settings(max_message_bytes=1100)) as opened:
        assert (await opened.execute(Note, "1", small)).accepted
        with pytest.raises(errors.InvalidMessage, match="over the limit of 1100"):
            await opened.execute(Note, "1", Write("x" * 1100))
    async with app.open(settings(max_message_bytes=1_000_000)) as opened:
        assert (await opened.execute(Note, "1", large)).accepted
        await clients_refuse_and_take(opened, large)


async def clients_refuse_and_take(opened: OpenApplication, large: Write) -> None:
    broker = opened.process.broker
    asked = {"broker": broker, "service": "notes", "partitions": 1}
    async with Client(**cast("Any", asked)) as client:
        with pytest.raises(errors.InvalidMessage, match="over the limit of 262144"):
            await client.send(Note, "1", large)
    async with Client(**cast("Any", asked), max_message_bytes=1_000_000) as client:
        await client.send(Note, "1", large)
    with (
        SyncClient("memory://", service="notes", partitions=1, max_message_bytes=2000) as sync,
        pytest.raises(errors.InvalidMessage, match="over the limit of 2000"),
    ):
        sync.send(Note, "1", large)


async def remote_urls() -> None:
    """Tell the relay where another service's broker is."""
    shop = Application("shop")
    shop.remote("billing", url="CQRS_ES_BILLING_URL")
    with pytest.raises(errors.SettingsError, match="CQRS_ES_BILLING_URL is not set"):
        async with shop.open(settings()) as opened:
            opened.supervisor({"relay"})
    async with shop.open(settings(billing_url="redis://127.0.0.1:1/0")) as opened:
        opened.supervisor({"relay"})


HERE: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    act.__name__: act
    for act in (
        store_url, broker_url, service, partitions, batch_size, cache_bytes, handler_timeout,
        lease_seconds, outcome_retention_days, event_retention, max_event_bytes, max_message_bytes,
        remote_urls,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
async def test_a_setting_acts(name: str, tmp_path: Path) -> None:
    """Whatever can be set makes a difference, or a test elsewhere shows that it does."""
    if name in ELSEWHERE:
        path, _, test = ELSEWHERE[name].partition("::")
        assert re.search(rf"def {test}\b", (PROJECT / path).read_text(encoding="utf-8"))
    else:
        await HERE[name](*([tmp_path] if name == "store_url" else []))


def test_no_password_in_what_is_shown() -> None:
    """Settings get into logs, tracebacks and debuggers."""
    secret = settings(store_url="mysql://me:hunter2@db/bank", broker_url="redis://:hunter2@r/0")
    assert "hunter2" not in repr(secret)
    assert "mysql://me:***@db/bank" in repr(secret)


async def test_settings_that_ignore_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are refused where they would open a fresh file instead of the operator's store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CQRS_ES_STORE_URL", "memory://")
    with pytest.raises(errors.SettingsError, match=r"Settings\.from_environment\(\)"):
        async with app.open(Settings(batch_size=5)):
            pass
    async with app.open():
        pass
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - in no thread: it is one folder
