"""The bank's own settings, beside the framework's `CQRS_ES_*`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from cqrs_es import errors


@dataclass(frozen=True, slots=True)
class BankSettings:
    """How long the bank waits for the systems it asks, in seconds, and whom its gateway knows.

    `http_tokens` has the name of whoever shows a token; `http_via` says who decides what comes
    over HTTP, the gateway itself ("store") or the workers ("queue").
    """

    atm_seconds: float = 5.0
    check_seconds: float = 5.0
    http_tokens: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    http_via: Literal["store", "queue"] = "store"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read `BANK_ATM_SECONDS`, `BANK_CHECK_SECONDS`, `BANK_HTTP_TOKENS_FILE`, `BANK_HTTP_VIA`.

        The file has a name and a token on each line. Raises `SettingsError`.
        """
        return cls(
            atm_seconds=_seconds(environment, "BANK_ATM_SECONDS", cls().atm_seconds),
            check_seconds=_seconds(environment, "BANK_CHECK_SECONDS", cls().check_seconds),
            http_tokens=_tokens(environment.get("BANK_HTTP_TOKENS_FILE")),
            http_via=_via(environment.get("BANK_HTTP_VIA", "store")),
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


def _tokens(path: str | None) -> Mapping[str, str]:
    if path is None:
        return {}
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        tokens = {token: name for name, token in filter(None, lines)}
    except (OSError, ValueError) as exc:
        message = f"BANK_HTTP_TOKENS_FILE: {path!r} must have a name and a token on each line"
        raise errors.SettingsError(message) from exc
    if not tokens:
        raise errors.SettingsError(f"BANK_HTTP_TOKENS_FILE: {path!r} has no token")
    return tokens


def _via(text: str) -> Literal["store", "queue"]:
    match text:
        case "store" | "queue":
            return text
        case _:
            raise errors.SettingsError(f"BANK_HTTP_VIA must be store or queue, not {text!r}")
