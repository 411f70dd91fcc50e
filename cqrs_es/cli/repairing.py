"""Verbs that repair: `republish`, `dead …`, `parked …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cqrs_es import errors
from cqrs_es.cli.exits import DONE, FAILED, sentence
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import (
    JsonFlag,
    complain,
    print_fields,
    print_json,
    print_table,
    print_text,
)
from cqrs_es.cli.showing import print_outcome
from cqrs_es.cloudevents import timestamp, to_cloudevent
from cqrs_es.ports.broker import OutgoingEvent
from cqrs_es.projector import generation_of, view_of
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.ports.views import ParkedAggregate

PAGE: Final = 100
CHUNK: Final = 500

dead = typer.Typer(
    help="Deal with dead letters: messages that could not be decided.", no_args_is_help=True
)
parked = typer.Typer(
    help="Deal with parked aggregates: a projector fails on their events.", no_args_is_help=True
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Their ids.")]
All = Annotated[bool, typer.Option("--all", help="All there are.")]


# --- The topic ---------------------------------------------------------------


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
        context, lambda opened: _republish(opened, partition, start), durable=True, broker=True
    )
    done: dict[str, object] = {"partition": partition, "from": str(start), "to": str(last)}
    if json:
        print_json(done)
    else:
        print_fields(done)


async def _republish(opened: OpenApplication, partition: int, start: int) -> int:
    """Publish from one offset up to the log's end; return that."""
    process = opened.process
    head = await _head(opened, partition)
    if start > head:
        raise errors.NotFound(f"partition {partition} ends at offset {head}, before {start}")
    epoch = (await process.storage.info()).log_epoch

    async def read(after: int) -> list[OutgoingEvent]:
        events = await process.storage.events.read_log(partition, after, CHUNK)
        return [_outgoing(event, f"/{process.service}", epoch) for event in events]

    return await process.broker.republish(partition, epoch, start, read)


async def _head(opened: OpenApplication, partition: int) -> int:
    heads = await opened.storage.events.heads()
    if partition not in heads:
        message = f"there is no partition {partition}; there are 0 to {len(heads) - 1}"
        raise errors.ConfigurationError(message)
    return heads[partition]


def _outgoing(event: StoredEvent, source: str, epoch: str) -> OutgoingEvent:
    body = to_cloudevent(event, source, epoch)
    return OutgoingEvent(event.offset, event.key.type, event.event_type, body)


# --- Dead letters ------------------------------------------------------------


@dead.command("list")
def list_dead(context: typer.Context, json: JsonFlag = False) -> None:
    """List the dead letters.

    Example: cqrs-es dead list --json
    """
    with_application(context, lambda opened: _list_dead(opened, as_json=json))


async def _list_dead(opened: OpenApplication, *, as_json: bool) -> None:
    if as_json:
        async for letter in _letters(opened):
            print_json(_fields(letter))
        return
    rows = [[x.id, x.attempts, x.last_seen_at, x.reason] async for x in _letters(opened)]
    print_table(["id", "attempts", "last seen", "reason"], rows)


@dead.command("show")
def show_dead(
    context: typer.Context,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="The letter's id.")],
    json: JsonFlag = False,
) -> None:
    """Show one dead letter with its body.

    Example: cqrs-es dead show 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    letter = with_application(context, lambda o: o.storage.dead_letters.get(letter_id))
    if letter is None:
        raise _no_letter(letter_id)
    if json:
        print_json(_fields(letter))
    else:
        print_fields(_fields(letter))


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
            for letter_id in await _chosen(opened, ids)
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

    Example: cqrs-es dead drop 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    _require_one(ids, every=every)

    async def work(opened: OpenApplication) -> bool:
        results = [
            await _drop(opened, letter_id, as_json=json) for letter_id in await _chosen(opened, ids)
        ]
        return all(results)

    raise typer.Exit(DONE if with_application(context, work) else FAILED)


async def _drop(opened: OpenApplication, letter_id: str, *, as_json: bool) -> bool:
    if not await opened.storage.dead_letters.drop(letter_id):
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


async def _chosen(opened: OpenApplication, ids: Sequence[str] | None) -> list[str]:
    """Return the ids given; without any, those of all letters there are now."""
    return list(ids) if ids else [letter.id async for letter in _letters(opened)]


async def _letters(opened: OpenApplication) -> AsyncIterator[DeadLetter]:
    after = ""
    while page := await opened.storage.dead_letters.page(after=after, limit=PAGE):
        for letter in page:
            yield letter
        after = page[-1].id


def _fields(letter: DeadLetter) -> dict[str, Any]:
    """Return a letter as JSON; a body that is no UTF-8 has marks where it is not."""
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
    }


def _no_letter(letter_id: str) -> errors.NotFound:
    return errors.NotFound(f"there is no dead letter {letter_id!r}; see `cqrs-es dead list`")


# --- Parked aggregates -------------------------------------------------------


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
    """Apply parked aggregates' events to a view again, in order, once the view is mended.

    Exits 1 when any of them stays parked.

    Example: cqrs-es parked retry account_query
    """
    wanted = AggregateKey(*aggregate) if aggregate else None

    async def work(opened: OpenApplication) -> bool:
        markers = [m for m in await opened.parked(name) if wanted in {None, m.key}]
        if wanted is not None and not markers:
            raise errors.NotFound(f"{wanted} is not parked for {name}; see `cqrs-es parked list`")
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
