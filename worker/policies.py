"""The bank's numbers: how often to snapshot, how long to wait.

How often a failed call is tried again is not among them: the framework tries
the whole command again, and the idempotency key makes that safe. How often it
does, `Application("bank", retries=Retries({…}))` would say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.aggregate import SnapshotEvery

if TYPE_CHECKING:
    from config.settings import BankSettings

# An account of a hundred events loads in under a millisecond without a snapshot.
SNAPSHOTS: Final = SnapshotEvery(100)
# What a handler may take beside its one call to another system.
OWN_SECONDS: Final = 1.0
# Reading a page of 500 accounts takes some milliseconds: enough for a few million.
STATEMENT_SECONDS: Final = 300.0


def handler_timeout(settings: BankSettings) -> float:
    """Return a command's deadline: late enough that a call's own deadline passes first."""
    return max(settings.atm_seconds, settings.check_seconds) + OWN_SECONDS
