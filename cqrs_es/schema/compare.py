"""What a change of code breaks, and for whom: two descriptions compared (docs/schemas.md).

Stored events, and what older senders send, are written by the old code and read by the new one;
what subscribers and readers of views get is written by the new code and read as the old one said.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cqrs_es import errors
from cqrs_es.schema.describe import FORMAT
from cqrs_es.schema.fit import misfits
from cqrs_es.types import Version

if TYPE_CHECKING:
    from cqrs_es.schema.describe import Description


class Verdict(enum.StrEnum):
    """How bad a finding is."""

    BREAK = "break"
    """Something that is there can't be read, or is refused."""
    REBUILD = "rebuild"
    """Rows, or unique keys, are to be computed anew."""
    WARNING = "warning"
    """Nothing fails, but somebody may want to know."""


class Audience(enum.StrEnum):
    """Who is affected."""

    STORED = "stored"
    """What lies in the store."""
    SENDERS = "senders"
    """Programs that send commands, and were made for the old ones."""
    SUBSCRIBERS = "subscribers"
    """Programs that read the topic, or views over HTTP."""


class Finding(msgspec.Struct, frozen=True):
    """One consequence of a change; `type` and `field` are where it is."""

    verdict: Verdict
    audience: Audience
    type: str
    field: str
    what: str
    remedy: str


_BREAK, _STORED = Verdict.BREAK, Audience.STORED
_SENDERS, _SUBSCRIBERS = Audience.SENDERS, Audience.SUBSCRIBERS
_KEEP: Final = "publish it under a new name beside the old one until subscribers have changed"
_KEEP_COMMAND: Final = "keep it until nobody sends it, or lift it by command_upcasters"
_KEEP_VIEW: Final = "keep it until readers have changed, or make a view of another name"


def compare(old: Description, new: Description) -> list[Finding]:
    """Return what breaks between two descriptions; raise `ConfigurationError` for what is none."""
    for description in (old, new):
        if description.get("format") != FORMAT:
            found = description.get("format")
            message = f"schemas.json has the format {found}, this is {FORMAT}: export it anew"
            raise errors.ConfigurationError(message)
    return [*_service(old, new), *_aggregates(old, new), *_views(old, new), *_projectors(old, new)]


def _service(old: Description, new: Description) -> Iterator[Finding]:
    if old["service"] != new["service"]:
        what = f"the service is {new['service']}, so its queues and topics have other names"
        remedy = f"keep the name {old['service']}"
        for audience in (_SENDERS, _SUBSCRIBERS):
            yield Finding(_BREAK, audience, f"service {old['service']}", "", what, remedy)


# --- Aggregates --------------------------------------------------------------


def _aggregates(old: Description, new: Description) -> Iterator[Finding]:
    for name, before in old["aggregates"].items():
        if name in new["aggregates"]:
            after = new["aggregates"][name]
            yield from _stored_events(name, before, after)
            yield from _sent_commands(name, before, after)
            yield from _published_events(name, before, after)
            yield from _unique_keys(name, before, after)
        else:
            added = [a for t, a in new["aggregates"].items() if t not in old["aggregates"]]
            yield from _gone(name, before, added)


def _gone(name: str, before: Description, added: list[Description]) -> Iterator[Finding]:
    """Say what it means that a type is not there; another one may have its events."""
    remedy = f'keep type="{name}", whatever the class is called'
    where = f"aggregate {name}"
    yield Finding(_BREAK, _STORED, where, "", "is gone: its events are nobody's", remedy)
    if before["commands"]:
        yield Finding(_BREAK, _SENDERS, where, "", "is gone: its commands are refused", remedy)
    renamed = any(before["events"].keys() <= other["events"].keys() for other in added)
    verdict = Verdict.WARNING if renamed else _BREAK
    what = "its events come as another aggregate's" if renamed else "its events come no more"
    yield Finding(verdict, _SUBSCRIBERS, where, "", what, remedy)


def _stored_events(name: str, before: Description, after: Description) -> Iterator[Finding]:
    yield from _steps_gone(name, "event", before["upcasters"], after["upcasters"], _STORED)
    remedy = 'raise its version and add an upcaster: @upcaster("{}", to="…")'
    gone = 'add drops("{0}"), or renames("{0}", "…"), to the aggregate\'s upcasters'
    for event, written in before["events"].items():
        for reason, field in _unread(event, written, after["events"], after["upcasters"]):
            helps = (gone if not field and event not in after["events"] else remedy).format(event)
            yield Finding(_BREAK, _STORED, f"event {name}.{event}", field, reason, helps)


def _sent_commands(name: str, before: Description, after: Description) -> Iterator[Finding]:
    edges = after["command_upcasters"]
    yield from _steps_gone(name, "command", before["command_upcasters"], edges, _SENDERS)
    remedy = 'give it a default, or raise its version and add an upcaster: @upcaster("{}", to="…")'
    for command, written in before["commands"].items():
        for reason, field in _unread(command, written, after["commands"], edges):
            helps = remedy.format(command) if command in after["commands"] else _KEEP_COMMAND
            yield Finding(_BREAK, _SENDERS, f"command {name}.{command}", field, reason, helps)


def _unread(
    name: str,
    written: Description,
    known: Mapping[str, Description],
    edges: Mapping[str, list[Description]],
    renames: int = 0,
) -> Iterator[tuple[str, str]]:
    """Yield why, and in which field, code can't read what was written: as upcasters would lift it.

    What an upcaster of an author's makes of a payload is not known, and taken to fit.
    """
    version = Version.parse(written["version"])
    for edge in edges.get(name, ()):
        if "becomes" in edge:
            for part in edge["becomes"]:
                if renames > len(edges):
                    yield f"{name} is renamed in a circle", ""
                    return
                moved = {"version": part["version"], "schema": written["schema"]}
                yield from _unread(part["type"], moved, known, edges, renames + 1)
            return
        if version < Version.parse(edge["to"]):
            return
    if name not in known:
        yield "is unknown to the code" if not renames else f"becomes {name}, which is unknown", ""
    elif version > Version.parse(known[name]["version"]):
        yield f"is of version {version}, known up to {known[name]['version']}", ""
    else:
        for misfit in misfits(written["schema"], known[name]["schema"]):
            if not misfit.gone:
                yield misfit.reason, misfit.path


def _steps_gone(
    name: str, kind: str, before: Description, after: Description, audience: Audience
) -> Iterator[Finding]:
    for message, edges in before.items():
        for edge in edges:
            if _is_taken(edge, after.get(message, ())):
                continue
            to = edge.get("to", "another type, or nothing")
            what = f"its upcaster to {to} is gone: older ones may be there still"
            remedy = "keep the upcaster; `schema check --store` says what is stored"
            yield Finding(_BREAK, audience, f"{kind} {name}.{message}", "", what, remedy)


def _is_taken(edge: Description, steps: Iterable[Description]) -> bool:
    """Tell whether what an upcaster took is taken still, by it or by one for older versions."""
    if "becomes" in edge:
        return edge in steps
    older = Version.parse(edge["to"])
    return any("becomes" in step or Version.parse(step["to"]) >= older for step in steps)


def _published_events(name: str, before: Description, after: Description) -> Iterator[Finding]:
    for event, read in before["events"].items():
        where = f"event {name}.{event}"
        if event not in after["events"]:
            yield Finding(_BREAK, _SUBSCRIBERS, where, "", "is published no more", _KEEP)
        else:
            yield from _for_readers(where, after["events"][event]["schema"], read["schema"], _KEEP)


def _for_readers(where: str, written: Any, read: Any, remedy: str) -> Iterator[Finding]:
    for misfit in misfits(written, read, whole=True):
        verdict = Verdict.WARNING if misfit.gone else _BREAK
        yield Finding(verdict, _SUBSCRIBERS, where, misfit.path, misfit.reason, remedy)


def _unique_keys(name: str, before: Description, after: Description) -> Iterator[Finding]:
    """Compare whether there are any; which they are, `keys()` says, and the store remembers."""
    where, had = f"aggregate {name}", before["unique_keys"]
    if had and not after["unique_keys"]:
        what = "has no unique keys any more: nothing is taken by anybody"
        yield Finding(Verdict.WARNING, _SENDERS, where, "", what, "make sure that it is meant")
    elif after["unique_keys"] and not had:
        what = "has unique keys now: those of older aggregates are not taken yet"
        remedy = f"run `cqrs-es keys rebuild {name}` once it is deployed"
        yield Finding(Verdict.REBUILD, _STORED, where, "", what, remedy)


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


# --- Views and projectors ----------------------------------------------------


def _views(old: Description, new: Description) -> Iterator[Finding]:
    for name, before in old["views"].items():
        where = f"view {name}"
        if name not in new["views"]:
            yield Finding(_BREAK, _SUBSCRIBERS, where, "", "is gone", _KEEP_VIEW)
            continue
        after = new["views"][name]
        for misfit in misfits(before["schema"], after["schema"]):
            verdict = Verdict.WARNING if misfit.gone else Verdict.REBUILD
            reason = (
                "is not in older rows, which have its default" if misfit.gone else misfit.reason
            )
            yield Finding(verdict, _STORED, where, misfit.path, reason, _rebuild(name))
        yield from _follows(name, where, before, after)
        yield from _for_readers(where, after["schema"], before["schema"], _KEEP_VIEW)


def _projectors(old: Description, new: Description) -> Iterator[Finding]:
    for name, before in old["projectors"].items():
        where, after = f"projector {name}", new["projectors"].get(name)
        if after is None:
            continue
        if before["tables"] != after["tables"]:
            what = "its tables have other columns"
            yield Finding(Verdict.REBUILD, _STORED, where, "", what, _rebuild(name))
        yield from _follows(name, where, before, after)


def _follows(name: str, where: str, before: Description, after: Description) -> Iterator[Finding]:
    if added := set(after["events"]) - set(before["events"]):
        what = f"follows {_list(added)} too, of which its rows have no older ones"
        yield Finding(Verdict.REBUILD, _STORED, where, "", what, _rebuild(name))


def _rebuild(name: str) -> str:
    return f"run `cqrs-es rebuild {name}` once it is deployed"
