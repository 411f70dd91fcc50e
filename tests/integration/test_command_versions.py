"""Senders and workers of two versions, deployed in either order: no command is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import orjson
import pytest

from cqrs_es.client import SyncClient
from tests.apps.people import Move, Register
from tests.outside import partition_of
from tests.processes import service
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.outside import Outside
    from tests.processes import Service

OLD = ("--app", "tests.apps.people:old")
NEW = ("--app", "tests.apps.people:new")

pytestmark = pytest.mark.timeout(300)


def sent_by(sender: str, person: str) -> list[dict[str, Any]]:
    """Write what a sender of a version sends of one person."""
    if sender == "old":
        payloads: list[tuple[str, str | None, dict[str, str]]] = [
            ("Register", None, {"name": "Ada Lovelace"}),
            ("Move", None, {"city": "Turku"}),
        ]
    else:
        payloads = [
            ("Return", "1.1", {}),
            ("Register", "2.0", {"first": "Ada", "last": "Lovelace"}),
            ("Move", "1.1", {"city": "Turku", "country": "FI"}),
        ]
    return [
        {
            "id": str(uuid4()),
            "type": name,
            "aggregate_type": "person",
            "aggregate_id": person,
            "payload": payload,
            "reply_to": "me",
        }
        | ({} if version is None else {"version": version})
        for name, version, payload in payloads
    ]


class Senders:
    """Half of them old, half new; they note what they have sent."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self.sent: list[str] = []

    def send(self, kinds: str, people: int = 6) -> None:
        """Send commands for people that nobody has heard of yet."""
        for n in range(people):
            commands = sent_by(kinds.split()[n % len(kinds.split())], uuid4().hex)
            self.sent += [each["id"] for each in commands]
            self._outside.send("people", commands)

    def send_for_later(self, sender: str) -> None:
        """Send an envelope whose command is due already."""
        command, *_ = sent_by(sender, uuid4().hex)
        body = {"schedule": command, "due": datetime.now(UTC).isoformat()}
        self.sent.append(command["id"])
        self._outside.send_bytes("people", [(partition_of(command), orjson.dumps(body))])

    def outcomes(self) -> list[tuple[str, Any]]:
        """Return what was answered to what they have sent."""
        replies = self._outside.replies("people", "me")
        return [(r["status"], r["error"]) for r in replies if r["command_id"] in self.sent]

    def all_accepted(self) -> bool:
        """Whether every command was accepted; none may be refused, however early it was sent."""
        found = self.outcomes()
        assert {outcome for outcome, _ in found} <= {"accepted"}, found
        return len(found) >= len(self.sent)


def fit(people: Service) -> list[bool]:
    return [member["fit"] for member in people.status()["members"] if member["role"] == "worker"]


@pytest.mark.parametrize("first", ["old", "new"])
def test_no_command_is_refused_because_of_a_deploy(
    first: str, mysql_url: str, broker_url: str, outside: Outside, tmp_path: Path
) -> None:
    """Whichever worker is first, and whichever is left over, with senders of both versions."""
    with service("tests.apps.people:old", mysql_url, broker_url, tmp_path) as people:
        outside.follow("people", "me")
        senders = Senders(outside)
        workers = {first: people.start(*(OLD if first == "old" else NEW), "worker")}
        senders.send("old new")
        senders.send_for_later("new")
        if first == "old":  # it waits with what it does not know, and refuses nothing
            until(lambda: fit(people) == [False], "the old worker takes what it does not know")
            assert len(senders.outcomes()) < len(senders.sent)
            workers["new"] = people.start(*NEW, "worker")
            until(senders.all_accepted, "not all were accepted once the new worker came")
        else:
            until(senders.all_accepted, "not all were accepted by the new worker")
            workers["old"] = people.start(*OLD, "worker")
            until(lambda: len(fit(people)) == 2, "the old worker has not joined")
        senders.send("new old")
        senders.send_for_later("old")
        until(senders.all_accepted, "not all were accepted by both workers")
        with SyncClient(broker_url, service="people") as client:
            assert client.execute("person", "C", Register("Ada", "L"), timeout=60).accepted
            assert client.execute("person", "C", Move("Turku", "FI"), timeout=60).accepted
        assert people.stop(workers["old"]) == 0
        senders.send("old new")
        until(senders.all_accepted, "not all were accepted once the old worker was gone")
        assert people.status()["dead_letters"] == 0
        assert people.stop(workers["new"]) == 0
