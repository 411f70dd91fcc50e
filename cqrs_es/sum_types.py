"""Fields that hold one of several dataclasses: `how: Card | Cash`.

Such a value is written with its class's name as `"type"`, or with what the
class gives as `__tag__`, so that the class can be renamed. msgspec refuses
these unions. So it is shown a subclass of `OneOf` in their place, and in the
place of every dataclass that has one inside; what stands there is read here.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, TypeVar, Union, cast

import msgspec
from msgspec import inspect as types

from cqrs_es import errors

TAG: Final = "type"


class Choice(msgspec.Struct, frozen=True):
    """A dataclass, and its fields with the types that msgspec is shown."""

    cls: type[Any]
    shape: type[msgspec.Struct]

    def read(self, value: object) -> Any:
        """Make the dataclass of a JSON object; raise `msgspec.ValidationError`."""
        fields = convert(value, self.shape)
        given = {name: getattr(fields, name) for name in self.shape.__struct_fields__}
        return self.cls(**{n: v for n, v in given.items() if v is not msgspec.UNSET})


class _StandsForOthers(type):
    """msgspec asks whether what was read is an instance of the type that it was shown."""

    def __instancecheck__(cls, instance: object) -> bool:
        """Say yes: what a `OneOf` stands for is no instance of it."""
        return True


class OneOf(metaclass=_StandsForOthers):
    """Stands for dataclasses by their tags; for one alone, without a tag, that is None.

    `others` is the type of what else may stand there: text, a list, null.
    """

    choices: ClassVar[Mapping[str | None, Choice]]
    others: ClassVar[Any] = None

    @classmethod
    def chosen(cls, value: Mapping[str, object]) -> Choice:
        """Return the dataclass that a JSON object is of; raise `msgspec.ValidationError`."""
        if None in cls.choices:
            return cls.choices[None]
        tag = value.get(TAG)
        if isinstance(tag, str) and tag in cls.choices:
            return cls.choices[tag]
        message = f"must be one of {', '.join(map(str, cls.choices))} - at `$.{TAG}`"
        raise msgspec.ValidationError(message)


def convert(value: object, shown: Any) -> Any:
    """Give parsed JSON a type in which there may be `OneOf`s; raise `msgspec.ValidationError`."""
    return msgspec.convert(value, shown, str_keys=True, dec_hook=_read)


def decoder(shown: Any) -> Callable[[bytes], Any]:
    """Return what does the same to JSON as bytes; it raises other errors, and in other words."""
    return msgspec.json.Decoder(shown, dec_hook=_read).decode


def _read(kind: Any, value: object) -> Any:
    one_of: type[OneOf] = kind
    try:
        if isinstance(value, dict):
            return one_of.chosen(cast("dict[str, object]", value)).read(cast("object", value))
        return convert(value, dict[str, Any] if one_of.others is None else one_of.others)
    except msgspec.ValidationError as exc:
        raise ValueError(str(exc)) from None  # msgspec adds the path to this one


# --- What msgspec is shown ---------------------------------------------------


def shown(annotation: Any) -> Any:
    """Return a type as msgspec takes it; raise `DefinitionError`, `TypeError` and `NameError`."""
    return _Shown().of(annotation)


def class_of(annotation: Any) -> Any:
    """Return the class itself of a generic one with arguments, `Range` of `Range[int]`."""
    return typing.get_origin(annotation) or annotation


def members_of(annotation: Any) -> Sequence[Any]:
    """Return the members of a union, or what stands alone."""
    annotation = _resolved(annotation)
    return typing.get_args(annotation) if _is_union(annotation) else (annotation,)


def _resolved(annotation: Any) -> Any:
    """Return what a name stands for that was given by `type Event = A | B`, from Python 3.12."""
    while type(annotation).__name__ == "TypeAliasType":
        annotation = annotation.__value__
    return annotation


class _Shown:
    """Replaces what msgspec does not take, each class once: it may have itself inside."""

    def __init__(self) -> None:
        self._known: dict[Any, type[OneOf]] = {}

    def of(self, annotation: Any) -> Any:
        annotation = _resolved(annotation)
        members = members_of(annotation)
        objects = [member for member in members if _is_dataclass(member)]
        if not objects or not _has_sum(annotation, set()):
            return _mapped(annotation, self.of)
        if annotation not in self._known:
            one_of = cast("type[OneOf]", _StandsForOthers("OneOf", (OneOf,), {}))
            self._known[annotation] = one_of
            self._fill(one_of, objects, [member for member in members if member not in objects])
        return self._known[annotation]

    def _fill(self, one_of: type[OneOf], objects: Sequence[Any], others: Sequence[Any]) -> None:
        tags = [_tag(item) if len(objects) > 1 else None for item in objects]
        if len(set(tags)) < len(tags):
            message = f"two classes of a union are called {tags[0]}: give one of them a __tag__"
            raise errors.DefinitionError(message)
        one_of.choices = {tag: self._choice(item) for tag, item in zip(tags, objects, strict=True)}
        if others:
            one_of.others = _union_of([self.of(member) for member in others])
            any_object = one_of.choices[tags[0]].shape
            types.type_info(_union_of([any_object, one_of.others]))  # refuses a second object

    def _choice(self, annotation: Any) -> Choice:
        cls, hints = class_of(annotation), _hints(annotation)
        fields = dataclasses.fields(cls)
        unset = {field.name: msgspec.UNSET for field in fields if not _required(field)}
        known = [(field.name, self.of(hints[field.name])) for field in fields]
        shape = msgspec.defstruct(cls.__name__, known, kw_only=True, namespace=unset)
        return Choice(cls, shape)


def _tag(annotation: Any) -> str:
    """Return the name that a class is told by; raise `DefinitionError` where a field has it."""
    cls = class_of(annotation)
    if any(field.name == TAG for field in dataclasses.fields(cls)):
        message = (
            f"{cls.__qualname__}.{TAG} has the name under which JSON says which class of a union"
            " it is: call the field something else"
        )
        raise errors.DefinitionError(message)
    tag: object = cls.__dict__.get("__tag__", cls.__name__)
    if not isinstance(tag, str):
        message = f"{cls.__qualname__}.__tag__ must be text"
        raise errors.DefinitionError(message)
    return tag


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _has_sum(annotation: Any, seen: set[Any]) -> bool:
    """Tell whether there is a union of dataclasses anywhere inside."""
    annotation = _resolved(annotation)
    members = members_of(annotation)
    objects = [member for member in members if _is_dataclass(member)]
    if len(objects) > 1:
        return True
    if annotation not in objects:
        return any(_has_sum(argument, seen) for argument in typing.get_args(annotation))
    if annotation in seen:
        return False
    seen.add(annotation)
    return any(_has_sum(field, seen) for field in _hints(annotation).values())


def _hints(annotation: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, the type variables of generic ones filled in."""
    cls = class_of(annotation)
    variables: tuple[Any, ...] = getattr(cls, "__parameters__", ())
    filled: dict[Any, Any] = dict(zip(variables, typing.get_args(annotation), strict=False))

    def fill(part: Any) -> Any:
        return filled.get(part, part) if isinstance(part, TypeVar) else _mapped(part, fill)

    hints: dict[str, Any] = {}
    for base in reversed(cls.__dict__.get("__orig_bases__", cls.__bases__)):
        if _is_dataclass(base):
            hints |= _hints(fill(base))
    own = typing.get_type_hints(cls, include_extras=True)
    names = {field.name for field in dataclasses.fields(cls)}
    new = (names - hints.keys()) | (names & inspect.get_annotations(cls).keys())
    return hints | {name: fill(own[name]) for name in new}


def _mapped(annotation: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the arguments of a generic type or union."""
    before: tuple[Any, ...] = typing.get_args(annotation)
    origin: Any = typing.get_origin(annotation)
    if origin is Annotated:
        return Annotated[function(before[0]), *annotation.__metadata__]
    after = tuple(map(function, before))
    if after == before:
        return annotation
    if _is_union(annotation):
        return _union_of(after)
    return origin[after]


def _union_of(members: Sequence[Any]) -> Any:
    return Union[tuple(members)]  # noqa: UP007 - of members that are known at run time only


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, UnionType) or typing.get_origin(annotation) is Union


def _is_dataclass(annotation: Any) -> bool:
    cls = class_of(annotation)
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)
