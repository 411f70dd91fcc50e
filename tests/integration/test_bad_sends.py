"""What a handler or reactor sends that can't be sent: nothing comes of it, and somebody is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from cqrs_es import (
    Aggregate,
    Elapsed,
    Envelope,
    Intent,
    Reactor,
    Send,
    command,
    event,
    send,
)
from cqrs_es.application import Application
from cqrs_es.testing import TestApp
from tests.transfers import Account, Close, Fund, Transfer

FAR: Final = datetime(2099, 1, 1, tzinfo=UTC)
LONG_AGO: Final = datetime(1999, 1, 1, tzinfo=UTC)
WRONG: Final[Any] = "ten"
NOBODY: Final[list[type[Any]]] = [Transfer]  # which the code does not name, so that it opens

BAD: Final[dict[str, tuple[Callable[[], Send], str]]] = {
    "type": (lambda: send(Account, "a", Fund(WRONG)), "Fund.amount: must be int, not str"),
    "class": (lambda: send(Account, "a", Close), "type is no message"),
    "foreign": (lambda: send(Account, "a", Try("x")), "Account has no such command"),
    "timer": (lambda: send(Trier, "a", Elapsed("t", FAR, FAR)), "Trier has no such command"),
    "no id": (lambda: send(Account, "", Fund(1)), "1 to 255 characters, not 0"),
    "long id": (lambda: send(Account, "a" * 256, Fund(1)), "1 to 255 characters, not 256"),
    "far": (lambda: send(Account, "a", Fund(1), at=FAR), "can't be due at 2099"),
    "long ago": (lambda: send(Account, "a", Fund(1), at=LONG_AGO), "can't be due at 1999"),
    "large": (lambda: send(Trier, "a", Try("x" * 1_100_000)), "is over CQRS_ES_MAX_MESSAGE_BYTES"),
    "nobody": (lambda: send(NOBODY[0], "a", Fund(1)), "Transfer is not registered"),
    "elsewhere": (lambda: send("shop:till", "a", "Ring", {}), "no such service"),
}
each_kind = pytest.mark.parametrize("kind", BAD)


@command
class Try:
    """Send something; prefixed by `react`, have the reactor send it."""

    what: str


@event
class Tried:
    what: str


@dataclass
class Trier(Aggregate[Try | Elapsed, Tried, None], type="trier"):
    tries: int = 0

    def handle(self, command: Try | Elapsed, services: None) -> Iterator[Tried | Intent]:  # noqa: ARG002
        if isinstance(command, Elapsed):
            return
        yield Tried(command.what)
        if command.what in BAD:
            yield send(Account, "a", Fund(1))
            yield BAD[command.what][0]()

    def apply(self, event: Tried) -> None:  # noqa: ARG002
        self.tries += 1


class Trying(Reactor[Tried], name="trying"):
    def react(self, event: Envelope[Tried], services: None) -> Iterator[Send]:  # noqa: ARG002
        word, _, what = event.data.what.partition(" ")
        if word == "react":
            yield send(Account, "a", Fund(1))
            if what:
                yield BAD[what][0]()


def application() -> Application:
    app = Application("trying")
    app.aggregate(Account)
    app.aggregate(Trier)
    app.reactor(Trying)
    return app


async def left(t: TestApp) -> tuple[int, int]:
    """Count what was sent all the same: the events of the target, and rows."""
    rows = await t.opened.storage.events.list_scheduled(None, 10)
    return len(await t.events(Account, "a")), len(rows)


@each_kind
async def test_what_can_not_be_sent_fails_its_command(kind: str) -> None:
    """With a reason; what the command did before leaves no trace, and the aggregate goes on."""
    async with TestApp(application()) as t:
        with t.expect_failures():
            outcome = await t.send(Trier, "t", Try(kind))
            await t.drain()
        assert outcome.error is not None
        assert (outcome.status, outcome.error.code) == ("failed", "internal_error")
        assert BAD[kind][1] in outcome.error.message
        assert await t.events(Trier, "t") == []
        assert await left(t) == (0, 0)
        assert (await t.send(Trier, "t", Try("nothing"))).accepted


@each_kind
async def test_what_can_not_be_sent_parks_the_source(kind: str) -> None:
    """With a reason; nothing of that event is sent, and what others say is reacted to."""
    async with TestApp(application()) as t:
        await t.drain()
        with t.expect_failures():
            await t.send(Trier, "t", Try(f"react {kind}"))
            await t.drain()
        (marker,) = await t.parked()
        assert (marker.projector, str(marker.key)) == ("reactor:trying__1", "trier/t")
        assert BAD[kind][1] in marker.reason
        assert await left(t) == (0, 0)
        await t.send(Trier, "other", Try("react"))
        await t.drain()
        assert await left(t) == (1, 0)
