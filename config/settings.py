"""The bank's own settings, beside the framework's `CQRS_ES_*`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cqrs_es import errors


@dataclass(frozen=True, slots=True)
class BankSettings:
    """How long the bank waits for the systems it asks, in seconds."""

    atm_seconds: float = 5.0
    check_seconds: float = 5.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read `BANK_ATM_SECONDS` and `BANK_CHECK_SECONDS`; raise `SettingsError`."""
        return cls(
            atm_seconds=_seconds(environment, "BANK_ATM_SECONDS", cls().atm_seconds),
            check_seconds=_seconds(environment, "BANK_CHECK_SECONDS", cls().check_seconds),
        )


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds > 0:
        return seconds
    message = f"{name} must be a number of seconds above 0, not {text!r}"
    raise errors.SettingsError(message)
