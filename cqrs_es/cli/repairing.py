"""Verbs that repair: `dead`, `parked`, `rebuild`, `republish`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import (
    JsonFlag,
    complain,
    print_fields,
    print_json,
    print_outcome,
    print_table,
    print_text,
)
from cqrs_es.cloudevents import timestamp
from cqrs_es.ports.store import HELD_BACK
from cqrs_es.program import DONE, FAILED, sentence
from cqrs_es.projector import generation_of, view_of
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from cqrs_es.execution.keys import KeysRebuilt
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.ports.views import ParkedAggregate


# --- Dead letters ------------------------------------------------------------


PAGE: Final = 100

dead = typer.Typer(
    help="Deal with dead letters: messages that could not be decided.", no_args_is_help=True
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Their ids.")]
All = Annotated[bool, typer.Option("--all", help="All there are.")]


@dead.command("list")
def list_dead(context: typer.Context, json: JsonFlag = False) -> None:
    """List the dead letters, each with the process that waits until it is retried or dropped.

    Example: cqrs-es dead list --json
    """
    with_application(context, lambda opened: _list_dead(opened, as_json=json))


async def _list_dead(opened: OpenApplication, *, as_json: bool) -> None:
    columns = ("id", "attempts", "last_seen_at", "reason", "waits")
    waiting = await _waiting(opened)
    rows: list[list[object]] = []
    async for letter in _letters(opened):
        fields = _fields(letter, waiting)
        if as_json:
            print_json(fields)
        else:
            rows.append([fields[name] for name in columns])
    if not as_json:
        print_table([name.removesuffix("_at").replace("_", " ") for name in columns], rows)


async def _waiting(opened: OpenApplication) -> set[AggregateKey]:
    """Read which instances of process managers wait behind a dead letter."""
    return {marker.key for marker in await opened.storage.views.list_parked(HELD_BACK)}


def _key_of(letter: DeadLetter) -> AggregateKey | None:
    """Return whom a letter's command is for; None where it is no command."""
    try:
        message = orjson.loads(letter.body)
        return AggregateKey(message["aggregate_type"], message["aggregate_id"])
    except (ValueError, KeyError, TypeError):
        return None


@dead.command("show")
def show_dead(
    context: typer.Context,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="The letter's id.")],
    json: JsonFlag = False,
) -> None:
    """Show one dead letter with its body.

    Example: cqrs-es dead show 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """

    async def work(opened: OpenApplication) -> dict[str, Any]:
        letter = await opened.storage.dead_letters.get(letter_id)
        if letter is None:
            raise _no_letter(letter_id)
        return _fields(letter, await _waiting(opened))

    fields = with_application(context, work)
    print_json(fields) if json else print_fields(fields)


@dead.command("retry")
def retry_dead(
    context: typer.Context, ids: Ids = None, every: All = False, json: JsonFlag = False
) -> None:
    """Decide dead letters' commands again, in this process; those decided are gone.

    Exits 1 when any of them stays.

    Example: cqrs-es dead retry --all
    """
    _require_one(ids, every=every)

    async def work(opened: OpenApplication) -> bool:
        results = [
            await _retry(opened, letter_id, as_json=json)
            for letter_id in await _chosen(opened, ids, as_json=json)
        ]
        return all(results)

    raise typer.Exit(DONE if with_application(context, work) else FAILED)


async def _retry(opened: OpenApplication, letter_id: str, *, as_json: bool) -> bool:
    """Retry one letter; return whether it is gone."""
    try:
        outcome = await opened.retry_dead_letter(letter_id)
    except (errors.InvalidMessage, errors.NotFound) as exc:
        complain(f"{letter_id}: {sentence(exc)}")
        return False
    print_outcome(outcome, as_json=as_json)
    return outcome.status != "failed"


@dead.command("drop")
def drop_dead(
    context: typer.Context, ids: Ids = None, every: All = False, json: JsonFlag = False
) -> None:
    """Forget dead letters; a failed outcome stays failed.

    That of a command which an event or a timer has caused becomes rejected, with the code
    `dropped`; a process that has sent it hears of it.

    Example: cqrs-es dead drop 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    _require_one(ids, every=every)

    async def work(opened: OpenApplication) -> bool:
        results = [
            await _drop(opened, letter_id, as_json=json)
            for letter_id in await _chosen(opened, ids, as_json=json)
        ]
        return all(results)

    raise typer.Exit(DONE if with_application(context, work) else FAILED)


async def _drop(opened: OpenApplication, letter_id: str, *, as_json: bool) -> bool:
    if not await opened.drop_dead_letter(letter_id):
        complain(sentence(_no_letter(letter_id)))
        return False
    if as_json:
        print_json({"id": letter_id, "dropped": True})
    else:
        print_text(f"{letter_id} dropped")
    return True


def _require_one(ids: Sequence[str] | None, *, every: bool) -> None:
    if bool(ids) == every:
        raise errors.ConfigurationError("give the letters' ids, or --all; see `cqrs-es dead list`")


async def _chosen(
    opened: OpenApplication, ids: Sequence[str] | None, *, as_json: bool
) -> list[str]:
    """Return the ids given; without any, those of all letters there are now."""
    chosen = list(ids) if ids else [letter.id async for letter in _letters(opened)]
    if not chosen and not as_json:
        print_text("there are no dead letters")
    return chosen


async def _letters(opened: OpenApplication) -> AsyncIterator[DeadLetter]:
    after = ""
    while page := await opened.storage.dead_letters.page(after=after, limit=PAGE):
        for letter in page:
            yield letter
        after = page[-1].id


def _fields(letter: DeadLetter, waiting: Collection[AggregateKey]) -> dict[str, Any]:
    """Return a letter as JSON; a body that is no UTF-8 has marks where it is not."""
    key = _key_of(letter)
    return {
        "id": letter.id,
        "source": letter.source,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "first_seen_at": timestamp(letter.first_seen_at),
        "last_seen_at": timestamp(letter.last_seen_at),
        "body": letter.body.decode(errors="replace"),
        "body_length": letter.body_length,
        "body_hash": letter.body_hash,
        "headers": dict(letter.headers),
        "waits": str(key) if key in waiting else None,
    }


def _no_letter(letter_id: str) -> errors.NotFound:
    return errors.NotFound(f"there is no dead letter {letter_id!r}; see `cqrs-es dead list`")


# --- Parked aggregates -------------------------------------------------------


parked = typer.Typer(
    help="Deal with parked aggregates: a projector fails on their events.", no_args_is_help=True
)


@parked.command("list")
def list_parked(context: typer.Context, json: JsonFlag = False) -> None:
    """List the aggregates whose events a projector does not apply.

    Example: cqrs-es parked list
    """
    markers = with_application(context, lambda opened: opened.parked())
    if json:
        for marker in markers:
            print_json(_marker_fields(marker))
        return
    columns = ["view", "aggregate", "from sequence", "attempts", "reason"]
    rows = [[view_of(m.projector), m.key, m.from_sequence, m.attempts, m.reason] for m in markers]
    print_table(columns, rows)


@parked.command("retry")
def retry_parked(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The view or projector.")],
    aggregate: Annotated[
        tuple[str, str] | None,
        typer.Option("--aggregate", metavar="TYPE ID", help="Only this one; else all parked."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Apply parked aggregates' events to a view again, in order, once the view is fixed.

    Exits 1 when any of them stays parked.

    Example: cqrs-es parked retry account_query
    """
    wanted = AggregateKey(*aggregate) if aggregate else None

    async def work(opened: OpenApplication) -> bool:
        markers = [m for m in await opened.parked(name) if wanted in {None, m.key}]
        if wanted is not None and not markers:
            raise errors.NotFound(f"{wanted} is not parked for {name}; see `cqrs-es parked list`")
        if not markers and not json:
            print_text(f"nothing is parked for {name}")
        results = [await _retry_parked(opened, name, marker, as_json=json) for marker in markers]
        return all(results)

    raise typer.Exit(DONE if with_application(context, work) else FAILED)


async def _retry_parked(
    opened: OpenApplication, name: str, marker: ParkedAggregate, *, as_json: bool
) -> bool:
    """Retry one aggregate; return whether it has caught up."""
    caught_up = await opened.retry_parked(name, marker)
    if as_json:
        print_json({"projector": name, "aggregate": str(marker.key), "parked": not caught_up})
    else:
        print_text(f"{marker.key} {'has caught up' if caught_up else 'failed again'}")
    return caught_up


def _marker_fields(marker: ParkedAggregate) -> dict[str, object]:
    return {
        "projector": view_of(marker.projector),
        "generation": generation_of(marker.projector),
        "aggregate_type": marker.key.type,
        "aggregate_id": marker.key.id,
        "from_sequence": marker.from_sequence,
        "partition": marker.partition,
        "attempts": marker.attempts,
        "reason": marker.reason,
    }


# --- Unique keys -------------------------------------------------------------

keys = typer.Typer(
    help="Unique keys: values that one aggregate of a type has.", no_args_is_help=True
)


@keys.callback()
def _keys() -> None:
    """Keep `rebuild` a verb of its own: of a single command typer would make the whole group."""


@keys.command("rebuild")
def rebuild_keys(
    context: typer.Context,
    type_: Annotated[str, typer.Argument(metavar="TYPE", help="The type of aggregate.")],
    json: JsonFlag = False,
) -> None:
    """Make the unique keys of a type anew, after its `keys()` has changed.

    Run it when no older code runs any more. Commands go on meanwhile, guarded by the keys
    that there are. Where two aggregates have one value both are named, and the exit code
    is 1: change one of them, then run it again.

    Example: cqrs-es keys rebuild user
    """

    async def work(opened: OpenApplication) -> KeysRebuilt:
        definition = opened.registry.aggregates.get(type_)
        if definition is None:
            known = ", ".join(opened.registry.aggregates) or "none"
            message = f"there is no aggregate type {type_!r}; the application's are {known}"
            raise errors.NotFound(message)
        return await opened.rebuild_keys(definition.cls)

    done = with_application(context, work)
    collisions = [
        {"key": each.name, "holder": each.holder, "other": each.other} for each in done.collisions
    ]
    counts = {"aggregates": done.aggregates, "added": done.added, "removed": done.removed}
    if json:
        print_json({"type": type_, **counts, "collisions": collisions})
    else:
        print_fields({"type": type_, **counts, "collisions": len(collisions)})
        if collisions:
            print_table(("key", "holder", "other"), [list(each.values()) for each in collisions])
    if collisions:
        raise typer.Exit(FAILED)


# --- republish ---------------------------------------------------------------


def republish(
    context: typer.Context,
    partition: Annotated[int, typer.Argument(min=0, metavar="PARTITION", help="Its number.")],
    start: Annotated[
        int, typer.Option("--from", min=1, metavar="OFFSET", help="The first event to publish.")
    ],
    json: JsonFlag = False,
) -> None:
    """Publish a partition's events again.

    For subscribers of a broker that lost data.

    On Redis the stream is made anew and keeps what it has; consumer groups get the events again.

    Example: cqrs-es republish 3 --from 1200
    """
    last = with_application(
        context, lambda opened: opened.republish(partition, start), durable=True, broker=True
    )
    done: dict[str, object] = {"partition": partition, "from": str(start), "to": str(last)}
    if json:
        print_json(done)
    else:
        print_fields(done)
