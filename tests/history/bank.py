"""The bank's rules once more, in the plainest way, to judge what the service decided.

Written from the contract and the rules, not from the service's code, and without
any of it: only so does an agreement of the two mean something.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

Json = dict[str, Any]

FIELDS = {
    "OpenAccount": {"account_id"},
    "DepositMoney": {"amount"},
    "WithdrawMoney": {"amount", "atm_id"},
    "WriteCheck": {"check_number", "amount"},
    "TransferMoney": {"to_account", "amount"},
    "AssignIban": {"iban"},
}
CHANGES = {
    "CustomerDepositedMoney": ("deposit", +1),
    "CustomerWithdrewCash": ("atm withdrawal", -1),
    "CustomerWroteCheck": ("{check_number}", -1),
    "CustomerSentMoney": ("transfer to {to_account}", -1),
    "CustomerReceivedMoney": ("transfer from {from_account}", +1),
    "TransferCameBack": ("returned by {to_account}", +1),
}
UNKNOWN = ("unknown", 0)
COLUMNS = {
    "CustomerDepositedMoney": "deposits_cents",
    "CustomerWithdrewCash": "withdrawals_cents",
    "CustomerWroteCheck": "checks_cents",
}
MOST = Decimal("999999999999.99")


@dataclass(frozen=True, slots=True)
class Account:
    """What an account is after some of its events."""

    sequence: int = 0
    opened_as: str | None = None
    balance: Decimal = Decimal(0)
    iban: str | None = None

    def after(self, event_type: str, payload: Json) -> Account:
        """Follow one event, adding amounts up: the balance that it states is not believed."""
        if event_type == "AccountOpened":
            opened = replace(self, opened_as=payload["account_id"])
            return replace(opened, sequence=self.sequence + 1)
        if event_type == "IbanAssigned":
            return replace(self, iban=payload["iban"], sequence=self.sequence + 1)
        _, sign = CHANGES.get(event_type, UNKNOWN)
        balance = self.balance + sign * Decimal(payload.get("amount", 0))
        return replace(self, balance=balance, sequence=self.sequence + 1)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What has to become of a command; `loaded` is whether its account is looked at for that.

    Where `or_code` is given it may be rejected with that instead: other accounts decide that.
    """

    status: str
    code: str | None = None
    events: tuple[tuple[str, Json], ...] = ()
    loaded: bool = True
    or_code: str | None = None


def without_account(message: Json) -> Verdict | None:
    """Judge what needs no account; None where it has to be looked at."""
    if message["aggregate_type"] != "account":
        return Verdict("failed", "unknown_aggregate_type", loaded=False)
    if message["type"] not in FIELDS:
        return Verdict("failed", "unknown_command", loaded=False)
    if not _is_valid(message["type"], message["payload"]):
        return Verdict("rejected", "invalid_command", loaded=False)
    return None


def verdict(message: Json, account: Account) -> Verdict:
    """Judge a command on an account as it stands."""
    if (early := without_account(message)) is not None:
        return early
    expected = message.get("expected_sequence")
    if expected is not None and expected != account.sequence:
        return Verdict("rejected", "conflict")
    payload = message["payload"]
    if message["type"] == "OpenAccount":
        if account.opened_as is not None:
            return Verdict("rejected", "account_already_open")
        return _accepted("AccountOpened", account_id=payload["account_id"])
    if account.opened_as is None:
        return Verdict("rejected", "account_not_open")
    if message["type"] == "AssignIban":
        if payload["iban"] == account.iban:
            return Verdict("accepted")
        assigned = _accepted("IbanAssigned", iban=payload["iban"])
        return replace(assigned, or_code="iban_taken")
    return _moved(message["type"], payload, account)


def _moved(command: str, payload: Json, account: Account) -> Verdict:
    amount = Decimal(payload["amount"])
    money = {"amount": amount, "balance": account.balance + amount}
    if command == "DepositMoney":
        return _accepted("CustomerDepositedMoney", **money)
    if payload.get("to_account") == account.opened_as:
        return Verdict("rejected", "same_account")
    if amount > account.balance:
        return Verdict("rejected", "funds_not_available")
    money["balance"] = account.balance - amount
    if command == "WithdrawMoney":
        return _accepted("CustomerWithdrewCash", **money)
    if command == "TransferMoney":
        ends = {"from_account": account.opened_as, "to_account": payload["to_account"]}
        return _accepted("CustomerSentMoney", **ends, **money)
    return _accepted("CustomerWroteCheck", check_number=payload["check_number"], **money)


def _accepted(event_type: str, **payload: Any) -> Verdict:
    return Verdict("accepted", events=((event_type, payload),))


def _is_valid(command: str, payload: Json) -> bool:
    if set(payload) != FIELDS[command] or not all(isinstance(v, str) for v in payload.values()):
        return False
    text = payload.get("amount", "1")
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text, re.ASCII):
        return False
    _, _, decimals = text.partition(".")
    return len(decimals) <= 2 and 0 < Decimal(text) <= MOST


def read_event(payload: Json) -> Json:
    """Return an event's payload with its money as numbers: 5 and 5.00 are the same amount."""
    return {k: Decimal(v) if k in {"amount", "balance"} else v for k, v in payload.items()}


# --- Views -------------------------------------------------------------------------


def statement(events: list[tuple[str, Json]]) -> Json:
    """Fold one account's events, given by type and payload, to its row of `account_query`."""
    row: Json = {
        "account_id": None,
        "balance": Decimal(0),
        "written_checks": list[str](),
        "ledger": list[Json](),
    }
    for event_type, payload in events:
        if event_type == "AccountOpened":
            row["account_id"] = payload["account_id"]
            continue
        if event_type == "IbanAssigned":
            continue
        description, sign = CHANGES.get(event_type, UNKNOWN)
        if event_type == "CustomerWroteCheck":
            row["written_checks"].append(payload["check_number"])
        amount = Decimal(payload.get("amount", 0))
        row["ledger"].append({"description": description.format(**payload), "amount": amount})
        row["balance"] += sign * amount
    return row


def read_statement(payload: Json) -> Json:
    """Return a row of `account_query` with its money as numbers."""
    ledger = [entry | {"amount": Decimal(entry["amount"])} for entry in payload["ledger"]]
    return payload | {"balance": Decimal(payload["balance"]), "ledger": ledger}


def add_to_day(row: dict[str, int], event_type: str, payload: Json) -> None:
    """Count an event in its day's row of `bank_totals`."""
    if event_type == "AccountOpened":
        row["accounts"] += 1
    if event_type not in CHANGES:
        return
    cents = int(Decimal(payload["amount"]) * 100)
    if (column := COLUMNS.get(event_type)) is not None:
        row[column] += cents
    row["held_cents"] += CHANGES[event_type][1] * cents


EMPTY_DAY: dict[str, int] = dict.fromkeys(
    ("accounts", "deposits_cents", "withdrawals_cents", "checks_cents", "held_cents"), 0
)
