"""Verbs about dead letters: `dead list`, `show`, `retry`, `drop`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cqrs_es import errors
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
from cqrs_es.cloudevents import timestamp
from cqrs_es.program import DONE, FAILED, sentence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.dead_letters import DeadLetter

PAGE: Final = 100

dead = typer.Typer(
    help="Deal with dead letters: messages that could not be decided.", no_args_is_help=True
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Their ids.")]
All = Annotated[bool, typer.Option("--all", help="All there are.")]


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
