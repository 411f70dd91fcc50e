"""The table: requests under deadlines, in pages, repeated for what a server left undone."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from cqrs_es import errors
from cqrs_es.aws import CALL_SECONDS, client_for
from cqrs_es.stores.dynamodb.actions import (
    Condition,
    Key,
    expressed,
    fields_of,
    found_key,
    key_of,
)
from cqrs_es.stores.dynamodb.failures import Contended, foreign, mapped_errors
from cqrs_es.stores.sql.session import chunks, to_its_end

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Iterable,
        Mapping,
        Sequence,
    )

    from cqrs_es.stores.dynamodb.actions import Action

A = TypeVar("A")
T = TypeVar("T")

PARALLEL: Final = 32
"""Requests at a time for one call of the store."""
GET_BATCH: Final = 100
DELETE_BATCH: Final = 25
MAX_TRIES: Final = 8
PAUSE_SECONDS: Final = 0.05
_OTHER_KEYS: Final = "key element does not match the schema"


class Target(msgspec.Struct, frozen=True):
    """Where the table is: a region, a name, and an endpoint unless it is AWS's own."""

    region: str
    table: str
    endpoint: str | None = None


class Table:
    """One table of DynamoDB.

    Reads are strongly consistent. Everything raises errors of `cqrs_es.errors`,
    `ConditionFailed` or `Contended`.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._opened = AsyncExitStack()
        self._client: Any = None

    @property
    def name(self) -> str:
        """The table's name."""
        return self._target.table

    async def open(self) -> None:
        """Make a client, and ask it for something, to know that it can be done."""
        if self._client is not None:
            return
        target = self._target
        client = client_for("dynamodb", target.region, target.endpoint)
        with mapped_errors():
            self._client = await self._opened.enter_async_context(client)
        try:
            await self.get(Key("info"))
        except errors.StoreNotInitialised:
            return  # there is a server, and no table yet
        except errors.StoreError as exc:
            await self.close()
            raise (foreign(self.name) if _OTHER_KEYS in str(exc) else exc) from exc
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        self._client = None
        await self._opened.aclose()

    async def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a request about the table, under a deadline."""
        return await self._ask(operation, TableName=self.name, **parameters)

    async def _ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        if self._client is None:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)
        with mapped_errors():
            async with asyncio.timeout(CALL_SECONDS):
                answer = await getattr(self._client, operation)(**parameters)
        return cast("dict[str, Any]", answer)

    # --- Reading -------------------------------------------------------------

    async def get(self, key: Key) -> dict[str, Any] | None:
        """Read one item."""
        answer = await self.call("get_item", Key=key_of(key), ConsistentRead=True)
        return fields_of(answer["Item"]) if "Item" in answer else None

    async def get_many(self, keys: Iterable[Key], *attributes: str) -> dict[Key, dict[str, Any]]:
        """Read those items that are there; only some `attributes` of them where they are named."""

        async def get_batch(batch: Sequence[Key]) -> list[dict[str, Any]]:
            return await self._get_batch(batch, attributes)

        found = await side_by_side(get_batch, chunks(sorted(set(keys)), GET_BATCH))
        return {found_key(fields): fields for some in found for fields in some}

    async def _get_batch(
        self, keys: Sequence[Key], attributes: Sequence[str]
    ) -> list[dict[str, Any]]:
        request: dict[str, Any] = {"Keys": [key_of(k) for k in keys], "ConsistentRead": True}
        if attributes:
            wanted = ", ".join(f"#{name}" for name in ("pk", "sk", *attributes))
            request |= {"ProjectionExpression": wanted} | expressed(wanted, values={})
        found: list[dict[str, Any]] = []
        async for answer in self._until_done("batch_get_item", request, "UnprocessedKeys"):
            found += [fields_of(item) for item in answer["Responses"].get(self.name, [])]
        return found

    async def query(
        self,
        where: Condition,
        *,
        limit: int | None = None,
        descending: bool = False,
        index: str | None = None,
        attributes: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Read the items of one partition key, in order, from as many pages as it takes.

        An `index` is only as consistent as DynamoDB makes it: eventually.
        """
        request = self._query(where, descending=descending, index=index, attributes=attributes)
        found: list[dict[str, Any]] = []
        while limit is None or len(found) < limit:
            if limit is not None:
                request["Limit"] = limit - len(found)
            answer = await self.call("query", **request)
            found += [fields_of(item) for item in answer["Items"]]
            if "LastEvaluatedKey" not in answer:
                break
            request["ExclusiveStartKey"] = answer["LastEvaluatedKey"]
        return found

    async def count(self, where: Condition) -> int:
        """Count the items of one partition key."""
        request = self._query(where) | {"Select": "COUNT"}
        total = 0
        while True:
            answer = await self.call("query", **request)
            total += int(answer["Count"])
            if "LastEvaluatedKey" not in answer:
                return total
            request["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    def _query(
        self,
        where: Condition,
        *,
        descending: bool = False,
        index: str | None = None,
        attributes: Sequence[str] = (),
    ) -> dict[str, Any]:
        wanted = ", ".join(f"#{name}" for name in attributes)
        request: dict[str, Any] = {"KeyConditionExpression": where.text}
        request |= expressed(where.text, wanted, values=where.values)
        request |= {"ConsistentRead": True} if index is None else {"IndexName": index}
        if wanted:
            request["ProjectionExpression"] = wanted
        return request | ({"ScanIndexForward": False} if descending else {})

    async def get_certainly(self, keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
        """Read items in transactions: what a committed one wrote is there, all of it.

        Other reads can see one item of a transaction a moment before another.
        """
        found: dict[Key, dict[str, Any]] = {}
        for batch in chunks(keys, GET_BATCH):
            gets = [{"Get": {"TableName": self.name, "Key": key_of(key)}} for key in batch]
            answer = await self._patiently("transact_get_items", TransactItems=gets)
            items = [fields_of(each["Item"]) for each in answer["Responses"] if "Item" in each]
            found.update({found_key(fields): fields for fields in items})
        return found

    async def _patiently(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a request again while others are at work on the same items, a few times."""
        for tries in range(1, MAX_TRIES):
            try:
                return await self._ask(operation, **parameters)
            except Contended:
                await pause(tries)
        return await self._ask(operation, **parameters)

    # --- Writing -------------------------------------------------------------

    async def write(self, action: Action, returns: str = "NONE") -> dict[str, Any]:
        """Do one action; return what `returns` asks for of the item."""
        ((kind, body),) = action.items()
        request = self.call(f"{kind.lower()}_item", **body, ReturnValues=returns)
        answer = await to_its_end(asyncio.ensure_future(request))
        return fields_of(answer.get("Attributes", {}))

    async def transact(self, actions: Sequence[Action]) -> None:
        """Do all actions or none; raise `ConditionFailed` or `Contended` for none.

        Who is cancelled meanwhile leaves when it has ended, so that it is done or never will be.
        """
        located = [
            {kind: {"TableName": self.name, **body} for kind, body in action.items()}
            for action in actions
        ]
        request = self._ask("transact_write_items", TransactItems=located)
        await to_its_end(asyncio.ensure_future(request))

    async def delete_many(self, keys: Iterable[Key]) -> None:
        """Delete items, each on its own."""
        requests = [{"DeleteRequest": {"Key": key_of(key)}} for key in sorted(set(keys))]
        await side_by_side(self._delete_batch, chunks(requests, DELETE_BATCH))

    async def _delete_batch(self, requests: Sequence[Mapping[str, Any]]) -> None:
        async for _ in self._until_done("batch_write_item", requests, "UnprocessedItems"):
            pass

    async def _until_done(
        self, operation: str, wanted: object, left_over: str
    ) -> AsyncGenerator[dict[str, Any]]:
        """Ask, and again for what the server left undone; give each answer."""
        requests: Mapping[str, Any] = {self.name: wanted}
        for tries in range(1, MAX_TRIES + 1):
            answer = await self._ask(operation, RequestItems=requests)
            yield answer
            requests = answer.get(left_over) or {}
            if not requests:
                return
            await pause(tries)
        message = "DynamoDB keeps leaving requests undone: it is throttling; try again"
        raise errors.StoreUnavailable(message)


async def side_by_side(work: Callable[[A], Awaitable[T]], items: Iterable[A]) -> list[T]:
    """Do work for each item, some at a time; results in their order. An error ends all."""
    room = asyncio.Semaphore(PARALLEL)

    async def in_turn(item: A) -> T:
        async with room:
            return await work(item)

    waiting = list(items)
    if len(waiting) == 1:
        return [await work(waiting[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(item)) for item in waiting]
    except* errors.CqrsError as several:
        raise errors.innermost(several) from None
    return [task.result() for task in tasks]


async def pause(tries: int) -> None:
    """Wait before another try: longer each time, and not as long as anybody else."""
    await asyncio.sleep(PAUSE_SECONDS * min(tries, MAX_TRIES) * random.random())  # noqa: S311 - jitter
