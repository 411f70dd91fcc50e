"""What is refused of senders, though msgspec takes it: unknown fields, unusual Decimals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

from msgspec import inspect as types

from cqrs_es.sum_types import TAG, OneOf
from cqrs_es.types import shown

Check: TypeAlias = Callable[[Any, str], None]

DECIMAL: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)


def strict_check(info: types.Type) -> Check:
    r"""Make a function that raises `ValueError` where JSON holds what a type must not be given.

    That is: unknown fields at any depth, and Decimals that are not strings of
    the form `-?[0-9]+(\.[0-9]+)?` (msgspec alone takes `"٣"`, `"1_000"`, `5.0`).
    """
    return _Checks().of(info) or _anything


def _anything(value: Any, path: str) -> None:
    """Accept."""


class _Checks:
    """Compiles a type to a check; None stands for a type with nothing to check."""

    def __init__(self) -> None:
        self._objects: dict[type, dict[str, Check | None]] = {}
        self._choices: dict[type[OneOf], Check] = {}

    def of(self, info: types.Type) -> Check | None:
        match info:
            case types.DecimalType():
                return _check_decimal
            case types.StructType():
                return self._object(info.cls, info.fields, info.tag_field)
            case types.DataclassType() | types.TypedDictType():
                return self._object(info.cls, info.fields)
            case types.CustomType():
                return self._one_of(info.cls)
            case types.NamedTupleType():
                return self._tuple(tuple(field.type for field in info.fields))
            case types.TupleType():
                return self._tuple(info.item_types)
            case types.CollectionType() | types.VarTupleType():
                return self._each(info.item_type)
            case types.DictType():
                return self._mapping(info.key_type, info.value_type)
            case types.UnionType():
                return self._union(info.types)
            case _:
                return None

    def _object(
        self, cls: type, fields: tuple[types.Field, ...], tag_field: str | None = None
    ) -> Check:
        if cls not in self._objects:  # a class that contains itself is compiled once
            known = self._objects[cls] = {} if tag_field is None else {tag_field: None}
            known.update({field.encode_name: self.of(field.type) for field in fields})
        return _object_check(self._objects[cls])

    def _one_of(self, one_of: type[OneOf]) -> Check:
        if one_of not in self._choices:
            by_tag: dict[str | int | None, Check | None] = {}
            others = None
            if one_of.others is not None:
                others = self.of(types.type_info(one_of.others))
            self._choices[one_of] = _choice_check(TAG, by_tag, others)
            for tag, choice in one_of.choices.items():
                shape = cast("types.StructType", types.type_info(choice.shape))
                by_tag[tag] = self._object(choice.shape, shape.fields, tag and TAG)
        return self._choices[one_of]

    def _each(self, item: types.Type) -> Check | None:
        check = self.of(item)
        return _items_check(lambda _: check) if check else None

    def _tuple(self, items: tuple[types.Type, ...]) -> Check | None:
        checks = [self.of(item) for item in items]
        if not any(checks):
            return None
        return _items_check(lambda index: checks[index] if index < len(checks) else None)

    def _mapping(self, key: types.Type, value: types.Type) -> Check | None:
        check_key, check_value = self.of(key), self.of(value)
        return _mapping_check(check_key, check_value) if check_key or check_value else None

    def _union(self, members: tuple[types.Type, ...]) -> Check | None:
        """Choose the member by the kind of JSON, of objects with tags by these."""
        by_kind = {_kind_of(member): self.of(member) for member in members}
        tagged = [m for m in members if isinstance(m, types.StructType) and m.tag_field]
        if tagged:
            by_tag = {member.tag: self.of(member) for member in tagged}
            by_kind["object"] = _choice_check(cast("str", tagged[0].tag_field), by_tag)
        if not any(by_kind.values()):
            return None

        def check(value: Any, path: str) -> None:
            chosen = by_kind.get(_json_kind(value), by_kind.get("decimal"))
            if chosen is not None and value is not None:
                chosen(value, path)

        return check


def _kind_of(info: types.Type) -> str:
    match info:
        case types.DecimalType():
            return "decimal"
        case types.NoneType():
            return "null"
        case types.DataclassType() | types.StructType() | types.TypedDictType() | types.DictType():
            return "object"
        case types.CollectionType() | types.TupleType() | types.NamedTupleType():
            return "array"
        case types.BoolType():
            return "bool"
        case types.IntType():
            return "int"
        case types.FloatType():
            return "float"
        case _:
            return "str"


def _json_kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case dict():
            return "object"
        case list():
            return "array"
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float"
        case _:
            return "str"


def _check_decimal(value: Any, path: str) -> None:
    if not isinstance(value, str) or not DECIMAL.fullmatch(value):
        message = f'{path}: must be a decimal number as a JSON string, such as "12.50"'
        raise ValueError(f"{message}, not {shown(value)}")


def _object_check(known: Mapping[str, Check | None]) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            return  # msgspec says what is wrong
        for name, item in cast("dict[str, object]", value).items():
            field = f"{path}.{name}" if path else name
            if name not in known:
                message = f"unknown field {shown(field)}"
                raise ValueError(f"{message}; known are {', '.join(known) or 'none'}")
            if (inner := known[name]) is not None:
                inner(item, field)

    return check


def _choice_check(
    tag_field: str, by_tag: Mapping[str | int | None, Check | None], others: Check | None = None
) -> Check:
    def check(value: Any, path: str) -> None:
        chosen = others
        if isinstance(value, dict):
            tag = None if None in by_tag else cast("dict[str, Any]", value).get(tag_field)
            chosen = by_tag.get(tag) if isinstance(tag, str | int | None) else None
        if chosen is not None:
            chosen(value, path)

    return check


def _items_check(check_at: Callable[[int], Check | None]) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            return
        for index, item in enumerate(cast("list[object]", value)):
            if (inner := check_at(index)) is not None:
                inner(item, f"{path}[{index}]")

    return check


def _mapping_check(check_key: Check | None, check_value: Check | None) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            return
        for key, item in cast("dict[str, object]", value).items():
            if check_key is not None:
                check_key(key, f"{path}.{shown(key)}")
            if check_value is not None:
                check_value(item, f"{path}.{shown(key)}")

    return check
