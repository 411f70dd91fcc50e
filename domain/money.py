"""What an amount of money is."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

MAX_AMOUNT: Final = Decimal("999999999999.99")
MAX_DECIMALS: Final = 2


def check_amount(amount: Decimal, field: str = "amount") -> None:
    """Refuse what can't be paid in or out; raise `ValueError` naming the field and the reason."""
    reason = _why_not(amount)
    if reason is not None:
        message = f"{field}: {reason}"
        raise ValueError(message)


def _why_not(amount: Decimal) -> str | None:
    exponent = amount.as_tuple().exponent
    if not isinstance(exponent, int):  # NaN and infinities have a letter there
        return "must be a finite number"
    if exponent > 0:
        return "must be in plain notation, such as 1000, not 1E+3"
    if -exponent > MAX_DECIMALS:
        return f"must have at most {MAX_DECIMALS} decimals"
    if amount <= 0:
        return "must be more than 0"
    if amount > MAX_AMOUNT:
        return f"must be at most {MAX_AMOUNT}"
    return None
