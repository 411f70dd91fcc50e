"""DynamoDB, through aiobotocore: one table, written to in conditional transactions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit

from cqrs_es import errors
from cqrs_es.ports.clock import SystemClock
from cqrs_es.stores.dynamodb.storage import DynamoStorage
from cqrs_es.stores.dynamodb.table import Table, Target

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock

TABLE_SUFFIX: Final = "-store"
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_REGION: Final = re.compile(r"[a-z0-9-]{1,40}")
_ENDPOINT: Final = re.compile(r"https?://[^\s/?#@]+/?")
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
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise errors.SettingsError(_BAD_URL) from None
    region, prefix = parts.netloc, parts.path.removeprefix("/")
    endpoint = options.pop("endpoint", None)
    if not (_REGION.fullmatch(region) and _PREFIX.fullmatch(prefix)) or options:
        raise errors.SettingsError(_BAD_URL)
    if endpoint is not None and not _ENDPOINT.fullmatch(endpoint):
        raise errors.SettingsError(_BAD_URL)
    return Target(region=region, table=prefix + TABLE_SUFFIX, endpoint=endpoint)
