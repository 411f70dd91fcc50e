"""Whether all that is written by one schema can be read by another.

Of JSON Schema it knows what `json_schema` makes. Where it can't tell, it says no: of two
patterns of an author's own, say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cqrs_es.schema.json_schema import MOMENTS, STORED_DECIMAL

if TYPE_CHECKING:
    from cqrs_es.schema.json_schema import Schema

_LOWER: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_FORMS: Final = ("pattern", "format", "contentEncoding", "multipleOf")
_ANY_MOMENT: Final = MOMENTS[None]["pattern"]
_TYPES: Final[dict[type, str]] = {
    str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null",
}  # fmt: skip


class Misfit(msgspec.Struct, frozen=True):
    """Where, and why, something that is written can't be read; or is `gone` for who may miss it."""

    path: str
    reason: str
    gone: bool = False

    def within(self, step: str) -> Misfit:
        """Put a step in front of the path."""
        dot = "." if self.path and not self.path.startswith("[") else ""
        return Misfit(f"{step}{dot}{self.path}", self.reason, self.gone)


def misfits(written: Schema, read: Schema, *, whole: bool = False) -> list[Misfit]:
    """Return what of `written` does not fit `read`, and what may be missed there.

    `whole` is what code has written that knows the schema: each of its fields is there. Else
    one with a default may be missing, as it was added later, or left out by a sender.
    """
    return _Fit(written, read, whole=whole).of(written, read)


class _Fit:
    """Two schemas with their definitions; pairs being compared are taken to fit (recursion)."""

    def __init__(self, written: Schema, read: Schema, *, whole: bool) -> None:
        self._written, self._read, self._whole = written, read, whole
        self._comparing: set[tuple[int, int]] = set()

    def of(self, written: Schema, read: Schema) -> list[Misfit]:
        written, read = _referred(written, self._written), _referred(read, self._read)
        pair = id(written), id(read)  # of parts of the two schemas, which stay
        if pair in self._comparing:
            return []
        self._comparing.add(pair)
        found = list(self._compare(written, read))
        self._comparing.remove(pair)
        return found

    def _compare(self, written: Schema, read: Schema) -> Iterator[Misfit]:
        if not read:
            return
        if "anyOf" in written:
            for choice in written["anyOf"]:
                yield from self.of(choice, read)
        elif "anyOf" in read:
            yield from self._any_of(written, read["anyOf"])
        elif (values := _values_of(written)) is not None:
            yield from _values(values, read)
        elif (values := _values_of(read)) is not None:
            yield Misfit("", f"may be other than {_shown(values)}")
        elif written.get("type") in {"integer", "number"} and self._reads_numbers(read):
            return
        elif not _same_type(written.get("type"), read.get("type")):
            yield Misfit("", f"was {_kind(written)}, is {_kind(read)}")
        else:
            yield from _bounds(written, read)
            yield from self._parts(written, read)

    def _reads_numbers(self, read: Schema) -> bool:
        """Tell whether this is a Decimal that the framework reads from its own store."""
        return not self._whole and read.get("pattern") == STORED_DECIMAL

    def _any_of(self, written: Schema, choices: list[Schema]) -> Iterator[Misfit]:
        tried = [(self.of(written, choice), choice) for choice in choices]
        for found, _ in tried:
            if all(misfit.gone for misfit in found):
                yield from found
                return
        alike = [found for found, choice in tried if _alike(written, _referred(choice, self._read))]
        if len(alike) == 1:
            yield from alike[0]
        else:
            kinds = " or ".join(_kind(_referred(choice, self._read)) for choice in choices)
            yield Misfit("", f"may be {_kind(written)}, which is not {kinds}")

    def _parts(self, written: Schema, read: Schema) -> Iterator[Misfit]:
        match written.get("type"):
            case "array":
                yield from self._array(written, read)
            case "object":
                yield from self._object(written, read)
            case _:
                pass

    def _array(self, written: Schema, read: Schema) -> Iterator[Misfit]:
        if "prefixItems" not in read:
            for item in written.get("prefixItems", [written.get("items", {})]):
                yield from (m.within("[]") for m in self.of(item, read["items"]))
        elif len(written.get("prefixItems", ())) != len(read["prefixItems"]):
            yield Misfit("", f"must have {len(read['prefixItems'])} items")
        else:
            pairs = zip(written["prefixItems"], read["prefixItems"], strict=True)
            for index, (one, other) in enumerate(pairs):
                yield from (m.within(f"[{index}]") for m in self.of(one, other))

    def _object(self, written: Schema, read: Schema) -> Iterator[Misfit]:
        if "properties" not in read:  # of any keys
            values = written.get("properties", {"*": written.get("additionalProperties", {})})
            for name, value in values.items():
                yield from (m.within(name) for m in self.of(value, read["additionalProperties"]))
            if read.get("propertyNames", {}) not in ({}, written.get("propertyNames")):
                yield Misfit("", "has other keys")
        elif "properties" not in written:
            yield Misfit("", "had any keys, has certain fields")
        else:
            yield from self._fields(written, read)

    def _fields(self, written: Schema, read: Schema) -> Iterator[Misfit]:
        for name, field in written["properties"].items():
            if name in read["properties"]:
                found = self.of(field, read["properties"][name])
                yield from (misfit.within(name) for misfit in found)
            elif read.get("additionalProperties") is False:
                yield Misfit(name, "is unknown")
        for name in read["properties"]:
            there = written["properties"] if self._whole else written["required"]
            if name in read["required"] and name not in there:
                yield Misfit(name, "may be missing, but has no default")
            elif name not in written["properties"]:
                yield Misfit(name, "is not there any more", gone=True)


def _referred(schema: Schema, root: Schema) -> Schema:
    """Return a schema itself in place of a reference to it."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _values_of(schema: Schema) -> list[Any] | None:
    """Return the only values that there may be."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _same_type(written: object, read: object) -> bool:
    return written == read or (written, read) == ("integer", "number")


def _alike(written: Schema, read: Schema) -> bool:
    """Tell whether a choice is the one that is meant: by its tag, else by its type."""
    tags = [part.get("properties", {}).get("type", {}).get("const") for part in (written, read)]
    return tags[0] == tags[1] and _same_type(written.get("type"), read.get("type"))


def _kind(schema: Schema) -> str:
    forms = [
        str(schema[name]) for name in ("format", "contentEncoding", "pattern") if name in schema
    ]
    tag = schema.get("properties", {}).get("type", {}).get("const")
    named = str(tag or schema.get("type") or _shown(_values_of(schema) or ["anything"]))
    return " ".join([named, *forms])


def _shown(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _values(values: list[Any], read: Schema) -> Iterator[Misfit]:
    known = _values_of(read)
    for value in values:
        if known is not None:
            fits = any(value == other and type(value) is type(other) for other in known)
        else:
            fits = _same_type(_TYPES[type(value)], read.get("type")) and "format" not in read
            fits = fits and re.search(read.get("pattern", ""), str(value)) is not None
        if not fits:
            yield Misfit("", f"may be {value}, which is not {_kind(read)}")


def _bounds(written: Schema, read: Schema) -> Iterator[Misfit]:
    """Compare what narrows a type; a moment with a zone, or without, is one with or without."""
    for name in _FORMS:
        known = written.get(name) == read.get(name) or name not in read
        if not known and not (read[name] == _ANY_MOMENT and written in MOMENTS.values()):
            yield Misfit("", f"was {_kind(written)}, is {_kind(read)}")
    for names, sign in ((_LOWER, 1), (_UPPER, -1)):
        for name in names:
            if name in read and not (name in written and sign * written[name] >= sign * read[name]):
                yield Misfit("", f"has a narrower {name}, {read[name]}")
