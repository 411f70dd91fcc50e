"""JSON in and out: orjson writes and reads it, msgspec gives it types.

What senders write is checked harder than what we wrote ourselves: see
`strictness` and `wire.parse_command`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.lossless import refuse_what_json_would_lose
from cqrs_es.strictness import strict_check

T = TypeVar("T")

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
        nested = refuse_what_json_would_lose(cls)
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
