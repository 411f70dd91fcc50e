"""What can be registered, and what is said about what can't."""
# mypy: disable-error-code="type-arg,misc"
# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Union

import pytest

from cqrs_es import Aggregate, Envelope, View, command, errors, event
from cqrs_es.application import Application
from cqrs_es.definitions import define_aggregate, define_projector, define_view
from cqrs_es.projector import Projector, SqlSession, physical_name
from cqrs_es.registry import RESERVED_NAMES, Registry
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

X = TypeVar("X")


@command
class Do:
    what: str


@command("Do")
class DoAgain:
    what: str


@event
class Done:
    what: str


@event("Done", version="2.0")
class DoneAgain:
    what: str


@event
class Stopped:
    pass


@dataclass
class Task(Aggregate[Do, Done, None], type="task"):
    done: int = 0

    def handle(self, command: Do, services: None) -> None:
        """Do nothing."""

    def apply(self, event: Done) -> None:
        """Do nothing."""


# --- What is right -----------------------------------------------------------


def test_a_definition_holds_what_the_type_arguments_say() -> None:
    """One class stands for itself, a union for its members."""
    definition = define_aggregate(Task)
    assert definition.type == "task"
    assert list(definition.commands) == ["Do"]
    assert list(definition.events) == ["Done"]
    assert list(definition.event_classes) == [Done]


def test_both_ways_to_write_a_union_are_read() -> None:
    """Old code says Union."""

    @dataclass
    class Old(Aggregate[Union[Do, Do], Union[Done, Stopped], None], type="old"):  # noqa: UP007, PYI016
        def handle(self, command: Do, services: None) -> None:
            """Do nothing."""

        def apply(self, event: Done | Stopped) -> None:
            """Do nothing."""

    assert set(define_aggregate(Old).events) == {"Done", "Stopped"}


def test_an_aggregate_may_inherit_its_type_arguments() -> None:
    """Its name it must have itself."""

    @dataclass
    class SpecialTask(Task, type="special"):
        pass

    assert define_aggregate(SpecialTask).type == "special"
    assert define_aggregate(Task).type == "task"


def test_names_and_versions_may_be_pinned() -> None:
    """So that classes can be renamed and moved."""

    @dataclass
    class Pinned(Aggregate[DoAgain, DoneAgain, None], type="pinned"):
        def handle(self, command: DoAgain, services: None) -> None:
            """Do nothing."""

        def apply(self, event: DoneAgain) -> None:
            """Do nothing."""

    definition = define_aggregate(Pinned)
    assert list(definition.commands) == ["Do"]
    assert definition.events["Done"].spec.version == "2.0"


# --- Messages ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "1st", "has space", "a/b", "x" * 65, "naïve"])
def test_a_message_must_have_a_name_of_the_contract(name: str) -> None:
    """Commands and events alike."""
    with pytest.raises(errors.DefinitionError, match="must match"):
        command(name)(type("X", (), {}))
    if name:
        with pytest.raises(errors.DefinitionError, match="must match"):
            event(name)(type("X", (), {}))


def test_a_message_is_frozen_and_slotted() -> None:
    """What has happened does not change."""
    with pytest.raises(AttributeError):
        setattr(Done("x"), "what", "y")  # noqa: B010 - what a type checker refuses
    assert not hasattr(Done("x"), "__dict__")


# --- Aggregates that are refused ---------------------------------------------


def undecorated() -> object:
    class Plain:
        pass

    @dataclass
    class Wrong(Aggregate[Plain, Done, None], type="wrong"):
        handle = Task.handle  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        apply = Task.apply

    return define_aggregate(Wrong)


def wrong_kind() -> object:
    @dataclass
    class Wrong(Aggregate[Done, Done, None], type="wrong"):
        handle = Task.handle  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
        apply = Task.apply

    return define_aggregate(Wrong)


def command_as_event() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Do, None], type="wrong"):
        handle = Task.handle
        apply = Task.apply  # type: ignore[assignment]

    return define_aggregate(Wrong)


def two_commands_of_one_name() -> object:
    @dataclass
    class Wrong(Aggregate[Do | DoAgain, Done, None], type="wrong"):
        def handle(self, command: Do | DoAgain, services: None) -> None:
            """Do nothing."""

        def apply(self, event: Done) -> None:
            """Do nothing."""

    return define_aggregate(Wrong)


def two_events_of_one_name() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done | DoneAgain, None], type="wrong"):
        def handle(self, command: Do, services: None) -> None:
            """Do nothing."""

        def apply(self, event: Done | DoneAgain) -> None:
            """Do nothing."""

    return define_aggregate(Wrong)


def no_type() -> object:
    @dataclass
    class Wrong(Task):
        pass

    return define_aggregate(Wrong)


def no_type_arguments() -> object:
    @dataclass
    class Wrong(Aggregate, type="wrong"):
        def handle(self, command: Any, services: Any) -> None:
            """Do nothing."""

        def apply(self, event: Any) -> None:
            """Do nothing."""

    return define_aggregate(Wrong)


def type_variable() -> object:
    @dataclass
    class Wrong(Aggregate[X, Done, None], type="wrong"):
        def handle(self, command: X, services: None) -> None:
            """Do nothing."""

        def apply(self, event: Done) -> None:
            """Do nothing."""

    return define_aggregate(Wrong)


def no_dataclass() -> object:
    class Wrong(Aggregate[Do, Done, None], type="wrong"):
        handle = Task.handle
        apply = Task.apply

    return define_aggregate(Wrong)


def no_defaults() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done, None], type="wrong"):
        name: str

        handle = Task.handle
        apply = Task.apply

    return define_aggregate(Wrong)


def first_state_is_lost() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done, None], type="wrong"):
        ratio: float = float("nan")

        handle = Task.handle
        apply = Task.apply

    return define_aggregate(Wrong)


def state_grows_by_reading() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done, None], type="wrong"):
        made: int = 0

        def __post_init__(self) -> None:
            self.made += 1

        handle = Task.handle
        apply = Task.apply

    return define_aggregate(Wrong)


def field_with_underscore() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done, None], type="wrong"):
        _hidden: int = 0

        handle = Task.handle
        apply = Task.apply

    return define_aggregate(Wrong)


def field_like_a_method() -> object:
    @dataclass
    class Wrong(Aggregate[Do, Done, None], type="wrong"):  # type: ignore[abstract,unused-ignore]
        apply: int = 0  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

        handle = Task.handle

    return define_aggregate(Wrong)


def bad_type_name() -> object:
    class Wrong(Aggregate[Do, Done, None], type="has space"):
        handle = Task.handle
        apply = Task.apply

    return Wrong


@pytest.mark.parametrize(
    ("define", "expected"),
    [
        (undecorated, "Plain is no message: decorate it"),
        (wrong_kind, "Done is declared with @event, but used as command"),
        (command_as_event, "Do is declared with @command, but used as event"),
        (two_commands_of_one_name, "two messages of .*Wrong have one name"),
        (two_events_of_one_name, "two messages of .*Wrong have one name"),
        (no_type, "Wrong has no type"),
        (no_type_arguments, r"Wrong must subclass Aggregate\[…, …, …\]"),
        (type_variable, "must be a class or a union of classes"),
        (no_dataclass, "Wrong must be a dataclass"),
        (no_defaults, r"Wrong\(\) must work without arguments"),
        (first_state_is_lost, r"Wrong\.ratio: the default must be finite"),
        (field_like_a_method, r"Wrong\.apply can't be a field: `apply` follows events; call the"),
        (state_grows_by_reading, r"Wrong\(\) changes when it is stored"),
        (field_with_underscore, "Wrong._hidden would not be stored"),
        (bad_type_name, "aggregate type 'has space' must match"),
    ],
)
def test_an_aggregate_that_could_not_be_run_or_stored_is_refused(
    define: Callable[[], object], expected: str
) -> None:
    """At start-up, naming the class and what is wrong."""
    with pytest.raises(errors.DefinitionError, match=expected):
        define()


@dataclass
class Clerk(Aggregate[Do, Done, dict[str, str]], type="clerk"):
    def handle(self, command: Do, services: dict[str, str]) -> None:
        """Do nothing."""

    def apply(self, event: Done) -> None:
        """Do nothing."""


@dataclass
class LoneClerk(Aggregate[Do, Done, Union[dict[str, str], None]], type="lone-clerk"):  # noqa: UP007 - as older code has it
    def handle(self, command: Do, services: dict[str, str] | None) -> None:
        """Do nothing."""

    def apply(self, event: Done) -> None:
        """Do nothing."""


def test_services_that_nobody_makes_are_missed_at_start_up() -> None:
    """Not by the first command; an aggregate that can do without may."""
    app = Application("desk")
    with pytest.raises(errors.DefinitionError, match=r"Clerk needs services: app.aggregate\(…"):
        app.aggregate(Clerk)
    app.aggregate(Clerk, services=lambda _: {})
    app.aggregate(LoneClerk)
    app.aggregate(Task)
    assert set(app.registry.aggregates) == {"clerk", "lone-clerk", "task"}


# --- Views and projectors ----------------------------------------------------


@dataclass
class Diary(View[Done], name="diary"):
    lines: list[str] = field(default_factory=list[str])

    def update(self, event: Envelope[Done]) -> None:
        self.lines.append(event.data.what)


class Tally(Projector[Done], name="tally"):
    tables: ClassVar[Mapping[str, str]] = {"tally": "n BIGINT", "tally_days": "n BIGINT"}

    async def project(self, events: Sequence[Envelope[Done]], sql: SqlSession) -> None:
        """Do nothing."""


def view_named(name: str) -> type[View[Done]]:
    return dataclass(type("V", (Diary,), {"update": Diary.update}, name=name))


def projector_with(name: str, *tables: str) -> type[Projector[Done]]:
    return type("P", (Tally,), {"tables": dict.fromkeys(tables, "n BIGINT")}, name=name)


@pytest.mark.parametrize("name", ["", "1st", "has space", "has-dash", "a__1", "x" * 41, "ä"])
def test_a_view_must_have_a_name_of_the_contract(name: str) -> None:
    """It becomes the name of a table; `__` stands before a generation's number."""
    with pytest.raises(errors.DefinitionError, match="must match"):
        view_named(name)
    with pytest.raises(errors.DefinitionError, match="must match"):
        projector_with(name)
    with pytest.raises(errors.DefinitionError, match="must match"):
        define_projector(projector_with("fine", name))


def test_a_view_must_have_a_name_and_a_first_state() -> None:
    """And say which events it folds."""

    @dataclass
    class Nameless(Diary):
        pass

    @dataclass
    class NoDefault(Diary, name="no_default"):
        title: str = field(kw_only=True)

    @dataclass
    class NoEvents(View, name="no_events"):
        def update(self, event: Envelope[Any]) -> None:
            """Do nothing."""

    class NamelessProjector(Tally):
        pass

    with pytest.raises(errors.DefinitionError, match="Nameless has no name"):
        define_view(Nameless)
    with pytest.raises(errors.DefinitionError, match=r"NoDefault\(\) must work without"):
        define_view(NoDefault)
    with pytest.raises(errors.DefinitionError, match=r"must subclass View\[…\]"):
        define_view(NoEvents)
    with pytest.raises(errors.DefinitionError, match=r"has no name: .*Projector\[…\]"):
        define_projector(NamelessProjector)


@pytest.mark.parametrize("name", ["update", "view_id", "deleted", "delete", "view_name"])
def test_a_field_in_place_of_what_a_view_does_is_refused(name: str) -> None:
    """It would fail at the first event, or hide what the framework asks for."""
    namespace = {"__annotations__": {name: int}, name: 0}
    cls: type[View[Done]] = dataclass(type("V", (Diary,), namespace, name="v"))
    with pytest.raises(errors.DefinitionError, match=f"V.{name} can't be a field: `{name}` "):
        define_view(cls)


@event
class Replaced(Generic[X]):
    old: X
    new: X


@event
class TitleReplaced(Replaced[str]):
    pass


def test_generic_messages_are_told_apart_by_their_names() -> None:
    """One is used with one type; for more there are subclasses."""

    @dataclass
    class Once(Aggregate[Do, Union[Replaced[int], TitleReplaced], None], type="once"):  # noqa: UP007 - as older code has it
        handle = Task.handle

        def apply(self, event: Any) -> None:
            """Do nothing."""

    @dataclass
    class Twice(Aggregate[Do, Union[Replaced[int], Replaced[str]], None], type="twice"):  # noqa: UP007 - as older code has it
        handle = Task.handle

        def apply(self, event: Any) -> None:
            """Do nothing."""

    definition = define_aggregate(Once)
    assert set(definition.event_classes) == {Replaced, TitleReplaced}
    with pytest.raises(errors.NotStorable, match=r"Replaced\.old: must be int, not str"):
        definition.event_classes[Replaced].codec.encode(Replaced("a", "b"))
    assert definition.event_classes[TitleReplaced].codec.encode(TitleReplaced("a", "b"))
    with pytest.raises(errors.DefinitionError, match="declare a subclass for each type"):
        define_aggregate(Twice)


def test_every_table_of_the_framework_is_reserved() -> None:
    """A table that is added later can't be taken by a view."""
    assert RESERVED_NAMES == FRAMEWORK_NAMES


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "EVENTS", "Diary", "TALLY_days"])
def test_a_name_belongs_to_one_view(name: str) -> None:
    """Case does not count, and the framework's tables are taken too."""
    registry = Registry()
    registry.add_projection(define_view(Diary))
    registry.add_projection(define_projector(Tally))
    for taken in (
        define_view(view_named(name)),
        define_projector(projector_with(name)),
        define_projector(projector_with("fine", name)),
    ):
        with pytest.raises(errors.DefinitionError, match="is taken"):
            registry.add_projection(taken)
    assert list(registry.projections) == ["diary", "tally"]


def test_a_projectors_tables_are_named_by_generation() -> None:
    """So that a rebuild can fill new ones beside the old."""
    assert Tally().table("tally") == "tally__1"
    assert Tally(generation=7).table("tally") == physical_name("tally", 7) == "tally__7"


# --- The registry ------------------------------------------------------------


def test_a_type_belongs_to_one_aggregate() -> None:
    """Whatever the classes are."""
    registry = Registry()
    registry.add_aggregate(define_aggregate(Task))
    with pytest.raises(errors.DefinitionError, match="two aggregates have the type 'task'"):
        registry.add_aggregate(define_aggregate(Task))


def test_a_view_folds_only_what_is_yielded() -> None:
    """An event that nobody yields is a mistake, unless its aggregate comes later."""
    registry = Registry()
    registry.add_projection(define_view(Diary))
    with pytest.raises(errors.DefinitionError, match="diary follows Done, which no registered"):
        registry.check()
    registry.add_aggregate(define_aggregate(Task))
    registry.check()


class Anything:
    pass


@event
class Seen(Anything):
    pass


@event
class Heard(Anything):
    pass


def test_a_view_of_the_base_of_events_is_told_which_there_are() -> None:
    """Their base is no event, however many aggregates are registered."""

    @dataclass
    class Watch(Aggregate[Do, Union[Seen, Heard], None], type="watch"):  # noqa: UP007 - as older code has it
        handle = Task.handle

        def apply(self, event: Any) -> None:
            """Do nothing."""

    @dataclass
    class All(View[Anything], name="all_of_them"):
        def update(self, event: Envelope[Anything]) -> None:
            """Do nothing."""

    registry = Registry()
    registry.add_aggregate(define_aggregate(Watch))
    registry.add_projection(define_view(All))
    with pytest.raises(errors.DefinitionError, match=r"Anything, .* themselves, Heard \| Seen"):
        registry.check()


def test_only_registered_classes_are_found() -> None:
    """Also not another class of the same type."""

    @dataclass
    class Other(Task, type="task"):
        pass

    registry = Registry()
    definition = define_aggregate(Task)
    registry.add_aggregate(definition)
    assert registry.aggregate_of(Task) is definition
    with pytest.raises(errors.DefinitionError, match="Other is not registered"):
        registry.aggregate_of(Other)
