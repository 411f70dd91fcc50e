"""JSON in and out: orjson writes and reads it, msgspec gives it types.

What is written is checked in `json_out`: it is refused, or read back as the
same value. What senders write is checked harder than what we wrote ourselves:
see `json_in` and `wire.parse_command`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
import orjson
from msgspec import inspect as types

from cqrs_es import errors
from cqrs_es.json_in import strict_check
from cqrs_es.json_out import Misfit, decimal_text, dumps, in_order, writer
from cqrs_es.messages import FIRST_VERSION
from cqrs_es.sum_types import OneOf, class_of, convert, decoder, shown

T = TypeVar("T")

# Times are written here, not by orjson: see `json_out`.
_UNTYPED: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME
# Several, the innermost first, where types of ours are read inside one another.
_MSGSPEC_PATH: Final = re.compile(r" - at `(?:key in )?\$(?P<path>[^`]*)`")


def to_json(value: object) -> bytes:
    """Encode a value that has no declared type; Decimals become strings in plain notation.

    Raises `TypeError` for what JSON can't say.
    """
    return orjson.dumps(value, default=_to_builtin, option=_UNTYPED)


def _to_builtin(value: object) -> object:
    if isinstance(value, Decimal):
        return decimal_text(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        items = cast("set[object]", value)
        return in_order(orjson.loads(to_json(item)) for item in items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return cast("object", msgspec.to_builtins(value, builtin_types=(Decimal, set, frozenset)))


class Codec(Generic[T]):
    """Encodes and decodes one class of message, state or view."""

    def __init__(self, cls: type[T]) -> None:
        """Raise `DefinitionError` for a class that JSON can't carry."""
        self.cls: type[T] = class_of(cls)
        if not dataclasses.is_dataclass(self.cls):
            message = f"{cls.__qualname__} must be a dataclass: decorate it with @dataclass"
            raise errors.DefinitionError(message)
        try:
            self._shown: Any = shown(cls)
            self.info = msgspec.inspect.type_info(self._shown)
        except (TypeError, NameError) as exc:
            message = f"{cls.__qualname__} has a field that JSON can't carry: {exc}"
            raise errors.DefinitionError(message) from exc
        self._write = writer(self.info, cls.__qualname__)
        self._read = decoder(self._shown)

    @property
    def shape(self) -> object:
        """What the class looks like in JSON, as JSON: another where it has other fields."""
        return _shape(self.info, ())

    def encode(self, value: T) -> bytes:
        """Return the value as a JSON object with every field.

        Raises `NotStorable` naming the field that would not be read back as it is.
        """
        try:
            return dumps(self._write(value))
        except Misfit as exc:
            raise errors.NotStorable(f"{self.cls.__qualname__}{exc}") from exc
        except RecursionError as exc:
            message = f"{self.cls.__qualname__} has itself inside, or nests too deep"
            raise errors.NotStorable(message) from exc

    def decode(self, payload: bytes) -> T:
        """Read a JSON object; raise `ValueError` naming the field that does not fit.

        In one pass, in C; where that finds something wrong, in two, which say what it is.
        """
        try:
            value: T = self._read(payload)
        except (msgspec.MsgspecError, ValueError):
            return self.convert(orjson.loads(payload))
        return value

    def read_back(self, payload: bytes) -> T:
        """Decode what `encode` has just written; raise `NotStorable` where that can't be done."""
        try:
            return self.decode(payload)
        except ValueError as exc:
            message = f"{self.cls.__qualname__} can't be read back: {exc}"
            raise errors.NotStorable(message) from exc

    def decode_exactly(self, payload: bytes) -> T:
        """Read a JSON object that must say just what the value would be stored as today.

        Raises `ValueError` also for missing and unknown fields: a snapshot of
        another shape is no state to go on from, however much of it would fit.
        """
        parsed = orjson.loads(payload)
        value = self.convert(parsed)
        try:
            same = orjson.loads(self.encode(value)) == parsed
        except errors.NotStorable as exc:
            raise ValueError(exc.message) from exc
        if not same:
            message = "it has another shape than the class has today"
            raise ValueError(message)
        return value

    def convert(self, payload: object) -> T:
        """Give parsed JSON its type; raise `ValueError` naming the field that does not fit."""
        try:
            value: T = convert(payload, self._shown)
        except msgspec.ValidationError as exc:
            raise ValueError(_readable(str(exc))) from exc
        return value


def _shape(info: types.Type, around: tuple[type[Any], ...]) -> object:
    """Say as JSON what a type looks like in JSON; classes by their fields, not by their names."""
    match info:
        case types.CustomType() if issubclass(info.cls, OneOf):
            choices = info.cls.choices.items()
            named = [[tag, _shape_of(each.shape, each.cls, around)] for tag, each in choices]
            others = None if info.cls.others is None else types.type_info(info.cls.others)
            return [sorted(named, key=str), None if others is None else _shape(others, around)]
        case types.EnumType():
            return ["enum", sorted(str(member.value) for member in info.cls)]
        case types.UnionType():
            return ["union", *sorted((_shape(each, around) for each in info.types), key=str)]
        case types.DataclassType() | types.StructType() | types.TypedDictType():
            return _fields_shape(info, info.cls, around)
        case types.NamedTupleType():
            return _fields_shape(info, info.cls, around)
        case _:
            values = (getattr(info, name) for name in info.__struct_fields__)
            return [type(info).__name__, *(_part_shape(each, around) for each in values)]


def _shape_of(shown_as: Any, cls: type[Any], around: tuple[type[Any], ...]) -> object:
    if cls in around:
        return ["itself", len(around) - around.index(cls)]
    return _shape(types.type_info(shown_as), (*around, cls))


def _fields_shape(
    info: types.DataclassType | types.StructType | types.TypedDictType | types.NamedTupleType,
    cls: type[Any],
    around: tuple[type[Any], ...],
) -> object:
    if cls in around:
        return ["itself", len(around) - around.index(cls)]
    inside = (*around, cls)
    fields = [
        [field.encode_name, _shape(field.type, inside), _default_shape(field.default)]
        for field in info.fields
    ]
    return ["object", *sorted(fields, key=str)]


def _default_shape(default: object) -> object:
    """Return a default that is one value for ever: what a factory makes need not be."""
    known = isinstance(default, str | int | float | Decimal | None)
    return str(default) if known and not isinstance(default, enum.Enum) else None


def _part_shape(part: object, around: tuple[type[Any], ...]) -> object:
    if isinstance(part, types.Type):
        return _shape(part, around)
    if isinstance(part, tuple):
        return [_part_shape(each, around) for each in cast("tuple[object, ...]", part)]
    return part.__qualname__ if isinstance(part, type) else None if part is None else str(part)


class CommandCodec(Codec[T]):
    """Decodes what senders wrote: unknown fields and Decimals in unusual forms are refused."""

    def __init__(self, cls: type[T], version: str = FIRST_VERSION) -> None:
        super().__init__(cls)
        self.version = version
        self._check = strict_check(self.info)

    def decode(self, payload: bytes) -> T:
        """Read a JSON object; raise `InvalidCommand` naming the field and the reason."""
        return self.convert(orjson.loads(payload))

    def convert(self, payload: object) -> T:
        """Give parsed JSON its type; raise `InvalidCommand` naming the field and the reason."""
        try:
            self._check(payload, "")
            return super().convert(payload)
        except ValueError as exc:
            raise errors.InvalidCommand(str(exc)) from exc


def encoded(message: object) -> bytes:
    """Encode a dataclass by its fields' types; anything else, or one of a generic class, as it is.

    Raises `DefinitionError` and `TypeError`.
    """
    cls: Any = type(message)
    codec = _codec_of(cls)
    return to_json(message) if codec is None else codec.encode(message)


@functools.cache
def _codec_of(cls: Any) -> Codec[Any] | None:
    if not dataclasses.is_dataclass(cls) or getattr(cls, "__parameters__", None):
        return None
    return Codec(cast("type[Any]", cls))


def _readable(message: str) -> str:
    """Turn "Expected `str` - at `$.a[0]`" into "a[0]: expected `str`"."""
    paths = _MSGSPEC_PATH.findall(message)
    reason = _MSGSPEC_PATH.sub("", message)
    reason = reason[:1].lower() + reason[1:]
    path = "".join(reversed(paths)).removeprefix(".")
    return f"{path}: {reason}" if path else reason
