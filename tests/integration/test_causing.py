"""What a command causes: commands to other aggregates, and timers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, assert_never

import pytest

from cqrs_es import Aggregate, Elapsed, Intent, cancel, command, event, later, send
from cqrs_es.application import Application
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp

if TYPE_CHECKING:
    from pathlib import Path


@command
class Order:
    item: str


@command
class Pay:
    pass


@event
class Ordered:
    item: str


@event
class Paid:
    pass


@event
class Expired:
    pass


@command
class Reserve:
    item: str


@event
class Reserved:
    item: str


@dataclass
class Stock(Aggregate[Reserve, Reserved, None], type="stock"):
    reserved: int = 0

    def handle(self, command: Reserve, services: None) -> Iterator[Reserved]:  # noqa: ARG002
        yield Reserved(command.item)

    def apply(self, event: Reserved) -> None:  # noqa: ARG002
        self.reserved += 1


@dataclass
class Purchase(Aggregate[Order | Pay | Elapsed, Ordered | Paid | Expired, None], type="purchase"):
    state: str = "new"

    def handle(
        self,
        command: Order | Pay | Elapsed,
        services: None,  # noqa: ARG002
    ) -> Iterator[Ordered | Paid | Expired | Intent]:
        match command:
            case Order(item):
                yield Ordered(item)
                yield send(Stock, item, Reserve(item))
                yield later("unpaid", after=timedelta(hours=1))
            case Pay():
                yield Paid()
                yield cancel("unpaid")
            case Elapsed("unpaid"):
                yield Expired()
            case Elapsed():
                pass

    def apply(self, event: Ordered | Paid | Expired) -> None:
        match event:
            case Ordered():
                self.state = "ordered"
            case Paid():
                self.state = "paid"
            case Expired():
                self.state = "expired"
            case _:
                assert_never(event)


def shop() -> Application:
    app = Application("shop")
    app.aggregate(Stock)
    app.aggregate(Purchase)
    return app


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{folder}/shop.db"])
async def test_a_command_sends_another_and_sets_a_timer(store: str, tmp_path: Path) -> None:
    """The command is decided; the timer fires when it is due, and not when it was cancelled."""
    async with TestApp(shop(), settings=Settings(store_url=store.format(folder=tmp_path))) as t:
        for number in range(3):
            await t.send(Purchase, f"p{number}", Order("book"))
        await t.send(Purchase, "p1", Pay())
        await t.drain()
        assert (await t.opened.load(Stock, "book")).state.reserved == 3
        await t.advance(timedelta(minutes=59))
        assert (await t.opened.load(Purchase, "p0")).state.state == "ordered"
        await t.advance(timedelta(minutes=2))
        states = [(await t.opened.load(Purchase, f"p{n}")).state.state for n in range(3)]
        assert states == ["expired", "paid", "expired"]
        assert await t.opened.storage.events.list_scheduled(None, 10) == []
