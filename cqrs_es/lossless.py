"""What JSON would lose: refused at start-up, before it is lost or fails when first stored."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from msgspec import inspect as types

from cqrs_es import errors

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


def refuse_what_json_would_lose(cls: type[object]) -> set[type[object]]:
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
