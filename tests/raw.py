"""Command messages as other services write them: raw JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cqrs_es.types import new_command_id

if TYPE_CHECKING:
    from cqrs_es import Outcome
    from cqrs_es.testing import TestApp


def raw(name: str, payload: Any = None, /, **fields: Any) -> dict[str, Any]:
    """Make a message for account A-1 that replies to the test; `fields` replace its own."""
    message: dict[str, Any] = {
        "id": new_command_id(),
        "type": name,
        "aggregate_type": "account",
        "aggregate_id": "A-1",
        "payload": {} if payload is None else payload,
        "reply_to": "test-app",
    }
    return message | fields


async def sent(t: TestApp, message: dict[str, Any]) -> Outcome:
    """Enqueue a message and return its outcome."""
    await t.enqueue(orjson.dumps(message))
    return await t.reply(message["id"].lower())


def opened(account: str = "A-1") -> dict[str, Any]:
    """Make the message that opens an account."""
    return raw("OpenAccount", {"account_id": account}, aggregate_id=account)


def deposit(amount: Any, **fields: Any) -> dict[str, Any]:
    """Make a deposit."""
    return raw("DepositMoney", {"amount": amount}, **fields)
