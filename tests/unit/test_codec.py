"""JSON in and out: strict towards senders, lenient towards the log, exact towards snapshots."""

from __future__ import annotations

import collections
import dataclasses
import enum
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.codec import Codec, CommandCodec, to_json

D = Decimal
FIVE = D(5)
X = TypeVar("X")
Y = TypeVar("Y")
BERLIN = ZoneInfo("Europe/Berlin")


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


# --- Refused, or the same value back ------------------------------------------


@dataclass(frozen=True)
class Item:
    sku: str


@dataclass(frozen=True)
class Gift(Item):
    note: str = ""


class Word(str):
    """Text of a kind."""

    __slots__ = ()


class Rights(enum.IntFlag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True)
class Bag:
    item: Item | None = None
    items: tuple[Item, ...] = ()
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    at: datetime | None = None
    day: date | None = None
    hour: time | None = None
    lasts: timedelta | None = None
    count: int = 0
    ratio: float = 0.0
    text: str = ""
    names: list[str] = field(default_factory=list[str])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    by_number: dict[int, str] = field(default_factory=dict[int, str])
    tags: frozenset[str] = frozenset()
    colour: Colour | None = None
    size: Literal["s", "m"] = "s"
    rights: Rights = Rights.READ
    options: Options | None = None
    pair: tuple[int, str] | None = None
    raw: bytes = b""


@pytest.mark.parametrize(
    ("field_name", "value", "expected"),
    [
        ("item", Gift("a", note="hb"), r"item: must be Item or None, not Gift: declare the field"),
        ("items", (Item("a"), Gift("b")), r"items\[1\]: must be Item, not Gift: declare"),
        ("details", {"a": [datetime(2026, 1, 1, tzinfo=UTC)]}, r"details\.a\[0\]: would not come"),
        ("details", {"a": D(1)}, r"details\.a: would not come back as Decimal"),
        ("details", {"a": {"b": (1,)}}, r"details\.a\.b: would not come back as tuple"),
        ("details", {"a": {1}}, r"details\.a: would not come back as set"),
        ("details", {"a": Colour.RED}, r"details\.a: would not come back as Colour"),
        ("details", {"a": {1: 2}}, r"details\.a: must have keys of text"),
        ("details", {"a": float("inf")}, r"details\.a: must be finite"),
        ("details", {"a": 2**64}, r"details\.a: integer exceeds 64-bit range"),
        ("at", datetime(2026, 1, 1, tzinfo=BERLIN), r"at: must have a fixed offset from UTC"),
        (
            "at",
            datetime(2026, 1, 1, tzinfo=timezone(timedelta(seconds=30))),
            r"at: must have an offset of whole minutes",
        ),
        ("at", datetime(2026, 10, 25, 2, fold=1), r"at: must not have fold=1"),  # noqa: DTZ001
        ("day", datetime(2026, 1, 1, tzinfo=UTC), r"day: must be None or date, not datetime"),
        ("hour", time(5, tzinfo=UTC), r"hour: must be a time without a zone"),
        ("count", 2**64, r"count: integer exceeds 64-bit range"),
        ("count", -(2**63) - 1, r"count: integer exceeds 64-bit range"),
        ("count", True, r"count: must be int, not bool"),
        ("count", 1.0, r"count: must be int, not float"),
        ("ratio", float("nan"), r"ratio: must be finite"),
        ("ratio", 2**53 + 1, r"ratio: must be float, not int"),
        ("text", Word("a"), r"text: must be str, not Word"),
        ("text", "\ud800", r"text: str is not valid UTF-8"),
        ("names", ("a",), r"names: must be list, not tuple"),
        ("names", ["a", 5], r"names\[1\]: must be str, not int"),
        ("counts", collections.Counter("a"), r"counts: must be dict, not Counter"),
        ("counts", {"a": "b"}, r"counts\.a: must be int, not str"),
        ("counts", {"\ud800": 1}, r"counts: str is not valid UTF-8"),
        ("by_number", {"1": "a"}, r"by_number, a key: must be int, not str"),
        ("tags", {"a"}, r"tags: must be frozenset, not set"),
        ("colour", "red", r"colour: must be Colour or None, not str"),
        ("size", "l", r"size: must be one of 'm', 's'"),
        ("rights", Rights.READ | Rights.WRITE, r"rights: must be a member of Rights"),
        ("options", {"gone": 1}, r"options\.gone: is no key of its type"),
        ("options", {"tip": 1}, r"options\.tip: must be Decimal, not int"),
        ("pair", (1,), r"pair: must have 2 items, not 1"),
        ("pair", [1, "a"], r"pair: must be None or tuple, not list"),
    ],
)
def test_what_would_come_back_as_another_value_is_refused(
    field_name: str, value: Any, expected: str
) -> None:
    """When it is written, with the way to it: what is stored can't be fixed later."""
    with pytest.raises(errors.NotStorable, match=r"^Bag\." + expected):
        Codec(Bag).encode(dataclasses.replace(Bag(), **{field_name: value}))


@pytest.mark.parametrize(
    "value",
    [
        Bag(item=Item("a"), items=(Item("b"),), details={"a": [1, {"b": None}, 1.5, True, "x"]}),
        Bag(at=datetime(1, 1, 1, 5, tzinfo=UTC), day=date.max, hour=time(5, 6, 7, 8)),
        Bag(at=datetime(2026, 1, 1, 5, 0, 0, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30)))),
        Bag(at=datetime(2026, 1, 1)),  # noqa: DTZ001 - naive stays naive
        Bag(lasts=-timedelta(days=3, microseconds=1), count=2**64 - 1, ratio=1.5),
        Bag(names=["a"], counts={"a": 1}, by_number={1: "a"}, tags=frozenset("abc")),
        Bag(colour=Colour.RED, size="m", rights=Rights.WRITE, options={"tip": D(1)}, pair=(1, "a")),
        Bag(raw=b"\x00\xff"),
        Bag(hour=time(5, 6, 7, 45678)),  # orjson 3.13 leaves a zero out of such fractions
    ],
)
def test_what_is_written_comes_back_as_it_was(value: Bag) -> None:
    """Field by field, of the same types."""
    codec = Codec(Bag)
    again = codec.decode(codec.encode(value))
    assert repr(again) == repr(value) or again == value
    assert codec.decode_exactly(codec.encode(value)) == value


def test_utc_by_another_name_is_utc() -> None:
    """A zone whose offset never changes is as good as its offset; a whole number is a float."""
    codec = Codec(Bag)
    assert codec.decode(codec.encode(Bag(at=datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC"))))).at == (
        datetime(2026, 1, 1, tzinfo=UTC)
    )
    ratio = codec.decode(codec.encode(Bag(ratio=1))).ratio
    assert (ratio, type(ratio)) == (1.0, float)


def test_a_value_inside_itself_is_refused() -> None:
    """Not followed for ever."""
    bag = Bag()
    bag.details["itself"] = bag.details
    with pytest.raises(errors.NotStorable, match="has itself inside"):
        Codec(Bag).encode(bag)


@dataclass
class Sets:
    numbers: set[int] = field(default_factory=set[int])
    frozen: frozenset[Item] = frozenset()
    nested: dict[str, frozenset[frozenset[int]]] = field(
        default_factory=dict[str, frozenset[frozenset[int]]]
    )


def test_equal_sets_are_written_alike() -> None:
    """Whatever order they have in this process: 0 and 8 keep that in which they were put in."""
    one = Sets({0, 8}, frozenset([Item("a"), Item("b")]), {"a": frozenset([frozenset([0, 8])])})
    same = Sets({8, 0}, frozenset([Item("b"), Item("a")]), {"a": frozenset([frozenset([8, 0])])})
    assert list(one.numbers) != list(same.numbers)
    assert Codec(Sets).encode(one) == Codec(Sets).encode(same) == to_json(one) == to_json(same)
    assert Codec(Sets).decode_exactly(Codec(Sets).encode(same)) == one


SEEDED = """
from dataclasses import dataclass, field
from cqrs_es import Aggregate, command, event
from cqrs_es.commands import new_command
from cqrs_es.definitions import define_aggregate

@command
class Tag:
    tags: frozenset[str]

@event
class Tagged:
    tags: frozenset[str]

@dataclass
class Page(Aggregate[Tag, Tagged, None], type="page"):
    tags: set[str] = field(default_factory=lambda: {"a", "b", "c", "d"})

    def handle(self, command, services): ...
    def apply(self, event): ...

tags = frozenset("one two three four five".split())
definition = define_aggregate(Page)
for message in (Tag(tags), {"tags": tags}):
    print(new_command(Page, "P", message).content_hash() if isinstance(message, Tag) else
          new_command("page", "P", "Tag", message).content_hash())
print(definition.events["Tagged"].codec.encode(Tagged(tags)), definition.state.encode(Page()))
"""


def test_sets_are_written_alike_by_every_process() -> None:
    """Each has a hash seed of its own, and so another order of the text in its sets."""
    printed = {
        subprocess.run(
            [sys.executable, "-c", SEEDED],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
    first, second, _ = printed.pop().splitlines()
    assert first == second


# --- Unions of dataclasses ------------------------------------------------------


@dataclass(frozen=True)
class Card:
    number: str
    limit: Decimal = FIVE


@dataclass(frozen=True)
class Cash:
    __tag__ = "cash"
    amount: Decimal


class Visa(msgspec.Struct, tag=True, frozen=True):
    fee: Decimal


class Cheque(msgspec.Struct, tag=True, frozen=True):
    banks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Some(Generic[X]):
    value: X


@dataclass(frozen=True)
class Nothing:
    pass


@dataclass(frozen=True)
class Two(Some[list[X]], Generic[X, Y]):
    other: Y | None = None


@dataclass(frozen=True)
class Num:
    n: int


@dataclass(frozen=True)
class Sum:
    left: Sum | Num
    right: Sum | Num


@dataclass(frozen=True)
class Paid:
    how: Card | Cash
    or_text: Card | Cash | str | int = 5
    often: list[Card | Cash | None] = field(default_factory=list["Card | Cash | None"])
    by_day: dict[date, tuple[Card | Cash, ...]] = field(
        default_factory=dict[date, "tuple[Card | Cash, ...]"]
    )
    maybe: Some[date] | Nothing = Nothing()
    boxed: Some[Card | Cash] | None = None
    two: Two[Card | Cash, date] | None = None
    formula: Sum | Num | None = None
    struct: Visa | Cheque | None = None
    structs: list[Visa | Cheque] = field(default_factory=list["Visa | Cheque"])
    either: frozenset[Card | Cash] = frozenset()


PAID = Paid(
    how=Card("1"),
    or_text=Cash(D("1.50")),
    often=[Cash(D(2)), None, Card("2", D(3))],
    by_day={date(2026, 1, 1): (Card("3"),)},
    maybe=Some(date(2026, 1, 2)),
    boxed=Some(Cash(D(3))),
    two=Two([Card("4")], date(2026, 1, 3)),
    formula=Sum(Num(1), Sum(Num(2), Num(3))),
    struct=Cheque(frozenset({"a", "b"})),
    structs=[Visa(D("0.50")), Cheque()],
    either=frozenset({Card("5"), Cash(D(4))}),
)


@pytest.mark.parametrize("codec", [Codec, CommandCodec])
def test_a_union_of_dataclasses_says_which_one_it_is(codec: type[Codec[Any]]) -> None:
    """By the class's name, or the tag that it pins; also generic ones, and Structs of msgspec."""
    paid = codec(Paid)
    written = paid.encode(PAID)
    assert paid.decode(written) == PAID
    assert paid.decode_exactly(written) == PAID
    fields = orjson.loads(written)
    assert fields["how"] == {"type": "Card", "number": "1", "limit": "5"}
    assert fields["or_text"] == {"type": "cash", "amount": "1.50"}
    assert fields["maybe"] == {"type": "Some", "value": "2026-01-02"}
    assert fields["boxed"] == {"value": {"type": "cash", "amount": "3"}}
    assert fields["struct"] == {"type": "Cheque", "banks": ["a", "b"]}


def test_what_a_union_holds_may_lack_what_has_a_default() -> None:
    """As anywhere else in an event."""
    how = b'{"how":{"type":"Card","number":"1","gone":1}}'
    assert Codec(Paid).decode(how) == Paid(Card("1"))
    assert Codec(Paid).decode(b'{"how":{"type":"cash","amount":"1"},"or_text":"a"}').or_text == "a"


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"how": {"type": "Card", "number": "1", "x": 1}}, "unknown field 'how.x'; known are type"),
        ({"how": {"type": "Gone"}}, r"how\.type: must be one of Card, cash"),
        ({"how": {"type": ["Card"]}}, r"how\.type: must be one of Card, cash"),
        ({"how": {"number": "1"}}, r"how\.type: must be one of Card, cash"),
        ({"how": 5}, "how: expected `object`, got `int`"),
        ({"how": {"type": "cash", "amount": 5}}, r"how\.amount: must be a decimal number"),
        ({"how": {"type": "Card", "number": 5}}, r"how\.number: expected `str`"),
        ({"or_text": 1.5}, "or_text: expected `int"),
        ({"often": [{"type": "cash"}]}, r"often\[0\]: object missing required field `amount`"),
        ({"boxed": {"value": {"type": "x"}}}, r"boxed\.value\.type: must be one of"),
        ({"struct": {"type": "Visa", "fee": 1}}, r"struct\.fee: must be a decimal number"),
        ({"struct": {"type": "Visa", "fee": "1", "x": 1}}, r"unknown field 'struct\.x'"),
        ({"struct": {"type": "Gone"}}, r"struct\.type: invalid value 'Gone'"),
        (
            {"formula": {"type": "Sum", "left": {"type": "Num", "n": "x"}, "right": 1}},
            r"formula\.left\.n: expected `int`",
        ),
    ],
)
def test_a_sender_is_told_what_does_not_fit_a_union(
    payload: dict[str, object], expected: str
) -> None:
    """With the way to it, as for any field."""
    cash = {"type": "cash", "amount": "1"}
    with pytest.raises(errors.InvalidCommand, match="^" + expected):
        CommandCodec(Paid).convert({"how": cash, **payload})


def test_a_union_takes_only_its_members() -> None:
    """No other class, however alike."""
    other: Any = Num(1)
    with pytest.raises(errors.NotStorable, match=r"^Paid\.how: must be Card or Cash, not Num"):
        Codec(Paid).encode(Paid(other))
    with pytest.raises(
        errors.NotStorable, match=r"^Paid\.often\[0\]: must be Card or Cash or None"
    ):
        Codec(Paid).encode(Paid(Card("1"), often=[other]))


@dataclass(frozen=True)
class Range(Generic[X]):
    first: X
    last: X


@dataclass(frozen=True)
class Booked:
    period: Range[date]
    prices: Range[Decimal] | None = None


def test_generic_dataclasses_are_fields_like_others() -> None:
    """Each with the types that it is used with."""
    booked = Booked(Range(date(2026, 1, 1), date(2026, 1, 2)), Range(D(1), D(2)))
    codec = CommandCodec(Booked)
    assert codec.decode(codec.encode(booked)) == booked
    wrong: Any = Range(1, 2)
    with pytest.raises(errors.NotStorable, match=r"Booked\.period\.first: must be date, not int"):
        codec.encode(Booked(wrong))
    with pytest.raises(errors.InvalidCommand, match=r"prices\.last: must be a decimal number"):
        codec.convert(
            {
                "period": {"first": "2026-01-01", "last": "2026-01-02"},
                "prices": {"first": "1", "last": 2},
            }
        )


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
    either: Line | Options


class Elsewhere:
    @dataclass
    class Line:
        length: int


@dataclass
class OneNameTwice:
    either: Line | Elsewhere.Line


@dataclass
class Typed:
    type: str


@dataclass
class TagTaken:
    either: Line | Typed


@dataclass
class DefaultOfAnotherType:
    price: Decimal = 0  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


@dataclass
class DefaultInAZone:
    since: datetime = datetime(2026, 1, 1, tzinfo=BERLIN)


class Nameless(msgspec.Struct, array_like=True):
    x: int


@dataclass
class InAnArray:
    nameless: Nameless


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
        (OneNameTwice, "two classes of a union are called Line: give one of them a __tag__"),
        (TagTaken, "Typed.type has the name under which JSON says which class"),
        (DefaultOfAnotherType, "DefaultOfAnotherType.price: the default must be Decimal, not int"),
        (DefaultInAZone, "DefaultInAZone.since: the default must have a fixed offset from UTC"),
        (InAnArray, "Nameless can't be stored: fields without names"),
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


def test_times_have_all_digits_of_their_fractions() -> None:
    """Where no type is declared either: orjson 3.13 writes 07.045678 as 07.45678."""
    moment = datetime(2026, 11, 23, 5, 6, 7, 45678, tzinfo=UTC)
    expected = {"hour": "05:06:07.045678", "at": "2026-11-23T05:06:07.045678+00:00"}
    found = orjson.loads(to_json({"hour": moment.time(), "at": moment, "day": moment.date()}))
    assert found == expected | {"day": "2026-11-23"}
