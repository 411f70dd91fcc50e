"""Whatever a message is made of that may be declared, it comes back as it was written."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Optional, TypeAlias, cast

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqrs_es.codec import Codec, CommandCodec

if TYPE_CHECKING:
    from collections.abc import Callable

Kind: TypeAlias = "tuple[Any, st.SearchStrategy[Any]]"
"""A type that a field may have, and its values."""


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


minutes = st.integers(-14 * 60, 14 * 60).map(lambda n: timezone(timedelta(minutes=n)))
moments = st.datetimes(timezones=st.just(UTC)) | st.datetimes(
    datetime(2, 1, 1),  # noqa: DTZ001 - bounds are naive
    datetime(9998, 1, 1),  # noqa: DTZ001
    timezones=minutes,
)
times = st.times().map(lambda drawn: drawn.replace(fold=0))
KEYS: tuple[Kind, ...] = (
    (str, st.text(max_size=5)),
    (int, st.integers(-(2**63), 2**64 - 1)),
    (uuid.UUID, st.uuids()),
    (date, st.dates()),
    (time, times),
    (Colour, st.sampled_from(Colour)),
)
SIMPLE: tuple[Kind, ...] = (
    *KEYS,
    (bool, st.booleans()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (datetime, moments),
    (timedelta, st.timedeltas()),
    (bytes, st.binary(max_size=5)),
    (Level, st.sampled_from(Level)),
)


def _typed(origin: Any, *parts: Any) -> Any:
    """Return `origin[parts]`, of types that are values."""
    return origin[parts] if parts[1:] else origin[next(iter(parts))]


def _list(item: Kind) -> Kind:
    return _typed(list, item[0]), st.lists(item[1], max_size=3)


def _tuple(item: Kind) -> Kind:
    return _typed(tuple, item[0], ...), st.lists(item[1], max_size=3).map(tuple)


def _pair(first: Kind, second: Kind) -> Kind:
    return _typed(tuple, first[0], second[0]), st.tuples(first[1], second[1])


def _mapping(key: Kind, item: Kind) -> Kind:
    return _typed(dict, key[0], item[0]), st.dictionaries(key[1], item[1], max_size=3)


def _set(item: Kind) -> Kind:
    return _typed(frozenset, item[0]), st.frozensets(item[1], max_size=3)


def _optional(item: Kind) -> Kind:
    return _typed(Optional, item[0]), st.none() | item[1]


def _dataclass(items: list[Kind], defaults: list[bool], data: list[Any]) -> Kind:
    """Make a class whose last fields may have defaults."""
    fields: list[Any] = []
    for number, (shown_as, _) in enumerate(items):
        given_default = defaults[number] and all(defaults[number : len(items)])
        default = dataclasses.field(default_factory=_constant(data[number]))
        fields.append(
            (f"f{number}", shown_as, default) if given_default else (f"f{number}", shown_as)
        )
    made = dataclasses.make_dataclass("Made", fields, frozen=True)
    return made, st.builds(made, *(values for _, values in items))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


@st.composite
def dataclasses_of(draw: st.DrawFn, kinds: st.SearchStrategy[Kind]) -> Kind:
    """Draw a class, and what its fields hold where nothing is said."""
    items = draw(st.lists(kinds, min_size=1, max_size=4))
    defaults = [draw(st.booleans()) for _ in items]
    return _dataclass(items, defaults, [draw(values) for _, values in items])


def _containers(kinds: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    return st.one_of(
        st.builds(_list, kinds),
        st.builds(_tuple, kinds),
        st.builds(_pair, kinds, kinds),
        st.builds(_mapping, st.sampled_from(KEYS), kinds),
        st.builds(_set, st.sampled_from(KEYS)),
        st.builds(_optional, st.sampled_from(SIMPLE)),
        dataclasses_of(kinds),
    )


kinds = st.recursive(st.sampled_from(SIMPLE), _containers, max_leaves=6)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=100)
def test_whatever_is_declared_comes_back_as_it_was(data: st.DataObject) -> None:
    """Equal, of the same types at any depth, from every decoder; written again it is the same."""
    made, values = data.draw(dataclasses_of(kinds))
    value = data.draw(values)
    codec, commands = Codec[Any](made), CommandCodec[Any](made)
    written = codec.encode(value)
    for again in (codec.decode(written), codec.decode_exactly(written), commands.decode(written)):
        assert again == value
        assert _types_of(again) == _types_of(value)
        assert codec.encode(again) == written


def _types_of(value: Any) -> object:
    made = cast("type[object]", type(value))
    if dataclasses.is_dataclass(value):
        return made, [_types_of(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if made is dict:
        return made, [(_types_of(key), _types_of(item)) for key, item in value.items()]
    if made in {list, tuple}:
        return made, [_types_of(item) for item in value]
    if made is frozenset:
        return made, {cast("type[object]", type(item)) for item in value}
    return made, value.utcoffset() if made is datetime else None
