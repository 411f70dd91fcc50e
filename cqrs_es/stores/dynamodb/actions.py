"""Items and what is done to them, in the form that DynamoDB's requests have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias

Value: TypeAlias = str | int | bytes
Fields: TypeAlias = Mapping[str, Value]
Action: TypeAlias = dict[str, Any]
"""One action of a transaction, without its table: `{"Put": {"Item": …}}`."""

MAX_ACTIONS: Final = 100
MAX_TRANSACTION_BYTES: Final = 4 * 1024 * 1024
MAX_ITEM_BYTES: Final = 400 * 1024
MAX_SORT_KEY_BYTES: Final = 1024
_NAME: Final = re.compile(r"#(\w+)")


class Key(NamedTuple):
    """An item's key. Items of one `pk` are read in the order of the bytes of their `sk`."""

    pk: str
    sk: str = "-"


class Condition(NamedTuple):
    """What must hold of an item, or a change to it: `#names` of attributes, `:names` of values."""

    text: str
    values: Mapping[str, Value]


def condition(text: str, **values: Value) -> Condition:
    """Write a condition: `condition("#head = :was", was=3)`."""
    return Condition(text, values)


ABSENT: Final = condition("attribute_not_exists(#pk)")


def encoded(value: Value) -> dict[str, Any]:
    """Return a value as DynamoDB wants it."""
    match value:
        case str():
            return {"S": value}
        case bytes():
            return {"B": value}
        case int():
            return {"N": str(value)}


def item_of(fields: Fields) -> dict[str, Any]:
    """Return attributes as DynamoDB wants them."""
    return {name: encoded(value) for name, value in fields.items()}


def key_of(key: Key) -> dict[str, Any]:
    """Return a key as DynamoDB wants it."""
    return {"pk": {"S": key.pk}, "sk": {"S": key.sk}}


def fields_of(item: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Read attributes: text, whole numbers and bytes."""
    found: dict[str, Any] = {}
    for name, typed in item.items():
        ((kind, value),) = typed.items()
        found[name] = int(value) if kind == "N" else value
    return found


def found_key(fields: Mapping[str, Any]) -> Key:
    """Return the key among an item's attributes."""
    return Key(fields["pk"], fields["sk"])


# --- Actions -----------------------------------------------------------------


def put(key: Key, fields: Fields, only_if: Condition | None = None) -> Action:
    """Write a whole item."""
    return {"Put": {"Item": key_of(key) | item_of(fields)} | _conditional(only_if)}


def delete(key: Key, only_if: Condition | None = None) -> Action:
    """Delete an item; one that is not there is no error."""
    return {"Delete": {"Key": key_of(key)} | _conditional(only_if)}


def check(key: Key, only_if: Condition) -> Action:
    """Write nothing, but only if something holds of an item."""
    return {"ConditionCheck": {"Key": key_of(key)} | _conditional(only_if)}


def update(key: Key, change: Condition, only_if: Condition | None = None) -> Action:
    """Change some of an item's attributes; `change` is an update expression and its values."""
    texts = [change.text] if only_if is None else [change.text, only_if.text]
    values = {**change.values, **({} if only_if is None else only_if.values)}
    body = {"Key": key_of(key), "UpdateExpression": change.text} | expressed(*texts, values=values)
    if only_if is not None:
        body["ConditionExpression"] = only_if.text
    return {"Update": body}


def _conditional(only_if: Condition | None) -> dict[str, Any]:
    if only_if is None:
        return {}
    return {"ConditionExpression": only_if.text} | expressed(only_if.text, values=only_if.values)


def expressed(*texts: str, values: Mapping[str, Value]) -> dict[str, Any]:
    """Name the attributes of expressions, of which many are reserved words, and their values."""
    names = sorted({name for text in texts for name in _NAME.findall(text)})
    body: dict[str, Any] = {"ExpressionAttributeNames": {f"#{name}": name for name in names}}
    if values:
        body["ExpressionAttributeValues"] = {f":{k}": encoded(v) for k, v in values.items()}
    return body


def size_of(action: Action) -> int:
    """Return about how many bytes an action counts against the limit, rather more than fewer."""
    ((_, body),) = action.items()
    attributes = {**body.get("Item", {}), **body.get("ExpressionAttributeValues", {})}
    return 100 + sum(
        len(name) + sum(_length(value) for value in typed.values())
        for name, typed in {**body.get("Key", {}), **attributes}.items()
    )


def _length(value: str | bytes) -> int:
    return len(value.encode()) if isinstance(value, str) else len(value)
