"""The real transactions of a bank, with the bank's own balances as an oracle."""

from __future__ import annotations

import csv
import os
from decimal import Decimal
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent


def bank_folder() -> Path:
    """Return the folder with the data, from `BANK_DATA`; skip the test without it."""
    folder = Path(os.environ.get("BANK_DATA", PROJECT / "../shared/data/bank")).resolve()
    if not (folder / "commands.jsonl").exists():
        pytest.skip(f"no bank data in {folder}; set BANK_DATA")
    return folder


def bank_balances(folder: Path) -> dict[str, Decimal]:
    """Return the balance that the bank recorded for each account."""
    with (folder / "balances.csv").open() as file:
        return {row["account_id"]: Decimal(row["balance"]) for row in csv.DictReader(file)}
