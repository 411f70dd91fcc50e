"""The bank, case by case (C1–C12)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import DomainError, Envelope, errors
from cqrs_es.definitions import define_aggregate, define_view
from cqrs_es.testing import Scenario
from domain.account import (
    AccountAlreadyOpen,
    AccountNotOpen,
    AccountOpened,
    AtmRuleViolation,
    BankAccount,
    CheckInvalid,
    Command,
    CustomerDepositedMoney,
    CustomerWithdrewCash,
    CustomerWroteCheck,
    DepositMoney,
    Event,
    FundsNotAvailable,
    OpenAccount,
    Services,
    WithdrawMoney,
    WriteCheck,
)
from projectors.account_query import AccountQuery

if TYPE_CHECKING:
    from collections.abc import Sequence

D = Decimal
BANK = define_aggregate(BankAccount)


@dataclass
class Others:
    """The systems that the bank asks; each agrees unless it is told what to say instead."""

    atm_says: DomainError | None = None
    checks_say: DomainError | None = None

    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None:
        assert (atm_id, amount) == ("ATM-1", D(100)), "the account passes on what it was told"
        if self.atm_says:
            raise self.atm_says

    async def validate_check(self, account_id: str, check_number: str) -> None:
        assert (account_id, check_number) == ("ACCT-001", "1170")
        if self.checks_say:
            raise self.checks_say


def bank(services: Services | None = None) -> Scenario[Command, Event, Services]:
    return Scenario(BankAccount, services or Others())


def opened(services: Services | None = None) -> Scenario[Command, Event, Services]:
    return bank(services).given(AccountOpened("ACCT-001"))


def with_200(services: Services | None = None) -> Scenario[Command, Event, Services]:
    return opened(services).and_(CustomerDepositedMoney(D(200), D(200)))


# --- Deciding ----------------------------------------------------------------


def test_an_account_is_opened() -> None:
    """Opening is what happens first, and makes an account with nothing in it."""
    (
        bank()
        .given_no_previous_events()
        .when(OpenAccount("ACCT-001"))
        .then_expect_events(AccountOpened("ACCT-001"))
        .then_expect_state(BankAccount("ACCT-001", D(0)))
    )


def test_c1_a_deposit_raises_the_balance() -> None:
    """C1: deposit 200."""
    (
        opened()
        .when(DepositMoney(D(200)))
        .then_expect_events(CustomerDepositedMoney(D(200), D(200)))
        .then_expect_state(BankAccount("ACCT-001", D(200)))
    )


def test_c2_a_second_deposit_adds_to_the_first() -> None:
    """C2: balance 200, deposit 200."""
    with_200().when(DepositMoney(D(200))).then_expect_events(CustomerDepositedMoney(D(200), D(400)))


def test_c3_cash_lowers_the_balance() -> None:
    """C3: balance 200, withdraw 100."""
    with_200().when(WithdrawMoney(D(100), "ATM-1")).then_expect_events(
        CustomerWithdrewCash(D(100), D(100))
    )


def test_c4_the_atm_may_refuse() -> None:
    """C4: the ATM service refuses."""
    decision = with_200(Others(atm_says=AtmRuleViolation())).when(WithdrawMoney(D(100), "ATM-1"))
    decision.then_expect_error(AtmRuleViolation).then_expect_error_message("atm rule violation")
    assert AtmRuleViolation.code == "atm_rule_violation"


def test_c5_money_that_is_not_there_is_not_paid_out() -> None:
    """C5: withdraw 200 of 0; no cash machine is asked."""
    nobody = Others(atm_says=AtmRuleViolation())
    decision = opened(nobody).when(WithdrawMoney(D(200), "ATM-1"))
    decision.then_expect_error(FundsNotAvailable).then_expect_error_message("funds not available")


def test_c6_a_check_lowers_the_balance() -> None:
    """C6: balance 200, check 1170 of 100."""
    with_200().when(WriteCheck("1170", D(100))).then_expect_events(
        CustomerWroteCheck("1170", D(100), D(100))
    )


def test_c7_a_check_may_be_invalid() -> None:
    """C7: the check service refuses."""
    decision = with_200(Others(checks_say=CheckInvalid())).when(WriteCheck("1170", D(100)))
    decision.then_expect_error(CheckInvalid()).then_expect_error_message("check invalid")


def test_c8_a_check_is_covered() -> None:
    """C8: check 1170 of 100 on 0."""
    decision = opened().when(WriteCheck("1170", D(100)))
    decision.then_expect_error(FundsNotAvailable).then_expect_error_message("funds not available")


@pytest.mark.parametrize(
    "command", [DepositMoney(D(1)), WithdrawMoney(D(1), "ATM-1"), WriteCheck("1170", D(1))]
)
def test_c9_no_money_moves_before_the_account_is_open(command: Command) -> None:
    """C9: not opened, any money command."""
    decision = bank().given_no_previous_events().when(command)
    decision.then_expect_error(AccountNotOpen).then_expect_error_message("account not open")


def test_c10_an_account_is_opened_once() -> None:
    """C10: opened twice."""
    decision = opened().when(OpenAccount("ACCT-001"))
    decision.then_expect_error(AccountAlreadyOpen)
    decision.then_expect_error_message("account already open")


def test_the_last_cent_can_be_paid_out() -> None:
    """A balance may become 0, not less."""
    opened().and_(CustomerDepositedMoney(D(100), D(100))).when(
        WithdrawMoney(D(100), "ATM-1")
    ).then_expect_events(CustomerWithdrewCash(D(100), D(0)))


# --- Amounts -----------------------------------------------------------------

MONEY_COMMANDS: Sequence[tuple[str, dict[str, object]]] = [
    ("DepositMoney", {}),
    ("WithdrawMoney", {"atm_id": "ATM-1"}),
    ("WriteCheck", {"check_number": "1170"}),
]


def received(name: str, payload: dict[str, object]) -> Any:
    """Decode a command as it is when it comes from a sender."""
    return BANK.commands[name].decode(orjson.dumps(payload))


@pytest.mark.parametrize(("name", "rest"), MONEY_COMMANDS)
@pytest.mark.parametrize(
    ("amount", "reason"),
    [
        ("0", "more than 0"),
        ("0.00", "more than 0"),
        ("-0", "more than 0"),
        ("-1", "more than 0"),
        ("1.001", "at most 2 decimals"),
        ("1.000", "at most 2 decimals"),
        ("1000000000000.00", "at most 999999999999.99"),
        ("9" * 5000, "at most 999999999999.99"),
        ("NaN", "decimal number"),
        ("sNaN", "decimal number"),
        ("Infinity", "decimal number"),
        ("-Infinity", "decimal number"),
        ("1E+3", "decimal number"),
        ("1e3", "decimal number"),
        ("٣", "decimal number"),
        ("1_000", "decimal number"),
        (" 5 ", "decimal number"),
        ("+5", "decimal number"),
        (".5", "decimal number"),
        ("5.", "decimal number"),
        ("", "decimal number"),
        (True, "decimal number"),
        (5, "decimal number"),
        (5.0, "decimal number"),
        (None, "decimal number"),
        (["5"], "decimal number"),
        ({}, "decimal number"),
    ],
)
def test_c11_an_amount_that_is_none_is_refused(
    name: str, rest: dict[str, object], amount: object, reason: str
) -> None:
    """C11: the message names the field and the reason."""
    with pytest.raises(errors.InvalidCommand) as refused:
        received(name, {**rest, "amount": amount})
    assert refused.value.message.startswith("amount: ")
    assert reason in refused.value.message


@pytest.mark.parametrize(("name", "rest"), MONEY_COMMANDS)
@pytest.mark.parametrize("amount", ["0.01", "1", "1.5", "007.50", "999999999999.99"])
def test_c11_an_amount_is_taken_as_it_was_written(
    name: str, rest: dict[str, object], amount: str
) -> None:
    """C11: more than 0, at most 999999999999.99, up to 2 decimals."""
    assert received(name, {**rest, "amount": amount}).amount == D(amount)


@pytest.mark.parametrize("amount", ["NaN", "sNaN", "-Infinity", "1E+3", "0E+3", "0", "1.001"])
def test_c11_code_in_the_same_process_is_held_to_the_same_rule(amount: str) -> None:
    """C11: a command with a bad amount can't even be made."""
    with pytest.raises(ValueError, match=r"^amount: must "):
        DepositMoney(D(amount))


def test_an_amount_that_is_missing_or_misspelt_is_named() -> None:
    """What a sender forgot or misspelt is named in the refusal."""
    with pytest.raises(errors.InvalidCommand, match="amount"):
        received("DepositMoney", {})
    with pytest.raises(errors.InvalidCommand, match="unknown field 'amonut'"):
        received("DepositMoney", {"amount": "1", "amonut": "1"})


# --- The view ----------------------------------------------------------------


def envelopes(*events: Event) -> list[Envelope[Event]]:
    return [
        Envelope(
            aggregate_type="account",
            aggregate_id="ACCT-001",
            sequence=sequence,
            data=event,
            event_type=type(event).__name__,
            event_version="1.0",
            recorded_at=datetime(2026, 11, 23, 7, tzinfo=UTC),
        )
        for sequence, event in enumerate(events, 1)
    ]


def test_c12_the_statement() -> None:
    """C12: open, deposit, withdraw, check → the row of `account_query`, byte by byte."""
    view = AccountQuery()
    for envelope in envelopes(
        AccountOpened("ACCT-001"),
        CustomerDepositedMoney(D(1000), D(1000)),
        CustomerWithdrewCash(D(400), D(600)),
        CustomerWroteCheck("1170", D("256.28"), D("343.72")),
    ):
        view.update(envelope)
    assert define_view(AccountQuery).state.encode(view) == (
        b'{"account_id":"ACCT-001","balance":"343.72","written_checks":["1170"],'
        b'"ledger":[{"description":"deposit","amount":"1000"},'
        b'{"description":"atm withdrawal","amount":"400"},'
        b'{"description":"1170","amount":"256.28"}]}'
    )
