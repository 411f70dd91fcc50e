"""Whom handlers send to, as their code names it: told when the application is opened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cqrs_es import (
    Aggregate,
    Envelope,
    Intent,
    Reactor,
    Send,
    command,
    errors,
    event,
    intents,
    send,
)
from cqrs_es.application import Application
from cqrs_es.send_targets import targets_of
from cqrs_es.settings import Settings
from tests import transfers


@command
class Go:
    pass


@event
class Gone:
    pass


@dataclass
class Walker(Aggregate[Go, Gone, None], type="walker"):
    def handle(self, command: Go, services: None) -> Iterator[Gone | Intent]:  # noqa: ARG002
        yield Gone()
        yield from (send(transfers.Account, name, transfers.Fund(1)) for name in ("a", "b"))

    def apply(self, event: Gone) -> None: ...


class Direct(Reactor[Gone], name="direct"):
    def react(self, event: Envelope[Gone], services: None) -> list[Send]:  # noqa: ARG002
        return self._sent(event.aggregate_id)

    def _sent(self, name: str) -> list[Send]:
        return [intents.send(Walker, name, Go())]


class Away(Reactor[Gone], name="away"):
    async def react(self, event: Envelope[Gone], services: None) -> list[Send]:  # noqa: ARG002
        return [send("billing:account", event.aggregate_id, "Charge", {})]


class ToProcess(Reactor[Gone], name="to_process"):
    def react(self, event: Envelope[Gone], services: None) -> list[Send]:  # noqa: ARG002
        return [send(transfers.Transfer, "t", Go())]


class Unknown(Reactor[Gone], name="unknown"):
    targets: tuple[type[Any], ...] = ()

    def react(self, event: Envelope[Gone], services: None) -> list[Send]:  # noqa: ARG002
        return [send(target, "t", Go()) for target in self.targets]


def test_targets_are_found_as_they_are_written() -> None:
    """In generators, helpers and coroutines; by name, through a module, and as text."""
    assert list(targets_of(Walker)) == [transfers.Account]
    assert list(targets_of(Direct)) == [Walker]
    assert list(targets_of(Away)) == ["billing:account"]
    assert list(targets_of(Unknown)) == []


def application(*reactors: type[Reactor[Any]], accounts: bool = True) -> Application:
    app = Application("walkers")
    app.aggregate(Walker)
    if accounts:
        app.aggregate(transfers.Account)
    for reactor in reactors:
        app.reactor(reactor)
    return app


async def test_targets_that_are_there() -> None:
    """A remote counts once it is named."""
    app = application(Direct, Away, Unknown)
    app.remote("billing", url="redis://127.0.0.1:1/0")
    async with app.open(Settings(store_url="memory://")):
        pass


async def opening_says(app: Application, said: str) -> None:
    with pytest.raises(errors.DefinitionError, match=said):
        async with app.open(Settings(store_url="memory://")):
            pass


async def test_targets_that_are_not_there() -> None:
    """Who sends, to whom, and what to do."""
    await opening_says(application(accounts=False), r"Walker sends to Account, .*app\.aggregate")
    await opening_says(application(Away), r"Away sends to 'billing:account': .*app\.remote")
    app = application(ToProcess)
    app.process_manager(transfers.Transfer)
    await opening_says(app, "ToProcess sends to Transfer, a process manager")


def test_two_process_managers_of_one_type_are_refused() -> None:
    """As two aggregates are."""
    app = application()
    app.process_manager(transfers.Transfer)
    with pytest.raises(errors.DefinitionError, match="two aggregates have the type 'transfer'"):
        app.process_manager(transfers.Transfer)
