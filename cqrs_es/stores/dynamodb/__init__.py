"""DynamoDB, through aiobotocore: one table, written to in conditional transactions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.aws import place_of
from cqrs_es.ports.clock import SystemClock
from cqrs_es.stores.dynamodb.storage import DynamoStorage
from cqrs_es.stores.dynamodb.table import Table, Target

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock

TABLE_SUFFIX: Final = "-store"
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_BAD_URL: Final = (
    "a DynamoDB URL is dynamodb://region/prefix, such as dynamodb://eu-central-1/bank;"
    " add ?endpoint=http://host:port for a server of your own. Credentials come from where"
    " AWS programs look for them, never from the URL"
)


def connect(url: str, *, clock: Clock | None, lease_seconds: float) -> DynamoStorage:
    """Make the storage that a URL names: `dynamodb://region/prefix?endpoint=…`.

    `clock` tells how long a lease has been seen unchanged.
    """
    del lease_seconds  # nothing is locked
    return DynamoStorage(Table(target_of(url)), clock or SystemClock())


def target_of(url: str) -> Target:
    """Read a URL; raise `SettingsError` for one that names no region or prefix."""
    try:
        place = place_of(url, _PREFIX)
    except ValueError:
        raise errors.SettingsError(_BAD_URL) from None
    return Target(place.region, place.prefix + TABLE_SUFFIX, place.endpoint)
