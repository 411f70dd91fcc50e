"""Types as JSON Schema 2020-12, in the forms that `json_in` reads and `json_out` writes.

msgspec's own schemas differ from these: its Decimals are numbers too, its moments have zones,
its objects are open, and it does not know unions of dataclasses (`sum_types`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import orjson
from msgspec import NODEFAULT, UNSET
from msgspec import inspect as types

from cqrs_es.codec import Codec, CommandCodec
from cqrs_es.json_in import DECIMAL
from cqrs_es.sum_types import TAG, Choice, OneOf

if TYPE_CHECKING:
    import enum

Schema: TypeAlias = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_DATE_TIME: Final = r"^\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?"
_ZONE: Final = r"([Zz]|[+-]\d{2}:?\d{2})"
_PLAIN: Final[Mapping[type[types.Type], Schema]] = {
    types.AnyType: {},
    types.NoneType: {"type": "null"},
    types.BoolType: {"type": "boolean"},
    types.IntType: {"type": "integer"},
    types.FloatType: {"type": "number"},
    types.StrType: {"type": "string"},
    types.UUIDType: {"type": "string", "format": "uuid"},
    types.DateType: {"type": "string", "format": "date"},
    types.TimeType: {"type": "string", "pattern": r"^\d{2}:\d{2}:\d{2}(\.\d+)?$"},
    types.TimeDeltaType: {"type": "string", "format": "duration"},
    types.BytesType: {"type": "string", "contentEncoding": "base64"},
    types.ByteArrayType: {"type": "string", "contentEncoding": "base64"},
}
# The form in which a moment or a Decimal has a zone, or may be infinite.
MOMENTS: Final[Mapping[bool | None, Schema]] = {
    True: {"type": "string", "format": "date-time"},
    False: {"type": "string", "pattern": f"{_DATE_TIME}$"},
    None: {"type": "string", "pattern": f"{_DATE_TIME}{_ZONE}?$"},
}
STORED_DECIMAL: Final = f"^({DECIMAL.pattern}|NaN|-?Infinity)$"
_BOUNDS: Final = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "pattern": "pattern",
}
_LENGTHS: Final = {"string": "Length", "array": "Items", "object": "Properties"}


def schema_of(codec: Codec[Any]) -> Schema:
    """Return the schema of a class's JSON: of a command closed, of anything else open.

    A field with a default need not be there: it may have been added later. What
    `__post_init__` refuses is not in the schema.
    """
    compiler = _Compiler(closed=isinstance(codec, CommandCodec))
    schema = compiler.root(codec.info)
    if compiler.definitions:
        schema["$defs"] = dict(sorted(compiler.definitions.items()))
    return schema


class _Compiler:
    """Compiles types; classes inside the outermost become definitions of their names."""

    def __init__(self, *, closed: bool) -> None:
        self._closed = closed
        self.definitions: dict[str, Schema] = {}
        self._names: dict[object, str] = {}

    def root(self, info: types.Type) -> Schema:
        """Compile the outermost type, in place unless it has itself inside."""
        schema = self.of(info)
        name = str(schema.get("$ref", "")).rpartition("/")[2]
        uses = orjson.dumps(self.definitions).count(orjson.dumps(schema))
        return self.definitions.pop(name) if name and not uses else schema

    def of(self, info: types.Type) -> Schema:  # noqa: C901, PLR0912 - one case a type
        match info:
            case types.Metadata():
                return self.of(info.type)
            case types.StructType() | types.DataclassType() | types.TypedDictType():
                return self._named(info.cls, lambda: self._object(info))
            case types.CustomType() if issubclass(info.cls, OneOf):
                return self._one_of(info.cls)
            case types.UnionType():
                return any_of(map(self.of, info.types))
            case types.NamedTupleType():
                return _tuple([self.of(field.type) for field in info.fields])
            case types.TupleType():
                return _tuple([self.of(item) for item in info.item_types])
            case types.CollectionType():
                items = {"type": "array", "items": self.of(info.item_type)}
                unique = isinstance(info, types.SetType | types.FrozenSetType)
                return _bounded(items | ({"uniqueItems": True} if unique else {}), info)
            case types.DictType():
                return self._dict(info)
            case types.EnumType():
                return _one_value([member.value for member in _members(info.cls)])
            case types.LiteralType():
                return _one_value(info.values)
            case types.DecimalType():
                return self._decimal()
            case types.DateTimeType():
                return dict(MOMENTS[info.tz])
            case _:
                return _bounded(dict(_PLAIN[type(info)]), info)

    def _decimal(self) -> Schema:
        """Senders give finite ones in plain notation; what is stored may be NaN or Infinity."""
        finite = f"^{DECIMAL.pattern}$"
        return {"type": "string", "pattern": finite if self._closed else STORED_DECIMAL}

    def _dict(self, info: types.DictType) -> Schema:
        schema: Schema = {"type": "object", "additionalProperties": self.of(info.value_type)}
        names = self.of(info.key_type)
        if names.get("type") == "integer":
            names = {"pattern": "^-?[0-9]+$"}
        if names != {"type": "string"} and names.get("type") != "number":
            schema["propertyNames"] = {k: v for k, v in names.items() if k != "type"}
        return _bounded(schema, info)

    def _named(self, key: object, make: Any, name: str = "") -> Schema:
        if key not in self._names:
            wanted = name or getattr(key, "__name__", "Type")
            taken = set(self._names.values())
            names = (wanted if n == 1 else f"{wanted}{n}" for n in range(1, len(taken) + 2))
            self._names[key] = next(name for name in names if name not in taken)
            self.definitions[self._names[key]] = make()
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _object(self, info: types.StructType | types.DataclassType | types.TypedDictType) -> Schema:
        schema = self._fields(info.fields)
        if isinstance(info, types.StructType) and info.tag is not None:
            return _tagged(schema, str(info.tag_field), info.tag)
        return schema

    def _fields(self, fields: Iterable[types.Field]) -> Schema:
        properties: dict[str, Schema] = {}
        required: list[str] = []
        for field in fields:
            properties[field.encode_name] = self.of(field.type) | _default(field)
            if field.required:
                required.append(field.encode_name)
        schema: Schema = {"type": "object", "properties": properties, "required": sorted(required)}
        return schema | ({"additionalProperties": False} if self._closed else {})

    def _one_of(self, one_of: type[OneOf]) -> Schema:
        choices = [self._choice(tag, choice) for tag, choice in one_of.choices.items()]
        if one_of.others is not None:
            choices.append(self.of(types.type_info(one_of.others)))
        return any_of(choices)

    def _choice(self, tag: str | None, choice: Choice) -> Schema:
        def make() -> Schema:
            shape = types.type_info(choice.shape)
            assert isinstance(shape, types.StructType)  # noqa: S101 - see `sum_types.Choice`
            fields = self._fields(shape.fields)
            return fields if tag is None else _tagged(fields, TAG, tag)

        return self._named((choice.shape, tag), make, choice.cls.__name__)


def any_of(choices: Iterable[Schema]) -> Schema:
    """Return the schema of what fits one of several, in an order that does not depend on theirs."""
    flat: list[Schema] = []
    for choice in choices:
        flat += choice["anyOf"] if set(choice) == {"anyOf"} else [choice]
    flat.sort(key=lambda choice: orjson.dumps(choice, option=orjson.OPT_SORT_KEYS))
    return flat[0] if len(flat) == 1 else {"anyOf": flat}


def _tagged(schema: Schema, field: str, tag: str | int) -> Schema:
    properties = {field: {"const": tag}, **schema["properties"]}
    return schema | {"properties": properties, "required": sorted([field, *schema["required"]])}


def _tuple(items: Sequence[Schema]) -> Schema:
    size = len(items)
    return {"type": "array", "prefixItems": list(items), "minItems": size, "maxItems": size}


def _members(cls: Any) -> list[enum.Enum]:
    return list(cls)


def _one_value(values: Iterable[Any]) -> Schema:
    return {"enum": sorted(values, key=lambda value: (type(value).__name__, str(value)))}


def _bounded(schema: Schema, info: Any) -> Schema:
    for attribute, keyword in _BOUNDS.items():
        if (bound := getattr(info, attribute, None)) is not None:
            schema[keyword] = bound
    for attribute in ("min", "max"):
        if (bound := getattr(info, f"{attribute}_length", None)) is not None:
            schema[attribute + _LENGTHS[schema["type"]]] = bound
    return schema


def _default(field: types.Field) -> Schema:
    """Return a default that JSON has a word for."""
    if field.default is NODEFAULT or field.default is UNSET:
        return {}
    try:
        default = field.default
        if dataclasses.is_dataclass(default):
            return {}
        return {"default": orjson.loads(orjson.dumps(default, default=str))}
    except orjson.JSONEncodeError:
        return {}


class Components:
    """The part of a document where its schemas are, by name; each is then referred to."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def add(self, name: str, schema: Schema) -> Schema:
        """Put a schema there, its definitions beside it; return what refers to it."""
        here = dict(schema)
        for inner, definition in here.pop("$defs", {}).items():
            self.schemas[f"{name}.{inner}"] = _moved(definition, name)
        self.schemas[name] = _moved(here, name)
        return {"$ref": f"#/components/schemas/{name}"}


def _moved(part: Any, name: str) -> Any:
    """Have references to definitions point to the components of that name."""
    if isinstance(part, list):
        return [_moved(item, name) for item in part]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(part, dict):
        return part
    moved: Schema = {key: _moved(item, name) for key, item in part.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(reference := moved.get("$ref"), str):
        moved["$ref"] = reference.replace("#/$defs/", f"#/components/schemas/{name}.")
    return moved
