"""A DynamoDB table as a store: making it, and what never changes in it."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import orjson

from cqrs_es import errors
from cqrs_es.ports.storage import Storage, check_service
from cqrs_es.ports.store import SECRET_BYTES, StoreInfo
from cqrs_es.stores.dynamodb import places
from cqrs_es.stores.dynamodb.actions import ABSENT, condition, delete, put, update
from cqrs_es.stores.dynamodb.dead_letters import DynamoDeadLetters
from cqrs_es.stores.dynamodb.events import DynamoEvents
from cqrs_es.stores.dynamodb.failures import ConditionFailed, foreign
from cqrs_es.stores.dynamodb.leases import DynamoLeases
from cqrs_es.stores.dynamodb.views import DynamoViews

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.clock import Clock
    from cqrs_es.stores.dynamodb.table import Table

RELAY_MARK: Final = "$relay"
SCHEMA_VERSION: Final = 1
MAX_PARTITIONS: Final = 40
"""A rebuild's switch holds two checkpoints of each, of the 100 items of a transaction."""
CREATE_SECONDS: Final = 120.0
"""AWS takes some ten seconds to make a table."""
_POLL_SECONDS: Final = 0.5


class DynamoStorage(Storage):
    """The events, views, leases and dead letters in one table."""

    def __init__(self, table: Table, clock: Clock) -> None:
        self._table = table
        self.events = DynamoEvents(table, clock.now)
        self.views = DynamoViews(table)
        self.leases = DynamoLeases(table, clock)
        self.dead_letters = DynamoDeadLetters(table)

    @property
    def shared(self) -> bool:
        """Always True."""
        return True

    def has_grown(self, record: Mapping[str, Any]) -> bool:
        """Tell whether a record of the table's stream is of the head of a partition of the log.

        Raises `ConfigurationError` for a record of another table.
        """
        source = str(record.get("eventSourceARN"))
        if f":table/{self._table.name}/stream/" not in source:
            message = (
                f"a record of {source}, but the store is the table {self._table.name}: map the"
                " function to that table's stream, or set CQRS_ES_STORE_URL to the other"
            )
            raise errors.ConfigurationError(message)
        return places.is_head(record["dynamodb"]["Keys"])

    async def open(self) -> None:
        """Connect. Raises `StoreUnavailable` when that can't be done now."""
        await self._table.open()

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        await self._table.close()

    async def initialise(
        self, partitions: int, *, service: str | None = None, new_epoch: bool = False
    ) -> StoreInfo:
        """Create the table, billed by request, and fix what never changes, idempotently."""
        if partitions > MAX_PARTITIONS:
            message = f"a store on DynamoDB has at most {MAX_PARTITIONS} partitions: a rebuild"
            raise errors.SettingsError(f"{message} switches with two items for each of them")
        await self._create_table()
        info = await self._fix_once(partitions, service)
        _check_schema(info.schema_version)
        check_service(info.service, service)
        if info.partitions != partitions:
            message = (
                f"the store has {info.partitions} partitions, not {partitions}:"
                " set CQRS_ES_PARTITIONS to that"
            )
            raise errors.PartitionsMismatch(message)
        if not info.secret:
            await self._add_secret()
        if new_epoch:
            await self._renew_epoch(partitions)
        if service is not None and info.service is None:
            await self._claim(service)
        return await self.info()

    async def info(self) -> StoreInfo:
        """Read what `initialise` fixed; raise `StoreNotInitialised`, `SchemaTooNew`."""
        found = await self._table.get(places.INFO)
        if found is None:
            raise errors.StoreNotInitialised
        info = _info_of(found)
        _check_schema(info.schema_version)
        if not info.secret:
            message = "the store is older than this program: run `cqrs-es init`"
            raise errors.StoreNotInitialised(message, partitions=info.partitions)
        return info

    async def check(self) -> StoreInfo:
        """Do as `info` does, and look at the table's keys and index."""
        await self._status()
        return await self.info()

    async def note_keys(self, aggregate_type: str, fingerprint: str) -> None:
        """Record which `keys()` a type's unique keys were made by; others' are kept."""
        while True:
            found = await self._table.get(places.INFO) or {}
            noted: dict[str, str] = orjson.loads(found.get("keys", "{}"))
            text = orjson.dumps(noted | {aggregate_type: fingerprint}).decode()
            same = "#keys = :was" if noted else "attribute_not_exists(#keys)"
            only_if = condition(same, **({"was": found["keys"]} if noted else {}))
            try:
                await self._table.write(
                    update(places.INFO, condition("SET #keys = :keys", keys=text), only_if)
                )
            except ConditionFailed:
                continue
            return

    async def _create_table(self) -> None:
        try:
            status = await self._status()
        except errors.StoreNotInitialised:
            status = await self._create()
        try:
            async with asyncio.timeout(CREATE_SECONDS):
                while status != "ACTIVE":
                    await asyncio.sleep(_POLL_SECONDS)
                    status = await self._status()
        except TimeoutError as exc:
            message = f"the table {self._table.name} is still {status}: run `cqrs-es init` again"
            raise errors.StoreUnavailable(message) from exc

    async def _create(self) -> str:
        try:
            answer = await self._table.call("create_table", **_TABLE)
        except errors.StoreError:  # somebody else was faster
            return await self._status()
        return str(answer["TableDescription"]["TableStatus"])

    async def _status(self) -> str:
        """Return the table's status; raise `ForeignTable` where it was not made as ours are."""
        table = (await self._table.call("describe_table"))["Table"]
        indexes = [index["IndexName"] for index in table.get("GlobalSecondaryIndexes", ())]
        if table["KeySchema"] != _TABLE["KeySchema"] or places.PRUNABLE not in indexes:
            raise foreign(self._table.name)
        return str(table["TableStatus"])

    async def _claim(self, service: str) -> None:
        """Make the store a service's; raise `WrongService` where another was faster."""
        mine = condition("SET #service = :service", service=service)
        unclaimed = condition("attribute_not_exists(#service)")
        try:
            await self._table.write(update(places.INFO, mine, unclaimed))
        except ConditionFailed:
            check_service((await self.info()).service, service)

    async def _fix_once(self, partitions: int, service: str | None) -> StoreInfo:
        """Fix P, the log's epoch and whose it is, unless they are."""
        fields: dict[str, Any] = {
            "partitions": partitions,
            "logepoch": str(uuid.uuid4()),
            "schema_version": SCHEMA_VERSION,
            "secret": secrets.token_bytes(SECRET_BYTES),
        }
        if service is not None:
            fields["service"] = service
        try:
            await self._table.write(put(places.INFO, fields, ABSENT))
        except ConditionFailed:
            fields = await self._table.get(places.INFO) or fields
        return _info_of(fields)

    async def _add_secret(self) -> None:
        """Give a store a secret that was made without one."""
        new = condition("SET #secret = :new", new=secrets.token_bytes(SECRET_BYTES))
        with suppress(ConditionFailed):
            only_if = condition("attribute_not_exists(#secret)")
            await self._table.write(update(places.INFO, new, only_if))

    async def _renew_epoch(self, partitions: int) -> None:
        """Begin a new epoch of the log, in which nothing has been published yet."""
        marks = [delete(places.checkpoint_key(RELAY_MARK, p)) for p in range(partitions)]
        epoch = condition("SET #logepoch = :epoch", epoch=str(uuid.uuid4()))
        await self._table.transact([*marks, update(places.INFO, epoch)])


_TABLE: Final[Mapping[str, Any]] = {
    "BillingMode": "PAY_PER_REQUEST",
    "KeySchema": [
        {"AttributeName": "pk", "KeyType": "HASH"},
        {"AttributeName": "sk", "KeyType": "RANGE"},
    ],
    "AttributeDefinitions": [
        {"AttributeName": name, "AttributeType": "S"}
        for name in ("pk", "sk", places.PRUNABLE, "recorded_at")
    ],
    "GlobalSecondaryIndexes": [
        {
            "IndexName": places.PRUNABLE,
            "KeySchema": [
                {"AttributeName": places.PRUNABLE, "KeyType": "HASH"},
                {"AttributeName": "recorded_at", "KeyType": "RANGE"},
            ],
            "Projection": {"ProjectionType": "KEYS_ONLY"},
        }
    ],
}


def _info_of(fields: Mapping[str, Any]) -> StoreInfo:
    return StoreInfo(
        partitions=fields["partitions"],
        log_epoch=fields["logepoch"],
        schema_version=fields["schema_version"],
        service=fields.get("service"),
        secret=bytes(fields.get("secret", b"")),
        keys=orjson.loads(fields.get("keys", "{}")),
    )


def _check_schema(version: int) -> None:
    if version > SCHEMA_VERSION:
        message = f"the store's schema is {version}, this program's {SCHEMA_VERSION}: upgrade it"
        raise errors.SchemaTooNew(message)
