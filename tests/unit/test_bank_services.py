"""The bank's calls to other systems: a deadline, an idempotency key, and a happy path."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from decimal import Decimal

import pytest

from config.settings import BankSettings
from cqrs_es import CommandContext, errors
from domain.account import AtmRuleViolation, CheckInvalid, Services
from worker import policies
from worker.app import app, services_for, settings
from worker.atm import Atm, ObligingAtmNetwork
from worker.checks import Checks, ObligingCheckRegister

KEY = "0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f"


@dataclass
class OtherSystem:
    """Both other systems at once; notes its calls, and says what it is told to."""

    says: bool = True
    calls: list[tuple[object, ...]] = field(default_factory=list[tuple[object, ...]])

    async def dispense(self, atm_id: str, amount: Decimal, *, idempotency_key: str) -> bool:
        self.calls.append((atm_id, amount, idempotency_key))
        return self.says

    async def redeem(self, account_id: str, check_number: str, *, idempotency_key: str) -> bool:
        self.calls.append((account_id, check_number, idempotency_key))
        return self.says


class SilentSystem:
    """Never answers."""

    async def dispense(self, atm_id: str, amount: Decimal, *, idempotency_key: str) -> bool:
        del atm_id, amount, idempotency_key
        return await asyncio.Future[bool]()

    async def redeem(self, account_id: str, check_number: str, *, idempotency_key: str) -> bool:
        del account_id, check_number, idempotency_key
        return await asyncio.Future[bool]()


async def test_the_command_id_is_the_idempotency_key() -> None:
    """A command that is handled twice asks twice, with one key."""
    system = OtherSystem()
    await Atm(system, KEY, 5.0).withdraw("ATM-1", Decimal(100))
    await Checks(system, KEY, 5.0).validate("ACCT-001", "1170")
    assert system.calls == [("ATM-1", Decimal(100), KEY), ("ACCT-001", "1170", KEY)]


async def test_a_refusal_is_the_domains_own_error() -> None:
    """C4, C7: the sender is told by code."""
    system = OtherSystem(says=False)
    with pytest.raises(AtmRuleViolation):
        await Atm(system, KEY, 5.0).withdraw("ATM-1", Decimal(100))
    with pytest.raises(CheckInvalid):
        await Checks(system, KEY, 5.0).validate("ACCT-001", "1170")


async def test_silence_is_no_refusal() -> None:
    """The command is tried again: the money may be out already."""
    with pytest.raises(TimeoutError):
        await Atm(SilentSystem(), KEY, 0.001).withdraw("ATM-1", Decimal(100))
    with pytest.raises(TimeoutError):
        await Checks(SilentSystem(), KEY, 0.001).validate("ACCT-001", "1170")


async def test_the_happy_path_is_built_in() -> None:
    """The bank runs without any other system, and `services_for` is what accounts ask for."""
    await Atm(ObligingAtmNetwork(), KEY, 5.0).withdraw("ATM-1", Decimal(100))
    await Checks(ObligingCheckRegister(), KEY, 5.0).validate("ACCT-001", "1170")
    services: Services = services_for(CommandContext(KEY, "account", "ACCT-001"))
    await services.atm_withdrawal("ATM-1", Decimal(100))
    await services.validate_check("ACCT-001", "1170")


def test_a_calls_own_deadline_passes_before_the_commands() -> None:
    """Else the log would say that the handler was slow, not who did not answer."""
    for given in (settings, BankSettings(atm_seconds=30.0), BankSettings(check_seconds=30.0)):
        assert policies.handler_timeout(given) > max(given.atm_seconds, given.check_seconds)
    account = app.registry.aggregates["account"]
    assert account.handler_timeout == policies.handler_timeout(settings)
    assert account.source == policies.SNAPSHOTS


def test_settings_come_from_the_environment() -> None:
    """With defaults for what is not set."""
    assert BankSettings.from_environment({}) == BankSettings()
    given = {"BANK_ATM_SECONDS": "2.5", "BANK_CHECK_SECONDS": "7"}
    assert BankSettings.from_environment(given) == BankSettings(2.5, 7.0)
    assert BankSettings.from_environment({"BANK_HTTP_VIA": "queue"}).http_via == "queue"
    with pytest.raises(errors.SettingsError, match="BANK_HTTP_VIA must be store or queue"):
        BankSettings.from_environment({"BANK_HTTP_VIA": "Queue"})


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_setting_that_cant_be_used_is_named(text: str) -> None:
    """Before anything is done."""
    with pytest.raises(errors.SettingsError, match="BANK_CHECK_SECONDS must be a number"):
        BankSettings.from_environment({"BANK_CHECK_SECONDS": text})
