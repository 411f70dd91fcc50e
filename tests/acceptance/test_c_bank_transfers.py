"""The bank's transfers, IBANs and statement: what events and clocks cause in it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import Elapsed, Refused, cancel, later, send
from cqrs_es.settings import Settings
from cqrs_es.testing import Scenario, TestApp
from cqrs_es.testing.clock import START, FakeClock
from domain.account import (
    AccountNotOpen,
    AccountOpened,
    AssignIban,
    BankAccount,
    CustomerDepositedMoney,
    CustomerReceivedMoney,
    CustomerSentMoney,
    DepositMoney,
    FundsNotAvailable,
    IbanAssigned,
    OpenAccount,
    ReceiveTransfer,
    SameAccount,
    TakeTransferBack,
    TransferCameBack,
    TransferMoney,
)
from domain.statement import Statement, StatementDrawn
from domain.transfer import (
    DEADLINE,
    TOO_LONG,
    Transfer,
    TransferBegan,
    TransferDelayed,
    TransferEnded,
    TransferRefused,
)
from projectors.account_query import AccountQuery, LedgerEntry
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

D = Decimal
IBAN = "DE89370400440532013000"
NOBODY: Any = None  # no case here asks a cash machine or the check register

opened = Scenario(BankAccount, NOBODY).given(AccountOpened("ada"))
with_200 = opened.and_(CustomerDepositedMoney(D(200), D(200)))
begun = Scenario(Transfer).given(TransferBegan("ada", "ben", D(50)))


# --- An account's part -------------------------------------------------------


def test_money_that_is_sent_has_left() -> None:
    """What is sent is no longer there, in the one decision that also checks that it was."""
    decision = with_200.when(TransferMoney("ben", D(50)))
    decision.then_expect_events(CustomerSentMoney("ada", "ben", D(50), D(150)))
    with_200.when(TransferMoney("ben", D(201))).then_expect_error(FundsNotAvailable)
    with_200.when(TransferMoney("ada", D(1))).then_expect_error(SameAccount)


def test_money_is_received_or_taken_back_by_an_open_account() -> None:
    """An account that nobody has opened takes in nothing."""
    received = opened.when(ReceiveTransfer("ben", D(5)))
    received.then_expect_events(CustomerReceivedMoney("ben", D(5), D(5)))
    back = opened.when(TakeTransferBack("ben", D(5)))
    back.then_expect_events(TransferCameBack("ben", D(5), D(5)))
    nowhere = Scenario(BankAccount, NOBODY).given_no_previous_events()
    nowhere.when(ReceiveTransfer("ben", D(5))).then_expect_error(AccountNotOpen)


def test_an_iban_is_kept_in_one_spelling() -> None:
    """Spaces and small letters do not count; the same again changes nothing."""
    opened.when(AssignIban("de89 3704 0044 0532 0130 00")).then_expect_events(IbanAssigned(IBAN))
    opened.and_(IbanAssigned(IBAN)).when(AssignIban(IBAN)).then_expect_events()


@pytest.mark.parametrize("iban", ["", "DE88370400440532013000", "DE89", "89DE3704", "DE89é7040044"])
def test_what_is_no_iban_is_refused(iban: str) -> None:
    """The field is named; a mistyped digit is found by the check digits."""
    with pytest.raises(ValueError, match="iban: "):
        AssignIban(iban)


# --- The process -------------------------------------------------------------


def test_a_transfer_sends_the_money_on() -> None:
    """It begins with money that has left, and sets a time for it to arrive."""
    started = Scenario(Transfer).given_no_previous_events()
    decision = started.when(CustomerSentMoney("ada", "ben", D(50), D(150)))
    decision.then_expect_events(TransferBegan("ada", "ben", D(50)))
    decision.then_expect_commands(send(BankAccount, "ben", ReceiveTransfer("ada", D(50))))
    decision.then_expect_timers(later(DEADLINE, after=TOO_LONG))


def test_a_transfer_ends_when_the_money_is_there() -> None:
    """Its deadline ends with it."""
    decision = begun.when(CustomerReceivedMoney("ada", D(50), D(50)))
    decision.then_expect_events(TransferEnded(arrived=True)).then_expect_timers(cancel(DEADLINE))


def test_refused_money_goes_back() -> None:
    """The account that it came from takes it in again, and then it is over."""
    decision = begun.when(Refused(ReceiveTransfer("ada", D(50)), "account_not_open", ""))
    decision.then_expect_events(TransferRefused("account_not_open"))
    decision.then_expect_commands(send(BankAccount, "ada", TakeTransferBack("ben", D(50))))
    refused = begun.and_(TransferRefused("account_not_open"))
    back = refused.when(TransferCameBack("ben", D(50), D(200)))
    back.then_expect_events(TransferEnded(arrived=False)).then_expect_timers(cancel(DEADLINE))


def test_what_takes_too_long_is_noted_and_not_guessed_at() -> None:
    """Money that may still arrive does not go back."""
    decision = begun.when(Elapsed(DEADLINE, START, START + TOO_LONG))
    decision.then_expect_events(TransferDelayed("too_long")).then_expect_commands()
    stuck = begun.when(Refused(TakeTransferBack("ben", D(50)), "dropped", ""))
    stuck.then_expect_events(TransferDelayed("dropped"))


# --- The bank as a whole -----------------------------------------------------


@pytest.fixture
async def bank(store_url: str) -> AsyncIterator[TestApp]:
    async with TestApp(app, settings=Settings(store_url=store_url)) as bank:
        for account in ("ada", "ben"):
            await bank.send(BankAccount, account, OpenAccount(account))
        await bank.send(BankAccount, "ada", DepositMoney(D(200)))
        yield bank


async def balance(bank: TestApp, account: str) -> Decimal:
    return (await bank.opened.load(BankAccount, account)).state.balance


async def test_c13_c14_money_arrives_or_comes_back(bank: TestApp) -> None:
    """C13, C14: no money comes or goes; both statements say where it went."""
    arrived = await bank.send(BankAccount, "ada", TransferMoney("ben", D("49.50")))
    returned = await bank.send(BankAccount, "ada", TransferMoney("nobody", D(100)))
    await bank.drain()
    assert await balance(bank, "ada") == D("150.50")
    assert await balance(bank, "ben") == D("49.50")
    ends = [(await bank.events(Transfer, each.command_id))[-1] for each in (arrived, returned)]
    assert [end.data for end in ends] == [TransferEnded(arrived=True), TransferEnded(arrived=False)]
    ada, ben = await bank.view(AccountQuery, "ada"), await bank.view(AccountQuery, "ben")
    assert ada is not None
    assert ben is not None
    assert set(map(str, ada.ledger[1:])) == {
        str(LedgerEntry("transfer to ben", D("49.50"))),
        str(LedgerEntry("transfer to nobody", D(100))),
        str(LedgerEntry("returned by nobody", D(100))),
    }
    assert ben.ledger == [LedgerEntry("transfer from ada", D("49.50"))]
    assert (ada.balance, ben.balance) == (D("150.50"), D("49.50"))
    if bank.opened.storage.views.sql is not None:
        ((held,),) = await bank.query("SELECT SUM(held_cents) FROM bank_totals")
        assert int(str(held)) == 20_000
    await bank.advance(timedelta(hours=2))
    assert len(await bank.events(Transfer, arrived.command_id)) == 2


async def test_c15_an_iban_has_one_account(bank: TestApp) -> None:
    """C15: the second account that wants it is refused, until the first has another one."""
    assert (await bank.send(BankAccount, "ada", AssignIban(IBAN))).accepted
    taken = await bank.send(BankAccount, "ben", AssignIban(IBAN))
    assert taken.error is not None
    assert taken.error.code == "iban_taken"
    assert await bank.opened.find(BankAccount, iban=IBAN) == "ada"
    assert (await bank.send(BankAccount, "ada", AssignIban("GB82WEST12345698765432"))).accepted
    assert (await bank.send(BankAccount, "ben", AssignIban(IBAN))).accepted
    assert await bank.opened.find(BankAccount, iban=IBAN) == "ben"


async def test_a_statement_is_drawn_each_month() -> None:
    """On the first at six, with what is in the accounts then."""
    clock = FakeClock(datetime(2026, 11, 29, tzinfo=UTC))
    async with TestApp(app, clock=clock) as bank:
        for account, amount in (("ada", 200), ("ben", 50)):
            await bank.send(BankAccount, account, OpenAccount(account))
            await bank.send(BankAccount, account, DepositMoney(D(amount)))
        await bank.drain()
        await bank.advance(timedelta(days=2, hours=6))
        await bank.advance(timedelta(days=31))
        drawn = [event.data for event in await bank.events(Statement, "bank")]
    first = StatementDrawn(date(2026, 12, 1), 2, D(250))
    assert drawn == [first, StatementDrawn(date(2027, 1, 1), 2, D(250))]
