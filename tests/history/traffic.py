"""Random commands for a bank, and senders that go on until each is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    import random

Json = dict[str, Any]

DAYS = [f"2026-11-{day:02}" for day in range(1, 10)]


def random_command(rng: random.Random, account: str, sequence: int) -> Json:
    """Write a command for an account that is thought to be at a sequence.

    Most will be accepted, some rejected for each of the reasons that there are,
    few fail.
    """
    name = rng.choice(["OpenAccount", *["DepositMoney"] * 5, *["WithdrawMoney"] * 3, "WriteCheck"])
    amount = f"{rng.randint(1, 20_000) / 100:.{rng.choice([0, 1, 2])}f}"
    if amount == "0" or rng.random() < 0.02:
        amount = rng.choice(["0", "-5", "0.001", "1E+3", "1000000000000"])
    payload = {
        "OpenAccount": {"account_id": account},
        "DepositMoney": {"amount": amount},
        "WithdrawMoney": {"amount": amount, "atm_id": f"ATM-{rng.randint(1, 9)}"},
        "WriteCheck": {"check_number": str(rng.randint(1000, 9999)), "amount": amount},
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
