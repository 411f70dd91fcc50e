"""A DynamoDB for tests: moto's server, one request at a time. `python dynamodb_server.py PORT`.

With threads it lets two transactions win that exclude each other. What it answers is moto's, but
moto copies its whole table for each item of a transaction, sorts all of it for each query, and
looks for each value of an answer under thirty names. What follows has it do less of that: else it
gets slower with each item, and tables have to be small.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import time
from typing import Any

from moto.core import serialize
from moto.dynamodb import models
from moto.dynamodb.models import table
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.sqs import models as sqs_models
from werkzeug.serving import run_simple

_Backend: Any = models.DynamoDBBackend
_Serializer: Any = serialize.BaseJSONSerializer
_Sqs: Any = sqs_models
_Table: Any = table.Table
_moto_transact = _Backend.transact_write_items
_moto_structure = _Serializer._serialize_type_structure
_moto_query = _Table.query
_moto_items = _Table.all_items
_SIGNATURE = inspect.signature(_moto_query)


def _transact(self: Any, transact_items: list[dict[str, Any]]) -> None:
    """Put back what a transaction has changed that fails: its items, and what the stream has."""
    tables = {of.name: of for each in transact_items for of in [_table_of(self, each)] if of}
    before = [_item_of(self, each) for each in transact_items if _table_of(self, each)]
    recorded = {name: len(of.stream_shard.items) for name, of in tables.items() if of.stream_shard}
    try:
        _moto_transact(self, transact_items)
    except Exception:
        for of, high, low, item in before:
            if item is not None:
                of.items[high][low] = item
            else:
                of.items[high].pop(low, None)
        for name, length in recorded.items():
            del tables[name].stream_shard.items[length:]
        raise


def _table_of(backend: Any, action: dict[str, Any]) -> Any:
    (operation,) = action.values()
    return backend.tables.get(operation["TableName"])


def _item_of(backend: Any, action: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Copy the item that an action is about, which moto changes where it is."""
    (operation,) = action.values()
    of = _table_of(backend, action)
    high, low = backend.get_keys_value(of, operation.get("Key") or operation["Item"])
    return of, high, low, copy.deepcopy(of.get_item(high, low))


def _same(self: Any, _memo: object) -> Any:
    """Copy nothing: what moto would go back to is put back by `_transact`."""
    return self


def _query(self: Any, *given: Any, **named: Any) -> Any:
    """Look among the items of the partition key only, where no index is asked."""
    arguments = _SIGNATURE.bind(self, *given, **named).arguments
    self.asked_for = None if arguments.get("index_name") else arguments["hash_key"]
    try:
        return _moto_query(self, *given, **named)
    finally:
        self.asked_for = None


def _all_items(self: Any) -> Any:
    asked_for = getattr(self, "asked_for", None)
    return _moto_items(self) if asked_for is None else [*self.items.get(asked_for, {}).values()]


def _structure(self: Any, serialized: Any, value: Any, shape: Any, key: str) -> None:
    """Answer a text or a number as it is."""
    if shape.name == "AttributeValue" and key and {*value} <= {"S", "N"}:
        self._default_serialize(serialized, value, shape, key)
    else:
        _moto_structure(self, serialized, value, shape, key)


def _millis() -> float:
    return time.time() * 1000.0


_Backend.transact_write_items = _transact
_Serializer._serialize_type_structure = _structure
_Sqs.unix_time_millis = _millis
_Sqs.camelcase_to_underscores = functools.cache(_Sqs.camelcase_to_underscores)
_Table.__deepcopy__ = _same
_Table.query = _query
_Table.all_items = _all_items

if __name__ == "__main__":
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=False)
