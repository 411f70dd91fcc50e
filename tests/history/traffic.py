"""Random commands for a bank, and senders that go on until each is answered."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

import amqp
import orjson
import redis

from tests.history.records import Reply, Sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.outside import Outside

Json = dict[str, Any]

ACCOUNTS = 40
BATCH = 5  # commands that are sent at once
IN_FLIGHT = 60  # commands of one sender
PATIENCE_SECONDS = 4.0  # until what was not answered may be sent again
PAUSE_SECONDS = 0.02
DAYS = [f"2026-11-{day:02}" for day in range(1, 10)]
NEVER_OPENED = "nobody"
NAMES = [
    "OpenAccount",
    *["DepositMoney"] * 5,
    *["WithdrawMoney"] * 3,
    *["TransferMoney"] * 3,
    "WriteCheck",
    "AssignIban",
]


def _iban(number: int) -> str:
    """Make an IBAN of the United Kingdom, its check digits computed [ISO 13616]."""
    own = f"NWBK6016133192{number:04}"
    digits = "".join(str(int(letter, 36)) for letter in f"{own}GB00")
    return f"GB{98 - int(digits) % 97:02}{own}"


IBANS = [_iban(number) for number in range(12)]  # fewer than accounts: most are refused


def random_command(rng: random.Random, account: str, sequence: int, other: str) -> Json:
    """Write a command for an account that is thought to be at a sequence; `other` is another.

    Most will be accepted, some rejected for each of the reasons that there are,
    few fail.
    """
    name = rng.choice(NAMES)
    amount = f"{rng.randint(1, 20_000) / 100:.{rng.choice([0, 1, 2])}f}"
    if amount == "0" or rng.random() < 0.02:
        amount = rng.choice(["0", "-5", "0.001", "1E+3", "1000000000000"])
    payload = {
        "OpenAccount": {"account_id": account},
        "DepositMoney": {"amount": amount},
        "WithdrawMoney": {"amount": amount, "atm_id": f"ATM-{rng.randint(1, 9)}"},
        "WriteCheck": {"check_number": str(rng.randint(1000, 9999)), "amount": amount},
        "TransferMoney": {"to_account": other, "amount": amount},
        "AssignIban": {"iban": rng.choice(IBANS)},
    }[name]
    message: Json = {
        "id": str(UUID(int=rng.getrandbits(128), version=4)),
        "type": name,
        "aggregate_type": "account",
        "aggregate_id": account,
        "payload": payload,
    }
    if rng.random() < 0.5:
        message["metadata"] = {"booked_on": rng.choice(DAYS)}
    if rng.random() < 0.1:
        message.setdefault("metadata", {})["correlation_id"] = f"order-{rng.randint(1, 99)}"
    if rng.random() < 0.1:
        message["expected_sequence"] = max(0, sequence - rng.randint(0, 1))
    if rng.random() < 0.02:
        return message | {"type": "CloseAccount"}
    if rng.random() < 0.02:
        return message | {"payload": payload | {"note": "unknown"}}
    return message


class Sender(threading.Thread):
    """Another service: sends random commands, each again until it is answered, and notes it all.

    It has a bounded number in flight. A batch that was not confirmed is sent
    again before anything else. Of what is not answered for long it sends again
    only what `to_send_again` names, else it would cover up what is lost; in the
    order in which that was first sent, so it keeps its side of the ordering promise.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        service: str,
        connect: Callable[[str], Outside],
        to_send_again: Callable[[dict[str, float]], set[str]],
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.sent: list[Sent] = []
        self.replies: list[Reply] = []
        self.in_flight: dict[str, float] = {}
        self._messages: dict[str, Json] = {}
        self._sequences: dict[str, int] = {}
        self._looked = 0.0
        self._told: set[bytes] = set()
        self._answered: dict[str, None] = {}
        self._unconfirmed: list[Json] = []
        self._rng = random.Random(seed)
        self._connect, self._service = connect, service
        self._to_send_again = to_send_again
        self._pause_seconds = pause_seconds
        self._outside: Outside | None = None
        self._ended = threading.Event()

    def end(self) -> None:
        """Begin nothing new; the thread ends once everything is answered."""
        self._ended.set()

    def unanswered(self) -> set[str]:
        """Return the ids of what waits for an outcome."""
        return set(self.in_flight.copy())

    def run(self) -> None:
        """Send and listen until the end."""
        while self.in_flight or self._unconfirmed or not self._ended.is_set():
            try:
                self._once()
            except (OSError, redis.RedisError, amqp.AMQPError):
                self._hang_up()
            time.sleep(self._pause_seconds)
        self._hang_up()

    def _hang_up(self) -> None:
        outside, self._outside = self._outside, None
        with suppress(OSError, redis.RedisError, amqp.AMQPError):
            if outside is not None:
                outside.hang_up()

    def _once(self) -> None:
        if self._outside is None:
            self._outside = self._connect(self.name)
        self._send(self._outside, self._unconfirmed or self._late() or self._new())
        for outcome in self._outside.replies(self._service, self.name):
            self._note(outcome)

    def _send(self, outside: Outside, batch: list[Json]) -> None:
        self._unconfirmed = batch
        began, accepted = time.monotonic(), None
        for message in batch:
            if message["id"] not in self._answered:
                self.in_flight[message["id"]] = began
        try:
            if batch:
                outside.send(self._service, batch)
                accepted = time.monotonic()
        finally:
            self.sent += [Sent(self.name, message, began, accepted) for message in batch]
        self._unconfirmed = []

    def _late(self) -> list[Json]:
        """Return what is to be sent again, when anything is in flight for too long."""
        now = time.monotonic()
        if now < self._looked + PATIENCE_SECONDS or not self.in_flight:
            return []
        self._looked = now
        late = {i: since for i, since in self.in_flight.items() if now - since > PATIENCE_SECONDS}
        again = self._to_send_again(late) if late else set[str]()
        return [self._messages[command_id] for command_id in late if command_id in again]

    def _new(self) -> list[Json]:
        if self._ended.is_set() or len(self.in_flight) > IN_FLIGHT - BATCH:
            return []
        return [self._command() for _ in range(self._rng.randint(1, BATCH))]

    def _command(self) -> Json:
        """Write a new command, or an answered one again, or its id with another content."""
        rng = self._rng
        if self._answered and rng.random() < 0.03:
            again = self._messages[rng.choice(list(self._answered))]
            return again | ({"payload": {"amount": "1"}} if rng.random() < 0.3 else {})
        account = f"A-{rng.randrange(ACCOUNTS)}"
        other = NEVER_OPENED if rng.random() < 0.1 else f"A-{rng.randrange(ACCOUNTS)}"
        message = random_command(rng, account, self._sequences.get(account, 0), other)
        self._messages[message["id"]] = message | {"reply_to": self.name}
        return self._messages[message["id"]]

    def _note(self, outcome: Json) -> None:
        text = orjson.dumps(outcome)
        if text in self._told:
            return  # the same entry of the stream as before
        self._told.add(text)
        self.replies.append(Reply(outcome, time.monotonic()))
        self.in_flight.pop(outcome["command_id"], None)
        self._answered[outcome["command_id"]] = None
        if outcome["sequence"] is not None:
            self._sequences[outcome["aggregate_id"]] = outcome["sequence"]
