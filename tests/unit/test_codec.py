"""JSON in and out: strict towards senders, lenient towards the log, exact towards snapshots."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypedDict

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.codec import Codec, CommandCodec, to_json

D = Decimal


@dataclass(frozen=True)
class Line:
    price: Decimal
    note: str = ""


class Size(NamedTuple):
    width: Decimal
    unit: str


class Options(TypedDict, total=False):
    gift: bool
    tip: Decimal


@dataclass(frozen=True)
class Node:
    value: Decimal
    left: Node | None = None
    children: list[Node] = field(default_factory=list["Node"])


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Order:
    total: Decimal
    line: Line | None = None
    lines: list[Line] = field(default_factory=list[Line])
    by_name: dict[str, Line] = field(default_factory=dict[str, Line])
    prices: dict[str, Decimal] = field(default_factory=dict[str, Decimal])
    pair: tuple[Decimal, Line] | None = None
    many: tuple[Decimal, ...] = ()
    size: Size | None = None
    options: Options | None = None
    tree: Node | None = None
    maybe: Decimal | None = None
    either: Decimal | int | bool | None = None
    several: list[Line] | Line | None = None
    tags: set[str] = field(default_factory=set[str])


ORDER = CommandCodec(Order)


def refusal_of(payload: dict[str, object]) -> str:
    with pytest.raises(errors.InvalidCommand) as refused:
        ORDER.convert({"total": "1", **payload})
    return refused.value.message


# --- Strictness towards senders ----------------------------------------------

LINE = {"price": "1.50"}
BAD_LINE = {"price": 1.5}
EXTRA = {"price": "1.50", "x": 1}


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"total": 1}, "total"),
        ({"line": BAD_LINE}, "line.price"),
        ({"lines": [LINE, BAD_LINE]}, "lines[1].price"),
        ({"by_name": {"a": BAD_LINE}}, "by_name.'a'.price"),
        ({"prices": {"a": "1_000"}}, "prices.'a'"),
        ({"pair": ["1.5", BAD_LINE]}, "pair[1].price"),
        ({"pair": ["٣", LINE]}, "pair[0]"),
        ({"many": ["1", "2", " 3"]}, "many[2]"),
        ({"size": ["NaN", "cm"]}, "size[0]"),
        ({"options": {"tip": 1}}, "options.tip"),
        ({"tree": {"value": "1", "left": {"value": 1}}}, "tree.left.value"),
        (
            {"tree": {"value": "1", "children": [{"value": "1", "left": {"value": ""}}]}},
            "tree.children[0].left.value",
        ),
        ({"maybe": 1}, "maybe"),
        ({"maybe": "1e3"}, "maybe"),
        ({"either": "1e3"}, "either"),
        ({"either": 1.5}, "either"),
        ({"several": BAD_LINE}, "several.price"),
        ({"several": [BAD_LINE]}, "several[0].price"),
    ],
)
def test_a_sloppy_decimal_is_found_at_any_depth(payload: dict[str, object], path: str) -> None:
    """The refusal names the way to it."""
    assert refusal_of(payload).startswith(f"{path}: must be a decimal number")


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"x": 1}, "'x'"),
        ({"line": EXTRA}, "'line.x'"),
        ({"lines": [LINE, EXTRA]}, "'lines[1].x'"),
        ({"by_name": {"a": EXTRA}}, "\"by_name.'a'.x\""),
        ({"pair": ["1", EXTRA]}, "'pair[1].x'"),
        ({"options": {"gift": True, "x": 1}}, "'options.x'"),
        ({"tree": {"value": "1", "left": {"value": "1", "x": 1}}}, "'tree.left.x'"),
        ({"several": EXTRA}, "'several.x'"),
        ({"several": [EXTRA]}, "'several[0].x'"),
    ],
)
def test_an_unknown_field_is_found_at_any_depth(payload: dict[str, object], path: str) -> None:
    """It may be a misspelt optional one, so ignoring it would lose what the sender meant."""
    assert refusal_of(payload).startswith(f"unknown field {path}; known are ")


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"line": 1}, "line: "),
        ({"line": {"price": "1", "note": 5}}, "line.note: "),
        ({"lines": {}}, "lines: "),
        ({"lines": [1]}, "lines[0]: "),
        ({"pair": ["1"]}, "pair: "),
        ({"tree": {}}, "tree: "),
        ({"tags": [1]}, "tags[0]: "),
        ({"by_name": {"a": 1}}, "by_name[...]: "),
    ],
)
def test_any_other_misfit_names_its_field_too(payload: dict[str, object], expected: str) -> None:
    """Whichever layer finds it."""
    assert refusal_of(payload).startswith(expected)


@pytest.mark.parametrize("payload", [None, [], "x", 5, True])
def test_a_payload_is_an_object(payload: object) -> None:
    """Nothing else is a command."""
    with pytest.raises(errors.InvalidCommand, match="expected `object`"):
        ORDER.convert(payload)


def test_what_fits_is_taken_at_any_depth() -> None:
    """The strict check refuses nothing that is right."""
    order = ORDER.convert(
        {
            "total": "-1.50",
            "line": LINE,
            "lines": [LINE],
            "by_name": {"a": LINE},
            "prices": {"a": "0"},
            "pair": ["1", LINE],
            "many": ["1", "2"],
            "size": ["1", "cm"],
            "options": {"tip": "0.5"},
            "tree": {"value": "1", "left": {"value": "2"}, "children": [{"value": "3"}]},
            "maybe": None,
            "either": 5,
            "several": [LINE],
            "tags": ["b", "a", "b"],
        }
    )
    line = Line(D("1.50"))
    assert order == Order(
        total=D("-1.50"),
        line=line,
        lines=[line],
        by_name={"a": line},
        prices={"a": D(0)},
        pair=(D(1), line),
        many=(D(1), D(2)),
        size=Size(D(1), "cm"),
        options={"tip": D("0.5")},
        tree=Node(D(1), Node(D(2)), [Node(D(3))]),
        maybe=None,
        either=5,
        several=[line],
        tags={"a", "b"},
    )


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_every_decimal_survives(value: Decimal) -> None:
    """Decimals are written in plain notation, which is what a command must have."""
    order = Order(total=value)
    assert ORDER.decode(ORDER.encode(order)).total == value
    assert Codec(Order).decode(ORDER.encode(order)).total == value


@given(st.text())
def test_what_is_taken_for_a_decimal_is_ascii(text: str) -> None:
    """Either a refusal, or the plain form."""
    try:
        total = ORDER.convert({"total": text}).total
    except errors.InvalidCommand:
        return
    assert text.isascii()
    assert set(text) <= set("-0123456789.")
    assert total == D(text)


# --- Leniency towards the log, exactness towards snapshots -------------------


def test_an_event_may_have_fields_that_the_code_no_longer_knows() -> None:
    """A field that was removed needs no upcaster."""
    assert Codec(Line).decode(b'{"price":"1","gone":true}') == Line(D(1))


def test_an_event_may_lack_fields_that_have_a_default() -> None:
    """Nor does a field that was added with one."""
    assert Codec(Line).decode(b'{"price":"1"}') == Line(D(1), "")


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null", b"{}", b'{"price":[]}'])
def test_what_does_not_fit_is_a_value_error(payload: bytes) -> None:
    """Callers make of it what it means to them."""
    with pytest.raises(ValueError, match=r"."):
        Codec(Line).decode(payload)


def test_a_snapshot_must_be_what_would_be_stored_today() -> None:
    """Whatever it has more or less, the events know better."""
    codec = Codec(Line)
    assert codec.decode_exactly(b'{"note":"n","price":"1"}') == Line(D(1), "n")
    for other in (b'{"price":"1"}', b'{"price":"1","note":"","gone":1}', b'{"price":1,"note":""}'):
        with pytest.raises(ValueError, match="another shape"):
            codec.decode_exactly(other)
    with pytest.raises(ValueError, match="price"):
        codec.decode_exactly(b'{"incompatible":"structure"}')


@dataclass
class Before:
    count: int = 0


@dataclass
class After:
    count: int = 0
    colour: str = "red"
    inner: list[Before] = field(default_factory=list[Before])


def test_a_snapshot_without_a_field_is_no_state_to_go_on_from() -> None:
    """Not even where the field has a default: the events say what it should be."""
    with pytest.raises(ValueError, match="another shape"):
        Codec(After).decode_exactly(Codec(Before).encode(Before(5)))
    with pytest.raises(ValueError, match="another shape"):
        Codec(After).decode_exactly(b'{"count":5,"colour":"red","inner":[{}]}')


def test_what_is_written_has_every_field_in_the_order_of_the_class() -> None:
    """Also a value that was read from JSON without them, and changed since."""
    codec = Codec(After)
    value = codec.decode(b'{"inner":[{}]}')
    value.count = 1
    assert codec.encode(value) == b'{"count":1,"colour":"red","inner":[{"count":0}]}'


@dataclass
class Chain:
    length: int = 1
    next: Chain | None = None


def test_a_class_inside_itself_is_written_whole_too() -> None:
    """However deep."""
    codec = Codec(Chain)
    value = codec.decode(b'{"next":{"next":{}}}')
    inner = b'{"length":1,"next":{"length":1,"next":null}}'
    assert codec.encode(value) == b'{"length":1,"next":' + inner + b"}"


@given(st.sets(st.decimals(allow_nan=False, allow_infinity=False), max_size=3))
def test_decimals_in_sets_are_written_in_plain_notation_too(prices: set[Decimal]) -> None:
    """Wherever a Decimal stands."""
    codec = CommandCodec(Priced)
    assert codec.decode(codec.encode(Priced(prices))) == Priced(prices)


@dataclass(frozen=True)
class Priced:
    prices: set[Decimal]


@dataclass
class Everything:
    when: datetime
    day: date
    id: uuid.UUID
    colour: Colour
    raw: bytes
    numbers: dict[int, str]
    ids: frozenset[int]
    size: Size
    ratio: float


def test_what_json_has_no_words_for_survives_too() -> None:
    """Times, ids, enums, bytes, sets, named tuples, numeric keys."""
    value = Everything(
        when=datetime(2026, 11, 23, 7, 0, 0, 5, tzinfo=UTC),
        day=date(2026, 11, 23),
        id=uuid.UUID(int=7),
        colour=Colour.RED,
        raw=b"\x00\xff",
        numbers={1: "one"},
        ids=frozenset({1}),
        size=Size(D("1.5"), "cm"),
        ratio=0.1,
    )
    codec = Codec(Everything)
    assert codec.decode(codec.encode(value)) == value
    assert codec.decode_exactly(codec.encode(value)) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (D("1E+3"), b'"1000"'),
        (D("1E-3"), b'"0.001"'),
        (D("-0"), b'"-0"'),
        (D("200.00"), b'"200.00"'),
        (D("NaN"), b'"NaN"'),
        ({"a": D("1E+2")}, b'{"a":"100"}'),
    ],
)
def test_decimals_are_written_in_plain_notation(value: object, expected: bytes) -> None:
    """The decimals that were given are kept."""
    assert to_json(value) == expected


# --- What is refused at start-up ---------------------------------------------


class NoDataclass:
    pass


@dataclass
class Underscore:
    _hidden: int = 0


@dataclass
class NoInit:
    derived: int = field(default=0, init=False)


@dataclass
class Function:
    call: Callable[[], int]


@dataclass
class Keys:
    by_price: dict[Decimal, str]


@dataclass
class UnderscoreInside:
    hidden: list[Underscore]


@dataclass
class TwoObjects:
    either: Line | Node


@dataclass
class Missing:
    gone: Gone  # type: ignore[name-defined]  # noqa: F821 # pyright: ignore[reportUndefinedVariable]


@dataclass
class Inside:
    functions: list[Function]


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (NoDataclass, "NoDataclass must be a dataclass"),
        (Underscore, "Underscore._hidden would not be stored"),
        (NoInit, "NoInit.derived would not be stored"),
        (Function, "Function.call can't be stored: JSON can't carry a Callable"),
        (Keys, "Keys.by_price can't be stored: the keys of a JSON object are"),
        (UnderscoreInside, "Underscore._hidden would not be stored"),
        (TwoObjects, "TwoObjects has a field that JSON can't carry"),
        (Missing, "Missing has a field that JSON can't carry"),
        (Inside, "Function.call can't be stored: JSON can't carry a Callable"),
    ],
)
@pytest.mark.parametrize("codec", [Codec, CommandCodec])
def test_what_json_would_lose_is_refused_at_start_up(
    codec: type[Codec[Any]], cls: type[object], expected: str
) -> None:
    """The message names class and field, and says what to do."""
    with pytest.raises(errors.DefinitionError, match=expected):
        codec(cls)


def test_json_is_what_orjson_says() -> None:
    """Text stays UTF-8, keys keep their order."""
    assert to_json({"b": "ü", "a": None}) == orjson.dumps({"b": "ü", "a": None})
