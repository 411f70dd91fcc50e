"""The register of checks, as the bank calls it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from domain.account import CheckInvalid


class CheckRegister(Protocol):
    """The system that knows which checks were handed out to whom."""

    async def redeem(self, account_id: str, check_number: str, *, idempotency_key: str) -> bool:
        """Mark a check as used, by whoever gives the key first; say whether it was valid."""
        ...


class ObligingCheckRegister:
    """The happy path: every check is good."""

    async def redeem(self, account_id: str, check_number: str, *, idempotency_key: str) -> bool:  # noqa: ARG002
        """Accept it."""
        return True


@dataclass(frozen=True, slots=True)
class Checks:
    """The register for one command, whose id is the idempotency key."""

    register: CheckRegister
    idempotency_key: str
    seconds: float

    async def validate(self, account_id: str, check_number: str) -> None:
        """Have a check marked as used; raise `CheckInvalid` when it can't be.

        Raises `TimeoutError` when there is no answer in time: the command is
        then tried again, with the same key.
        """
        async with asyncio.timeout(self.seconds):
            valid = await self.register.redeem(
                account_id, check_number, idempotency_key=self.idempotency_key
            )
        if not valid:
            raise CheckInvalid
