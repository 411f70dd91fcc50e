"""JSON in and out: orjson writes and reads it, msgspec gives it types.

What senders write is checked harder than what we wrote ourselves: see
`strict_check` and `parse_command`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

import msgspec
import orjson
from msgspec import inspect as types

from cqrs_es import errors
from cqrs_es.types import shown

T = TypeVar("T")
Check: TypeAlias = Callable[[Any, str], None]

_DECIMAL: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)
_MSGSPEC_PATH: Final = re.compile(r"^(?P<reason>.*) - at `(?:key in )?\$\.?(?P<path>[^`]*)`$")


def to_json(value: object) -> bytes:
    """Encode a value; Decimals become strings in plain notation.

    Raises `TypeError` for what JSON can't say.
    """
    return orjson.dumps(value, default=_to_builtin, option=orjson.OPT_NON_STR_KEYS)


def _to_builtin(value: object) -> object:
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in _field_names(type(value))}
    return cast("object", msgspec.to_builtins(value, builtin_types=(Decimal,)))


@functools.cache
def _field_names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


class Codec(Generic[T]):
    """Encodes and decodes one class of message, state or view."""

    def __init__(self, cls: type[T]) -> None:
        self.cls = cls
        nested = _refuse_what_json_would_lose(cls)
        self._slotted = _slotted(cls)
        self._option = orjson.OPT_NON_STR_KEYS
        if not all(map(_slotted, nested)):
            self._option |= orjson.OPT_PASSTHROUGH_DATACLASS

    def encode(self, value: T) -> bytes:
        """Return the value as a JSON object with every field."""
        whole = value if self._slotted else _to_builtin(value)
        return orjson.dumps(whole, default=_to_builtin, option=self._option)

    def decode(self, payload: bytes) -> T:
        """Read a JSON object; raise `ValueError` naming the field that does not fit."""
        return self.convert(orjson.loads(payload))

    def decode_exactly(self, payload: bytes) -> T:
        """Read a JSON object that must say just what the value would be stored as today.

        Raises `ValueError` also for missing and unknown fields: a snapshot of
        another shape is no state to go on from, however much of it would fit.
        """
        parsed = orjson.loads(payload)
        value = self.convert(parsed)
        if orjson.loads(self.encode(value)) != parsed:
            message = "it has another shape than the class has today"
            raise ValueError(message)
        return value

    def convert(self, payload: object) -> T:
        """Give parsed JSON its type; raise `ValueError` naming the field that does not fit."""
        try:
            return msgspec.convert(payload, self.cls, str_keys=True)
        except msgspec.ValidationError as exc:
            raise ValueError(_readable(str(exc))) from exc


class CommandCodec(Codec[T]):
    """Decodes what senders wrote: unknown fields and sloppy Decimals are refused."""

    def __init__(self, cls: type[T]) -> None:
        super().__init__(cls)
        self._check = strict_check(cls)

    def convert(self, payload: object) -> T:
        """Give parsed JSON its type; raise `InvalidCommand` naming the field and the reason."""
        try:
            self._check(payload, "")
            return super().convert(payload)
        except ValueError as exc:
            raise errors.InvalidCommand(str(exc)) from exc


def _slotted(cls: type[object]) -> bool:
    """Tell whether orjson alone writes every field of a dataclass.

    msgspec leaves a default that was not given to the class attribute, where
    it can; orjson looks for attributes of the instance only.
    """
    return "__slots__" in cls.__dict__


def _readable(message: str) -> str:
    """Turn "Expected `str` - at `$.a[0]`" into "a[0]: expected `str`"."""
    match = _MSGSPEC_PATH.match(message)
    reason = match["reason"] if match else message
    if match and match["path"]:
        return f"{match['path']}: {reason[:1].lower()}{reason[1:]}"
    return reason[:1].lower() + reason[1:]


# --- What is refused at start-up, before it is lost or fails when first stored ---

_KEYS: Final = (
    types.StrType,
    types.IntType,
    types.FloatType,
    types.EnumType,
    types.LiteralType,
    types.UUIDType,
    types.DateTimeType,
    types.DateType,
    types.TimeType,
)


def _refuse_what_json_would_lose(cls: type[object]) -> set[type[object]]:
    """Return the dataclasses that a class has inside it; raise `DefinitionError`."""
    if not dataclasses.is_dataclass(cls):
        message = f"{cls.__qualname__} must be a dataclass: decorate it with @dataclass"
        raise errors.DefinitionError(message)
    try:
        info = types.type_info(cls)
    except (TypeError, NameError) as exc:
        message = f"{cls.__qualname__} has a field that JSON can't carry: {exc}"
        raise errors.DefinitionError(message) from exc
    _inspect_fields(cls)
    nested: set[type[object]] = set()
    for inner, name in _inside(info, cls.__qualname__):
        _inspect(inner, name, nested)
    return nested


def _inspect(info: types.Type, where: str, nested: set[type[object]]) -> None:
    match info:
        case types.CustomType():
            message = f"{where} can't be stored: JSON can't carry a {info.cls.__qualname__}"
            raise errors.DefinitionError(message)
        case types.DictType() if not isinstance(info.key_type, _KEYS):
            message = f"{where} can't be stored: the keys of a JSON object are text or numbers"
            raise errors.DefinitionError(message)
        case types.DataclassType():
            if info.cls in nested:
                return
            nested.add(info.cls)
            _inspect_fields(info.cls)
        case _:
            pass
    for inner, name in _inside(info, where):
        _inspect(inner, name, nested)


def _inspect_fields(cls: type[Any]) -> None:
    for field in dataclasses.fields(cls):
        if field.name.startswith("_") or not field.init:
            message = f"{cls.__qualname__}.{field.name} would not be stored: name it without a"
            raise errors.DefinitionError(f"{message} leading underscore and let __init__ take it")


def _inside(info: types.Type, where: str) -> list[tuple[types.Type, str]]:
    """Return the types that a type is made of, each with where it stands."""
    match info:
        case (
            types.DataclassType()
            | types.StructType()
            | types.TypedDictType()
            | types.NamedTupleType()
        ):
            return [(field.type, f"{info.cls.__qualname__}.{field.name}") for field in info.fields]
        case types.TupleType():
            return [(item, where) for item in info.item_types]
        case types.CollectionType() | types.VarTupleType():
            return [(info.item_type, where)]
        case types.DictType():
            return [(info.key_type, where), (info.value_type, where)]
        case types.UnionType():
            return [(member, where) for member in info.types]
        case _:
            return []


# --- Strictness towards senders ----------------------------------------------


def strict_check(cls: type[object]) -> Check:
    r"""Make a function that raises `ValueError` where JSON holds what `cls` must not be given.

    That is: unknown fields at any depth, and Decimals that are not strings of
    the form `-?[0-9]+(\.[0-9]+)?` (msgspec alone takes `"٣"`, `"1_000"`, `5.0`).
    """
    return _Checks().of(types.type_info(cls)) or _anything


def _anything(value: Any, path: str) -> None:
    """Accept."""


class _Checks:
    """Compiles a type to a check; None stands for a type with nothing to check."""

    def __init__(self) -> None:
        self._objects: dict[type, dict[str, Check | None]] = {}

    def of(self, info: types.Type) -> Check | None:
        match info:
            case types.DecimalType():
                return _check_decimal
            case types.DataclassType() | types.StructType() | types.TypedDictType():
                return self._object(info.cls, info.fields)
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

    def _object(self, cls: type, fields: tuple[types.Field, ...]) -> Check:
        if cls not in self._objects:  # a class that contains itself is compiled once
            known = self._objects[cls] = {}
            known.update({field.encode_name: self.of(field.type) for field in fields})
        return _object_check(self._objects[cls])

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
        """Choose the member by the kind of JSON; msgspec allows no two of one kind."""
        by_kind = {_kind_of(member): self.of(member) for member in members}
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
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
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
