"""The rules of `domain/account.py` for a row of `accounts`, and the tables.

Each command is one transaction: the account's row is locked and changed, the event goes to the
outbox, and the command's id with its outcome to `processed`, where a second one fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from domain.money import check_amount

if TYPE_CHECKING:
    from collections.abc import Mapping

TABLES: Final = (
    """
    CREATE TABLE accounts (
        id VARCHAR(64) PRIMARY KEY, balance DECIMAL(20, 2) NOT NULL
    )""",
    """
    CREATE TABLE processed (
        command_id CHAR(36) PRIMARY KEY, rejected VARCHAR(200),
        at TIMESTAMP(6) NOT NULL DEFAULT CURRENT_TIMESTAMP(6)
    )""",
    """
    CREATE TABLE outbox (
        id BIGINT PRIMARY KEY AUTO_INCREMENT, account_id VARCHAR(64) NOT NULL,
        type VARCHAR(64) NOT NULL, payload TEXT NOT NULL
    )""",
)


class RuleError(Exception):
    """The bank says no."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to an account, and what is in it now."""

    type: str
    payload: dict[str, str]
    balance: Decimal


def decide(kind: str, payload: Mapping[str, Any], balance: Decimal | None) -> Event:
    """Decide a command on an account's balance, None where it is not open; or raise `RuleError`."""
    if kind == "OpenAccount":
        if balance is not None:
            raise RuleError("account already open")
        return Event("AccountOpened", {"account_id": payload["account_id"]}, Decimal(0))
    amount = Decimal(payload["amount"])
    check_amount(amount)
    if balance is None:
        raise RuleError("account not open")
    if kind == "DepositMoney":
        return _event("CustomerDepositedMoney", payload, balance + amount)
    if amount > balance:
        raise RuleError("funds not available")
    if kind == "WithdrawMoney":
        return _event("CustomerWithdrewCash", payload, balance - amount)
    return _event("CustomerWroteCheck", payload, balance - amount)


def _event(name: str, payload: Mapping[str, Any], balance: Decimal) -> Event:
    return Event(name, {**payload, "balance": str(balance)}, balance)
