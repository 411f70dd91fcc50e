"""What a change of code breaks: what the comparison of schemas says, and what happens.

Each change is tried: rows of the old code are read by the new one, messages of old senders are
decided, and what the new code publishes is read by a subscriber with the old classes.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from types import new_class
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union

import jsonschema
import orjson
import pytest
from msgspec import Meta

from cqrs_es import Aggregate, View, command, errors, event
from cqrs_es.application import Application
from cqrs_es.messages import StoredEvent
from cqrs_es.schema import compare, describe
from cqrs_es.schema.compare import Audience, Verdict
from cqrs_es.schema.json_schema import schema_of
from cqrs_es.types import AggregateKey
from cqrs_es.upcasting import RawEvent, drops, renames, upcaster

if TYPE_CHECKING:
    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.types import JsonObject
    from cqrs_es.upcasting import Upcaster

Fields = Mapping[str, Any]
STORED, SENDERS, SUBSCRIBERS = Audience.STORED, Audience.SENDERS, Audience.SUBSCRIBERS


# --- Applications as they were and as they are ---------------------------------


@event
class Kept:
    pass


@command
class Keep:
    pass


def made(fields: Fields) -> type[Any]:
    """Make a class with these fields; a pair is a type and a default."""
    space: dict[str, Any] = {"__annotations__": {}}
    for name, given in fields.items():
        if isinstance(given, tuple):
            space["__annotations__"][name], space[name] = given
        else:
            space["__annotations__"][name] = given
    return type("Made", (), space)


def doing_nothing(*_: Any) -> None:
    """Stand for methods that nobody calls."""


def made_of(base: Any, fields: Fields, named: dict[str, str], *methods: str) -> type[Any]:
    """Make a dataclass of the framework's generic class, as an author would."""
    own = {name: value for name, value in vars(made(fields)).items() if name[:2] != "__"}
    space = {"__annotations__": made(fields).__annotations__, **own}
    space |= dict.fromkeys(methods, doing_nothing)
    cls: Any = new_class("Made", (base,), named, lambda given: given.update(space))
    decorate: Any = dataclass
    finished: type[Any] = decorate(cls)
    return finished


@dataclass(frozen=True)
class Side:
    """An application with one event and one command that have the same fields."""

    fields: Fields = field(default_factory=dict[str, Any])
    version: str = "1.0"
    name: str | None = "Change"
    upcasters: Sequence[Upcaster] = ()
    aggregate: str | None = "thing"

    def app(self) -> Application:
        app = Application("shop")
        if self.aggregate is not None:
            events: list[type[Any]] = [Kept]
            commands: list[type[Any]] = [Keep]
            if self.name is not None:
                events.append(event(self.name, version=self.version)(made(self.fields)))
                commands.append(command(self.name, version=self.version)(made(self.fields)))
            base: Any = Aggregate
            base = base[Union[tuple(commands)], Union[tuple(events)], None]  # noqa: UP007
            cls = made_of(base, {}, {"type": self.aggregate}, "handle", "apply")
            lifts = self.upcasters
            app.aggregate(cls, upcasters=lifts, command_upcasters=_one_to_one(lifts))
        return app

    def definition(self) -> AggregateDefinition | None:
        return self.app().registry.aggregates.get(self.aggregate or "")


def _one_to_one(lifts: Sequence[Upcaster]) -> list[Upcaster]:
    """Leave out what commands can't be: dropped."""
    return [each for each in lifts if each.becomes != ()]


@dataclass(frozen=True)
class Change:
    """A change, payloads that old and new code write, and for whom it is a break."""

    what: str
    old: Side
    new: Side
    written: Sequence[Any]
    published: Sequence[Any]
    broken: frozenset[Audience] = frozenset()
    written_version: str | None = None


def change(
    what: str,
    old: Fields | Side,
    new: Fields | Side,
    written: Sequence[Any],
    published: Sequence[Any],
    *broken: Audience,
    version: str | None = None,
) -> Change:
    sides = [side if isinstance(side, Side) else Side(side) for side in (old, new)]
    return Change(what, sides[0], sides[1], written, published, frozenset(broken), version)


# --- Trials ------------------------------------------------------------------------


def is_read(new: Side, name: str, version: str, payload: JsonObject) -> bool:
    """Try to read a stored event."""
    definition = new.definition()
    if definition is None or new.aggregate != "thing":
        return False
    stored = StoredEvent(
        key=AggregateKey("thing", "1"),
        sequence=1,
        event_type=name,
        event_version=version,
        payload=orjson.dumps(payload),
        metadata=b"{}",
        partition=0,
        offset=1,
        command_id=None,
        recorded_at=datetime.now(UTC),
    )
    try:
        definition.decode(stored)
    except errors.CqrsError:
        return False
    return True


def is_decided(new: Side, name: str, version: str, payload: JsonObject) -> bool:
    """Try to read a command, as far as its handler."""
    definition = new.definition()
    if definition is None or new.aggregate != "thing" or not definition.takes(name):
        return False
    try:
        definition.read(name, payload, version)
    except (errors.CqrsError, ValueError):
        return False
    return True


def is_understood(old: Side, new: Side, payload: JsonObject) -> bool:
    """Have the new code write an event; the old class reads it, and the old schema fits."""
    definition, known = new.definition(), old.definition()
    assert known is not None
    assert old.name is not None
    if definition is None or old.name not in definition.events:
        return False
    codec = definition.events[old.name].codec
    published = codec.encode(codec.convert(payload))
    assert orjson.loads(published) == payload, "not what the new code writes"
    try:
        known.events[old.name].codec.decode(published)
        jsonschema.validate(payload, schema_of(known.events[old.name].codec))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def tried(change: Change) -> set[Audience]:
    """Return who meets something that it can't read."""
    old, new = change.old, change.new
    assert old.name is not None
    version = change.written_version or old.version
    for payload in change.written:
        assert is_read(old, old.name, version, payload), "not what the old code reads"
    broken: set[Audience] = set()
    if not all(is_read(new, old.name, version, each) for each in change.written):
        broken.add(STORED)
    sent = [each for each in change.written if is_decided(old, old.name, version, each)]
    assert sent
    if not all(is_decided(new, old.name, version, each) for each in sent):
        broken.add(SENDERS)
    if not all(is_understood(old, new, each) for each in change.published):
        broken.add(SUBSCRIBERS)
    return broken


# --- Changes -----------------------------------------------------------------------


class Two(enum.Enum):
    A = "a"
    B = "b"


class Three(enum.Enum):
    A = "a"
    B = "b"
    C = "c"


@dataclass(frozen=True)
class Card:
    number: str


@dataclass(frozen=True)
class Cash:
    coins: int


@dataclass(frozen=True)
class Voucher:
    code: str


@dataclass(frozen=True)
class Place:
    x: int


@dataclass(frozen=True)
class Deep:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Needy:
    x: int
    y: int


@dataclass(frozen=True)
class Tree:
    leaf: int
    below: Tree | None = None


@dataclass(frozen=True)
class TextTree:
    leaf: str
    below: TextTree | None = None


ID: Final = str(uuid.UUID(int=7))
NATURAL: Final = Annotated[int, Meta(ge=0)]
POSITIVE: Final = Annotated[int, Meta(ge=1)]
SHORT: Final = Annotated[str, Meta(max_length=3)]
LONG: Final = Annotated[str, Meta(max_length=9)]
UPPER: Final = Annotated[str, Meta(pattern="^[A-Z]+$")]
ALL: Final = (STORED, SENDERS, SUBSCRIBERS)
READERS_OF_OLD: Final = (STORED, SENDERS)


@upcaster("Change", to="2.0")
def lifted(payload: JsonObject) -> JsonObject:
    return {**payload, "b": "lifted"}


@upcaster("Change", to="2.0")
def reshaped(payload: JsonObject) -> JsonObject:
    return {"b": str(payload.get("a", ""))}


@upcaster("Change", to="3.0")
def at_once(payload: JsonObject) -> JsonObject:
    return {"a": payload.get("a", 0), "b": payload.get("b", "lifted"), "c": 0}


@upcaster("Change", to="3.0")
def then(payload: JsonObject) -> JsonObject:
    return {**payload, "c": 0}


@upcaster("Change", to="2.0")
def split(payload: JsonObject) -> list[RawEvent]:
    return [RawEvent.of("Changed", "1.0", payload)]


A: Final[Fields] = {"a": int}
AB: Final[Fields] = {"a": int, "b": str}
ABC: Final[Fields] = {"a": int, "b": str, "c": int}

CHANGES = [
    change("nothing", A, A, [{"a": 1}], [{"a": 1}]),
    change(
        "a field with a default is added",
        A, {"a": int, "b": (str, "x")}, [{"a": 1}], [{"a": 1, "b": "y"}],
    ),
    change(
        "a field without one is added",
        A, AB, [{"a": 1}], [{"a": 1, "b": "y"}], *READERS_OF_OLD,
    ),
    change(
        "a field is removed", AB, A, [{"a": 1, "b": "x"}], [{"a": 1}], SENDERS, SUBSCRIBERS
    ),
    change(
        "a field with a default is removed",
        {"a": int, "b": (int, 0)}, A, [{"a": 1}, {"a": 1, "b": 2}], [{"a": 1}], SENDERS,
    ),
    change("a field gets a default", A, {"a": (int, 0)}, [{"a": 1}], [{"a": 0}]),
    change(
        "a field loses its default", {"a": (int, 0)}, A, [{}, {"a": 1}], [{"a": 1}], *READERS_OF_OLD
    ),
    change("int to float", A, {"a": float}, [{"a": 1}], [{"a": 1.5}], SUBSCRIBERS),
    change("float to int", {"a": float}, A, [{"a": 1.5}], [{"a": 1}], *READERS_OF_OLD),
    change("int to str", A, {"a": str}, [{"a": 1}], [{"a": "1"}], *ALL),
    change(
        "str to Decimal", {"a": str}, {"a": Decimal}, [{"a": "x"}], [{"a": "1.5"}], *READERS_OF_OLD
    ),
    change(
        "Decimal to str", {"a": Decimal}, {"a": str}, [{"a": "1.5"}], [{"a": "x"}], SUBSCRIBERS
    ),
    change(
        "int to Decimal", A, {"a": Decimal}, [{"a": 1}], [{"a": "1"}], SENDERS, SUBSCRIBERS
    ),
    change(
        "float to Decimal", {"a": float}, {"a": Decimal}, [{"a": 1.5}], [{"a": "1.5"}],
        SENDERS, SUBSCRIBERS,
    ),
    change(
        "Decimal to float", {"a": Decimal}, {"a": float}, [{"a": "1.5"}], [{"a": 1.5}], *ALL
    ),
    change("bool to int", {"a": bool}, A, [{"a": True}], [{"a": 1}], *ALL),
    change(
        "a list to a set",
        {"a": list[int]}, {"a": frozenset[int]}, [{"a": [1, 1]}], [{"a": [1]}],
    ),
    change("str to UUID", {"a": str}, {"a": uuid.UUID}, [{"a": "x"}], [{"a": ID}], *READERS_OF_OLD),
    change(
        "date to datetime",
        {"a": date},
        {"a": datetime},
        [{"a": "2027-01-02"}],
        [{"a": "2027-01-02T03:04:05+00:00"}],
        *ALL,
    ),
    change("int to int or nothing", A, {"a": int | None}, [{"a": 1}], [{"a": None}], SUBSCRIBERS),
    change(
        "int or nothing to int", {"a": int | None}, A, [{"a": None}], [{"a": 1}], *READERS_OF_OLD
    ),
    change(
        "a value is added to an enum", {"a": Two}, {"a": Three}, [{"a": "b"}], [{"a": "c"}],
        SUBSCRIBERS,
    ),
    change(
        "a value is removed from an enum", {"a": Three}, {"a": Two}, [{"a": "c"}], [{"a": "b"}],
        *READERS_OF_OLD,
    ),
    change("an enum becomes a Literal", {"a": Two}, {"a": Literal["a", "b"]}, [{"a": "b"}],
           [{"a": "a"}]),
    change("a Literal becomes str", {"a": Literal["a"]}, {"a": str}, [{"a": "a"}], [{"a": "z"}],
           SUBSCRIBERS),
    change("str becomes a Literal", {"a": str}, {"a": Literal["a"]}, [{"a": "z"}], [{"a": "a"}],
           *READERS_OF_OLD),
    change("a bound is narrower", {"a": NATURAL}, {"a": POSITIVE}, [{"a": 0}], [{"a": 1}],
           *READERS_OF_OLD),
    change("a bound is wider", {"a": POSITIVE}, {"a": NATURAL}, [{"a": 1}], [{"a": 0}],
           SUBSCRIBERS),
    change("a bound is added", A, {"a": NATURAL}, [{"a": -1}], [{"a": 0}], *READERS_OF_OLD),
    change("a text may be longer", {"a": SHORT}, {"a": LONG}, [{"a": "abc"}], [{"a": "abcd"}],
           SUBSCRIBERS),
    change("a pattern is added", {"a": str}, {"a": UPPER}, [{"a": "a"}], [{"a": "A"}],
           *READERS_OF_OLD),
    change("other items", {"a": list[int]}, {"a": list[str]}, [{"a": [1]}], [{"a": ["x"]}], *ALL),
    change("a longer tuple", {"a": tuple[int, int]}, {"a": tuple[int, int, int]}, [{"a": [1, 2]}],
           [{"a": [1, 2, 3]}], *ALL),
    change("a list becomes a tuple", {"a": list[int]}, {"a": tuple[int, int]}, [{"a": [1]}],
           [{"a": [1, 2]}], *READERS_OF_OLD),
    change("a field inside gets a default beside it", {"a": Place}, {"a": Deep}, [{"a": {"x": 1}}],
           [{"a": {"x": 1, "y": 2}}]),
    change("a field inside is needed", {"a": Place}, {"a": Needy}, [{"a": {"x": 1}}],
           [{"a": {"x": 1, "y": 2}}], *READERS_OF_OLD),
    change("a class inside is called otherwise", {"a": Needy}, {"a": Deep},
           [{"a": {"x": 1, "y": 2}}], [{"a": {"x": 1, "y": 2}}]),
    change("a choice is added", {"a": Card | Cash}, {"a": Card | Cash | Voucher},
           [{"a": {"type": "Cash", "coins": 1}}], [{"a": {"type": "Voucher", "code": "x"}}],
           SUBSCRIBERS),
    change("a choice is removed", {"a": Card | Cash | Voucher}, {"a": Card | Cash},
           [{"a": {"type": "Voucher", "code": "x"}}], [{"a": {"type": "Cash", "coins": 1}}],
           *READERS_OF_OLD),
    change("one class becomes a choice", {"a": Card}, {"a": Card | Cash}, [{"a": {"number": "1"}}],
           [{"a": {"type": "Card", "number": "1"}}, {"a": {"type": "Cash", "coins": 1}}], *ALL),
    change("other values of a dict", {"a": dict[str, int]}, {"a": dict[str, str]},
           [{"a": {"k": 1}}], [{"a": {"k": "v"}}], *ALL),
    change("a dict becomes a class", {"a": dict[str, int]}, {"a": Place}, [{"a": {"k": 1}}],
           [{"a": {"x": 1}}], *READERS_OF_OLD),
    change("anything becomes int", {"a": Any}, A, [{"a": "x"}], [{"a": 1}], *READERS_OF_OLD),
    change("int becomes anything", A, {"a": Any}, [{"a": 1}], [{"a": "x"}], SUBSCRIBERS),
    change("something deep in a tree", {"a": Tree}, {"a": TextTree},
           [{"a": {"leaf": 1, "below": None}}], [{"a": {"leaf": "x", "below": None}}], *ALL),
    change("a new version with an upcaster that adds", A, Side(AB, "2.0", upcasters=[lifted]),
           [{"a": 1}], [{"a": 1, "b": "x"}]),
    change("a new version with an upcaster that changes",
           A, Side({"b": str}, "2.0", upcasters=[reshaped]), [{"a": 1}], [{"b": "x"}], SUBSCRIBERS),
    change("a new version that reads the old one", A, Side({"a": (int, 0)}, "2.0"), [{"a": 1}],
           [{"a": 1}]),
    change("a new version that does not", A, Side(AB, "2.0"), [{"a": 1}], [{"a": 1, "b": "x"}],
           *READERS_OF_OLD),
    change("an older version", Side(A, "2.0"), A, [{"a": 1}], [{"a": 1}], *READERS_OF_OLD),
    change("an upcaster is removed", Side(AB, "2.0", upcasters=[lifted]), Side(AB, "2.0"),
           [{"a": 1}], [{"a": 1, "b": "x"}], *READERS_OF_OLD, version="1.0"),
    change("two upcasters become one", Side(ABC, "3.0", upcasters=[lifted, then]),
           Side(ABC, "3.0", upcasters=[at_once]), [{"a": 1}], [{"a": 1, "b": "x", "c": 2}],
           version="1.0"),
    change("an upcaster is added before another", Side(AB, "2.0", upcasters=[lifted]),
           Side(ABC, "3.0", upcasters=[lifted, then]), [{"a": 1}],
           [{"a": 1, "b": "x", "c": 2}], version="1.0"),
    change("a name is changed", A, Side(A, name="Changed"), [{"a": 1}], [{"a": 1}], *ALL),
    change("a name is changed, and said to be",
           A, Side(A, name="Changed", upcasters=[renames("Change", "Changed")]), [{"a": 1}],
           [{"a": 1}], SUBSCRIBERS),
    change("a name is changed, and with it a type",
           A, Side({"a": str}, name="Changed", upcasters=[renames("Change", "Changed")]),
           [{"a": 1}], [{"a": "x"}], *ALL),
    change("an event is dropped, and the command with it",
           A, Side(name=None, upcasters=[drops("Change")]), [{"a": 1}], [{}], SENDERS, SUBSCRIBERS),
    change("event and command are removed", A, Side(name=None), [{"a": 1}], [{}], *ALL),
    change("the aggregate is removed", A, Side(aggregate=None), [{"a": 1}], [{}], *ALL),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_what_is_said_of_a_change_is_what_happens(change: Change) -> None:
    """Three ways to know whom a change breaks agree: the table, a trial, the comparison."""
    assert tried(change) == change.broken
    found = compare(described(change.old), described(change.new))
    said = {each.audience for each in found if each.verdict is Verdict.BREAK}
    assert said == change.broken, found
    assert all(each.what and each.remedy for each in found)


def described(side: Side) -> dict[str, Any]:
    """Describe an application, as it is committed."""
    loaded: dict[str, Any] = orjson.loads(orjson.dumps(describe(side.app().registry, "shop")))
    return loaded


def test_a_finding_says_where_it_is() -> None:
    """By the names on the wire, as deep as it is."""
    old, new = Side({"a": list[Place]}), Side({"a": list[Needy]})
    found = {
        (each.audience, each.type, each.field)
        for each in compare(described(old), described(new))
        if each.verdict is Verdict.BREAK
    }
    assert found == {
        (STORED, "event thing.Change", "a[].y"),
        (SENDERS, "command thing.Change", "a[].y"),
    }


def test_a_pair_that_fails_once_fails_again() -> None:
    """What was tried in vain for one of several choices is no less wrong in the next field."""
    old = Side({"a": Place | str, "b": Place})
    new = Side({"a": Needy | str, "b": Needy})
    fields = {each.field for each in compare(described(old), described(new))}
    assert {"a.y", "b.y"} <= fields


def test_a_renamed_aggregate_is_another_one() -> None:
    """Its events are nobody's, its commands refused; subscribers meet them under another name."""
    found = compare(described(Side(A)), described(Side(A, aggregate="object")))
    verdicts = {(each.audience, each.verdict) for each in found}
    assert verdicts == {
        (STORED, Verdict.BREAK),
        (SENDERS, Verdict.BREAK),
        (SUBSCRIBERS, Verdict.WARNING),
    }


# --- Views, keys, services ------------------------------------------------------------


def with_view(fields: Fields) -> Application:
    app = Side(A).app()
    app.view(made_of(View[Kept], fields, {"name": "seen"}, "update"))
    return app


VIEWS: Final[list[tuple[str, Fields, Fields, JsonObject, JsonObject, set[Any]]]] = [
    ("nothing", {"n": (int, 0)}, {"n": (int, 0)}, {"n": 1}, {"n": 1}, set()),
    ("a field more", {"n": (int, 0)}, {"n": (int, 0), "m": (int, 0)}, {"n": 1}, {"n": 1, "m": 1},
     {(STORED, Verdict.WARNING)}),
    ("a field less", {"n": (int, 0), "m": (int, 0)}, {"n": (int, 0)}, {"n": 1, "m": 1}, {"n": 1},
     {(SUBSCRIBERS, Verdict.WARNING)}),
    ("another type", {"n": (int, 0)}, {"n": (str, "")}, {"n": 1}, {"n": "x"},
     {(STORED, Verdict.REBUILD), (SUBSCRIBERS, Verdict.BREAK)}),
    ("a wider type", {"n": (int, 0)}, {"n": (int | None, None)}, {"n": 1}, {"n": None},
     {(SUBSCRIBERS, Verdict.BREAK)}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "row", "later", "expected"), VIEWS)
def test_what_is_said_of_a_view_is_what_happens(
    what: str, old: Fields, new: Fields, row: JsonObject, later: JsonObject, expected: set[Any]
) -> None:
    """A rebuild is asked for where rows can't be read, a break told where readers can't."""
    before, after = with_view(old), with_view(new)
    codecs: list[Any] = [app.registry.projections["seen"] for app in (before, after)]
    readable = {
        (STORED, Verdict.REBUILD): _reads(codecs[1].state, row),
        (SUBSCRIBERS, Verdict.BREAK): _reads(codecs[0].state, later),
    }
    found = compare(describe(before.registry, "shop"), describe(after.registry, "shop"))
    said = {(each.audience, each.verdict) for each in found}
    assert said == expected, what
    assert {key for key, fits in readable.items() if not fits} == said & readable.keys()


def _reads(codec: Any, row: JsonObject) -> bool:
    try:
        codec.convert(row)
    except ValueError:
        return False
    return True


def test_a_view_that_follows_more_is_to_be_rebuilt() -> None:
    """Its rows know nothing of the older ones of that event."""
    old, new = with_view({"n": (int, 0)}), Side(A).app()
    described_old, described_new = (describe(app.registry, "shop") for app in (old, old))
    described_new["views"]["seen"]["events"] = ["Change", "Kept"]
    (found,) = compare(described_old, described_new)
    assert (found.verdict, found.audience) == (Verdict.REBUILD, STORED)
    assert "rebuild seen" in found.remedy
    (gone,) = compare(described_old, describe(new.registry, "shop"))
    assert (gone.verdict, gone.audience) == (Verdict.BREAK, SUBSCRIBERS)


@pytest.mark.parametrize(
    ("had", "has", "expected"),
    [
        (False, True, {(STORED, Verdict.REBUILD)}),
        (True, False, {(SENDERS, Verdict.WARNING)}),
        (True, True, set[Any]()),
    ],
)
def test_unique_keys_come_and_go(had: bool, has: bool, expected: set[Any]) -> None:  # noqa: FBT001
    """Those that come are not taken yet by what is there."""
    old, new = described(Side(A)), described(Side(A))
    old["aggregates"]["thing"]["unique_keys"] = had
    new["aggregates"]["thing"]["unique_keys"] = has
    assert {(each.audience, each.verdict) for each in compare(old, new)} == expected


def test_another_service_has_other_queues() -> None:
    """Whoever sends or subscribes is lost."""
    old, new = described(Side(A)), described(Side(A)) | {"service": "store"}
    assert {each.audience for each in compare(old, new)} == {SENDERS, SUBSCRIBERS}


def test_another_format_is_refused() -> None:
    """Rather than misunderstood."""
    old = described(Side(A)) | {"format": 2}
    with pytest.raises(errors.ConfigurationError, match="has the format 2"):
        compare(old, described(Side(A)))
