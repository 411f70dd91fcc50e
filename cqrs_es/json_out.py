"""How the values of each type are written: refused, or read back as the same value.

A type that JSON can't carry is refused when a class is registered. A value is
refused when it is written, if it would come back as another one: an instance of
a subclass, a datetime whose zone has no fixed offset, a tuple where the field
says list. Sets are sorted, so that equal values are written alike.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, Final, TypeAlias, cast

import msgspec
import orjson
from msgspec import inspect as types

from cqrs_es import errors
from cqrs_es.sum_types import TAG, OneOf, class_of

Write: TypeAlias = Callable[[Any], object]

_SORTED: Final = orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS
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


# A Decimal of a few characters may stand for gigabytes of zeros.
MOST_DIGITS: Final = 1_000_000


class Misfit(Exception):
    """A value would not come back as it is; `path` leads to it: `.lines[0].price`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path = ""

    def within(self, step: str) -> Misfit:
        """Put a step in front of the path: `.field`, or `[index]`."""
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path}: {self.args[0]}"


class Form(msgspec.Struct, frozen=True):
    """How values of one type are written.

    `classes` are those that a value may have; those in `plain` are written by
    orjson as they stand, so `write` need not be called for them. `unchecked` writes values
    that are known to be of just that class: fields are written by it, since that was looked at.
    """

    classes: frozenset[type]
    write: Write
    plain: frozenset[type] = frozenset()
    unchecked: Mapping[type, Write] = msgspec.field(default_factory=dict[type, Write])


def writer(info: types.Type, where: str) -> Write:
    """Compile what turns a value into what orjson writes; it raises `Misfit`.

    Raises `DefinitionError` that names the field whose type, or default, can't be stored.
    """
    forms = _Forms()
    form = forms.of(info, where)
    forms.check_defaults()
    return form.write


class _Forms:
    """Compiles types to forms."""

    def __init__(self) -> None:
        self._objects: dict[Any, Form] = {}
        self._defaults: list[tuple[type[Any], str, Form, object]] = []

    def of(self, info: types.Type, where: str) -> Form:  # noqa: C901, PLR0912 - one case a type
        match info:
            case types.DataclassType() | types.StructType():
                return self._object(info)
            case types.CustomType() if issubclass(info.cls, OneOf):
                return self._one_of(info.cls, where)
            case types.UnionType():
                return _union([self.of(member, where) for member in info.types])
            case types.DictType():
                return self._dict(info, where)
            case types.TypedDictType():
                return self._typed_dict(info)
            case types.NamedTupleType():
                fields = [self.of(f.type, f"{info.cls.__qualname__}.{f.name}") for f in info.fields]
                return _tuple(info.cls, fields)
            case types.TupleType():
                return _tuple(tuple, [self.of(item, where) for item in info.item_types])
            case types.ListType():
                return _items(list, self.of(info.item_type, where))
            case types.VarTupleType():
                return _items(tuple, self.of(info.item_type, where))
            case types.SetType():
                return _items(set, self.of(info.item_type, where), in_order)
            case types.FrozenSetType():
                return _items(frozenset, self.of(info.item_type, where), in_order)
            case types.EnumType():
                return _enum(info.cls)
            case types.LiteralType():
                return _literal(info.values)
            case _ if type(info) in _LEAVES:
                return _LEAVES[type(info)]
            case _:
                cls = info.cls if isinstance(info, types.CustomType) else type(info)
                message = f"{where} can't be stored: JSON can't carry a {cls.__qualname__}"
                raise errors.DefinitionError(message)

    def check_defaults(self) -> None:
        """Refuse defaults that would be refused when they are written."""
        for cls, name, form, default in self._defaults:
            try:
                form.write(default)
            except Misfit as exc:
                message = f"{cls.__qualname__}{exc.within(f'.{name}').path}: the default"
                raise errors.DefinitionError(f"{message} {exc.args[0]}") from exc

    def _object(self, info: types.DataclassType | types.StructType) -> Form:
        if info.cls not in self._objects:  # a class may have itself inside
            cls = class_of(info.cls)
            fields: list[_Field] = []
            write = _write_fields(fields)
            if isinstance(info, types.StructType):
                _check_struct(info)
                if info.tag is not None:
                    write = _write_tagged(write, cast("str", info.tag_field), info.tag)
            self._objects[info.cls] = _exact(cls, write)
            fields += self._fields(cls, info.fields)
        return self._objects[info.cls]

    def _fields(self, cls: type[Any], fields: Sequence[types.Field]) -> list[_Field]:
        forms = {f.name: self.of(f.type, f"{cls.__qualname__}.{f.name}") for f in fields}
        if dataclasses.is_dataclass(cls):
            for field in dataclasses.fields(cls):
                _check_field(cls, field)
                if field.default is not dataclasses.MISSING:
                    self._defaults.append((cls, field.name, forms[field.name], field.default))
        return [
            (f.name, f.encode_name, form.plain, form.unchecked, form.write, f".{f.name}")
            for f, form in zip(fields, forms.values(), strict=True)
        ]

    def _one_of(self, one_of: type[OneOf], where: str) -> Form:
        if one_of not in self._objects:
            members: dict[type, Write] = {}
            classes = frozenset(choice.cls for choice in one_of.choices.values())
            self._objects[one_of] = Form(classes, _write_member(members), unchecked=members)
            for tag, choice in one_of.choices.items():
                shape = cast("types.StructType", types.type_info(choice.shape))
                write = _write_fields(self._fields(choice.cls, shape.fields))
                members[choice.cls] = write if tag is None else _write_tagged(write, TAG, tag)
            if one_of.others is not None:
                others = self.of(types.type_info(one_of.others), where)
                members |= dict.fromkeys(others.classes, others.write)
        return self._objects[one_of]

    def _dict(self, info: types.DictType, where: str) -> Form:
        if not isinstance(info.key_type, _KEYS):
            message = f"{where} can't be stored: the keys of a JSON object are text or numbers"
            raise errors.DefinitionError(message)
        key, value = self.of(info.key_type, where), self.of(info.value_type, where)
        return _exact(dict, _write_dict(key, value))

    def _typed_dict(self, info: types.TypedDictType) -> Form:
        forms = {f.name: self.of(f.type, f"{info.cls.__qualname__}.{f.name}") for f in info.fields}
        required = {field.name for field in info.fields if field.required}

        def write(value: dict[str, object]) -> object:
            for name in value.keys() - forms.keys():
                raise Misfit("is no key of its type").within(f".{name}")
            for name in required - value.keys():
                raise Misfit("is missing").within(f".{name}")
            return {name: _at(f".{name}", forms[name].write, item) for name, item in value.items()}

        return _exact(dict, write)


def _check_field(cls: type[Any], field: dataclasses.Field[Any]) -> None:
    if field.name.startswith("_") or not field.init:
        message = f"{cls.__qualname__}.{field.name} would not be stored: name it without a"
        raise errors.DefinitionError(f"{message} leading underscore and let __init__ take it")


def _check_struct(info: types.StructType) -> None:
    if info.array_like:
        message = f"{info.cls.__qualname__} can't be stored: fields without names can't be changed"
        raise errors.DefinitionError(f"{message} later; drop array_like=True")


# --- What is made of others --------------------------------------------------

# A field's name, its name in JSON, the classes that need no writing, what writes the others by
# their class, or checks them, and the field as a step of a path.
_Field: TypeAlias = tuple[str, str, frozenset[type], Mapping[type, Write], Write, str]


def _at(step: str, write: Write, value: object) -> object:
    try:
        return write(value)
    except Misfit as exc:
        raise exc.within(step) from None


def _exact(cls: type, write: Write, plain: frozenset[type] = frozenset()) -> Form:
    return Form(frozenset({cls}), _exactly(cls, write), plain, {cls: write})


def _exactly(cls: type, write: Write) -> Write:
    """Write values of a class, and none of another: what is read back is of the class itself."""

    def check(value: object) -> object:
        if type(value) is not cls:
            raise _refused(value, [cls])
        return write(value)

    return check


def _refused(value: object, classes: Iterable[type]) -> Misfit:
    names = " or ".join(sorted(cls.__name__ for cls in classes))
    cls = type(value)
    reason = f"must be {names.replace('NoneType', 'None')}, not {cls.__name__}"
    if dataclasses.is_dataclass(cls) and isinstance(value, tuple(classes)):
        reason += f": declare the field as {names} | {cls.__name__} to have either"
    return Misfit(reason)


def _write_fields(fields: Sequence[_Field]) -> Write:
    def write(value: object) -> dict[str, object]:
        written: dict[str, object] = {}
        for name, key, plain, unchecked, write_field, step in fields:
            item: object = getattr(value, name)
            cls = type(item)
            if cls in plain:
                written[key] = item
                continue
            try:  # `_at` written out: this is run for each field of each event and state
                written[key] = unchecked.get(cls, write_field)(item)
            except Misfit as exc:
                raise exc.within(step) from None
        return written

    return write


def _write_tagged(write_fields: Write, tag_field: str, tag: str | int) -> Write:
    return lambda value: {tag_field: tag, **cast("dict[str, object]", write_fields(value))}


def _write_member(members: dict[type, Write]) -> Write:
    """Write a value of a union as its own class is written."""

    def write(value: object) -> object:
        write_it = members.get(type(value))
        if write_it is None:
            raise _refused(value, members)
        return write_it(value)

    return write


def _union(forms: Sequence[Form]) -> Form:
    members: dict[type, Write] = {}
    for form in sorted(forms, key=lambda form: float in form.classes):  # an int too, but as a float
        new = form.classes - members.keys()
        members |= {cls: form.unchecked.get(cls, form.write) for cls in new}
    plain = _EMPTY.union(*(f.plain for f in forms))
    return Form(frozenset(members), _write_member(members), plain, members)


def _items(cls: type, item: Form, arrange: Callable[[Iterable[object]], object] = list) -> Form:
    def write(value: Iterable[object]) -> object:
        if item.plain.issuperset(map(type, value)):
            return arrange(value)
        return arrange([_at(f"[{index}]", item.write, each) for index, each in enumerate(value)])

    return Form(frozenset({cls}), _exactly(cls, write))


def in_order(items: Iterable[object]) -> list[object]:
    """Sort what is written of a set's items: a set has no order that another process repeats."""
    return sorted(items, key=lambda item: orjson.dumps(item, option=_SORTED))


def _tuple(cls: type, items: Sequence[Form]) -> Form:
    def write(value: tuple[object, ...]) -> object:
        if len(value) != len(items):
            message = f"must have {len(items)} items, not {len(value)}"
            raise Misfit(message)
        pairs = enumerate(zip(items, value, strict=True))
        return [_at(f"[{index}]", item.write, each) for index, (item, each) in pairs]

    return Form(frozenset({cls}), _exactly(cls, write))


def _write_dict(key: Form, value: Form) -> Write:
    def write(items: dict[Any, object]) -> object:
        if key.plain.issuperset(map(type, items)) and value.plain.issuperset(
            map(type, items.values())
        ):
            return items
        return {
            _at(", a key", key.write, name): _at(f".{name}", value.write, item)
            for name, item in items.items()
        }

    return write


# --- What stands alone -------------------------------------------------------


def _enum(cls: Any) -> Form:
    members: Iterable[Any] = cls
    written: dict[object, object] = {member: member.value for member in members}

    def write(value: object) -> object:
        if value not in written:  # a combination of flags
            message = f"must be a member of {cls.__name__}"
            raise Misfit(message)
        return written[value]

    return _exact(cls, write)


def _literal(values: Iterable[object]) -> Form:
    known = {(type(value), value) for value in values}

    def write(value: object) -> object:
        if (type(value), value) not in known:
            names = ", ".join(sorted(repr(value) for _, value in known))
            raise Misfit(f"must be one of {names}")
        return value

    return Form(frozenset(cls for cls, _ in known), write)


def _json(value: object) -> object:
    """Write a value of a field without a type: only what JSON has a word for comes back."""
    cls = type(value)
    if cls in _JSON_WORDS:
        return value
    if cls is float:
        return _float(value)
    if cls is list:
        items = cast("list[object]", value)
        return [_at(f"[{index}]", _json, item) for index, item in enumerate(items)]
    if cls is dict:
        fields = cast("dict[object, object]", value)
        if all(type(name) is str for name in fields):
            return {name: _at(f".{name}", _json, item) for name, item in fields.items()}
        raise Misfit("must have keys of text: the field's type names no other")
    message = f"would not come back as {cls.__name__}: the field's type does not name it"
    raise Misfit(message)


def _float(value: Any) -> object:
    if type(value) is int and value == float(value):  # mypy takes an int for a float
        return float(value)
    if type(value) is not float:
        raise _refused(value, [float])
    if not math.isfinite(value):
        raise Misfit(f"must be finite: JSON has no word for {value}")
    return value


def decimal_text(value: Decimal) -> str:
    """Write a Decimal in plain notation; raise `Misfit` where that fills megabytes."""
    text = str(value)
    if "E" not in text and len(text) <= MOST_DIGITS:  # in plain notation, or not finite
        return text
    if abs(value.adjusted()) > MOST_DIGITS:
        raise Misfit(f"must have at most {MOST_DIGITS:,} digits in plain notation, not {value:.3e}")
    return format(value, "f")


def _datetime(value: datetime) -> object:
    """Take what has no zone, or a zone that is an offset of whole minutes.

    Others, such as `ZoneInfo("Europe/Berlin")`, come back as the offset of the
    moment: a week later, or past a change of clocks, that is another time.
    """
    if value.tzinfo is None:
        if value.fold:
            raise Misfit("must not have fold=1: JSON has no word for it")
        return value
    offset = value.tzinfo.utcoffset(None)
    if offset is None:
        raise Misfit(
            f"must have a fixed offset from UTC, not the zone {value.tzinfo}: store"
            " value.astimezone(UTC), and the zone's name in a field of its own"
        )
    if offset % _MINUTE:
        raise Misfit(f"must have an offset of whole minutes, not {offset}: use astimezone(UTC)")
    return value


def _time(value: time) -> object:
    """Write a time by itself: orjson 3.13 leaves a zero out where microseconds have five digits."""
    if value.tzinfo is not None or value.fold:
        raise Misfit("must be a time without a zone: store the zone in a field of its own")
    return value.isoformat()


def _leaf(cls: type, write: Write | None = None) -> Form:
    if write is None:
        return _exact(cls, lambda value: value, plain=frozenset({cls}))
    return _exact(cls, write)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


_EMPTY: Final[frozenset[type]] = frozenset()
_JSON_WORDS: Final[frozenset[type]] = frozenset({str, int, bool, NoneType})
_MINUTE: Final = timedelta(minutes=1)
_LEAVES: Final[dict[type[types.Type], Form]] = {
    types.AnyType: Form(_EMPTY, _json, plain=_JSON_WORDS),
    types.NoneType: _leaf(NoneType),
    types.BoolType: _leaf(bool),
    types.IntType: _leaf(int),
    types.FloatType: Form(frozenset({float, int}), _float),
    types.StrType: _leaf(str),
    types.UUIDType: _leaf(uuid.UUID),
    types.DecimalType: _leaf(Decimal, decimal_text),
    types.BytesType: _leaf(bytes, _base64),
    types.ByteArrayType: _leaf(bytearray, _base64),
    types.DateTimeType: _leaf(datetime, _datetime),
    types.DateType: _leaf(date),
    types.TimeType: _leaf(time, _time),
    types.TimeDeltaType: _leaf(timedelta, msgspec.to_builtins),
}


# --- The whole ---------------------------------------------------------------


def dumps(written: object) -> bytes:
    """Return what `writer` made as JSON; raise `Misfit`."""
    try:
        return orjson.dumps(written, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError as exc:
        raise _culprit(written, str(exc)) from None


def _culprit(written: object, reason: str) -> Misfit:
    """Find what orjson refuses: a whole number beyond 64 bits, text with a lone surrogate."""
    steps: Iterable[tuple[str, object]] = ()
    if isinstance(written, dict):
        fields = cast("dict[object, object]", written)
        steps = [(f".{ascii(name)[1:-1]}", item) for name, item in fields.items()]
    elif isinstance(written, list):
        steps = [(f"[{index}]", item) for index, item in enumerate(cast("list[object]", written))]
    for step, item in steps:
        try:
            orjson.dumps(item, option=orjson.OPT_NON_STR_KEYS)
        except orjson.JSONEncodeError as exc:
            return _culprit(item, str(exc)).within(step)
    return Misfit(reason[:1].lower() + reason[1:])
