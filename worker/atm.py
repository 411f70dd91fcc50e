"""Cash machines, as the bank calls them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from domain.account import AtmRuleViolation

if TYPE_CHECKING:
    from decimal import Decimal


class AtmNetwork(Protocol):
    """The system that runs the cash machines."""

    async def dispense(self, atm_id: str, amount: Decimal, *, idempotency_key: str) -> bool:
        """Give money out, at most once for each key; say whether that was allowed."""
        ...


class ObligingAtmNetwork:
    """The happy path: every machine has every amount and gives it to everybody."""

    async def dispense(self, atm_id: str, amount: Decimal, *, idempotency_key: str) -> bool:  # noqa: ARG002
        """Allow it."""
        return True


@dataclass(frozen=True, slots=True)
class Atm:
    """The cash machines for one command, whose id is the idempotency key."""

    network: AtmNetwork
    idempotency_key: str
    seconds: float

    async def withdraw(self, atm_id: str, amount: Decimal) -> None:
        """Give money out; raise `AtmRuleViolation` when refused.

        Raises `TimeoutError` when there is no answer in time: the command is
        then tried again, with the same key.
        """
        async with asyncio.timeout(self.seconds):
            allowed = await self.network.dispense(
                atm_id, amount, idempotency_key=self.idempotency_key
            )
        if not allowed:
            raise AtmRuleViolation
