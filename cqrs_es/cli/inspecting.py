"""Verbs that show what there is: `status`, `stream`, `outcome`, `view`, `tail`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import (
    Coloured,
    JsonFlag,
    event_writer,
    print_json,
    print_outcome,
    print_table,
    print_text,
)
from cqrs_es.program import DONE, FAILED
from cqrs_es.projector import physical_name, role_of
from cqrs_es.runtime.roles import known_roles
from cqrs_es.runtime.waiting import unless
from cqrs_es.types import AggregateKey, lane_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from cqrs_es.application import Application
    from cqrs_es.definitions import ProjectorDefinition
    from cqrs_es.messages import StoredEvent
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.views import ViewRow
    from cqrs_es.settings import Settings

RELAY_MARK: Final = "$relay"
LATE: Final = "yellow"
BAD: Final = "bold red"


def status(context: typer.Context, json: JsonFlag = False) -> None:
    """Show how far log, relay and projectors are, and who works.

    Example: cqrs-es status
    """
    found = with_application(context, read_status)
    if json:
        print_json(found)
    else:
        _print_status(found)


async def read_status(opened: OpenApplication) -> dict[str, Any]:
    """Return what `--json` prints."""
    from cqrs_es.reactor import reactor_role

    storage = opened.storage
    heads = dict(await storage.events.heads())
    relayed = await storage.views.checkpoints(RELAY_MARK)
    projected = {
        name: await storage.views.checkpoints(await opened.table(name))
        for name in [*opened.registry.projections, *map(reactor_role, opened.registry.reactors)]
    }
    members = await storage.leases.members()
    numbers = range(opened.process.partitions)
    vacant = known_roles(opened.registry) - {role_of(member.role)[0] for member in members}
    return {
        "views": [await _view(opened, name, heads, projected[name]) for name in projected],
        "partitions": _partitions(heads, relayed, projected),
        "members": [
            _role(m.role) | {"owner": m.owner, "fit": m.fit, "expires_at": m.expires_at}
            for m in members
        ],
        "vacant_roles": sorted(vacant),
        "leases": [
            _role(ls.role) | {"partition": ls.partition, "owner": ls.owner, "epoch": ls.epoch}
            for ls in await storage.leases.held()
        ],
        "dead_letters": await storage.dead_letters.count(),
        "parked": len(await opened.parked()),
        "scheduled": await _scheduled(opened, numbers),
        "remotes": {
            name: await _scheduled(opened, [lane_of(name, number) for number in numbers])
            for name in opened.registry.remotes
        },
    }


def _role(leased_as: str) -> dict[str, Any]:
    """Return a role, and of a projector by which code it has it."""
    role, code = role_of(leased_as)
    return {"role": role} if code is None else {"role": role, "code": code}


async def _scheduled(opened: OpenApplication, numbers: Collection[int]) -> dict[str, Any]:
    """Say how many scheduled commands are due, and for how many seconds the first has been."""
    from cqrs_es.runtime.due import overdue

    late = await overdue(opened.storage.events, numbers)
    return {
        "due": sum(each.rows for each in late.values()),
        "overdue_seconds": max((each.seconds for each in late.values()), default=0.0),
    }


async def _view(
    opened: OpenApplication, name: str, heads: dict[int, int], offsets: dict[int, int]
) -> dict[str, Any]:
    """Say how a view is: `behind` counts events, `building` is a generation being rebuilt.

    `filling` is one that this code's projectors fill, with how many events of it are seen.
    """
    from cqrs_es.projection.generations import read_generations

    views = opened.storage.views
    now, filling = await read_generations(views, name), None
    definition = opened.registry.projections.get(name)
    own = None if definition is None else now.projected_by(definition.fingerprint)
    if own is not None and own != now.live and name in await opened.views_behind():
        seen = sum((await views.checkpoints(physical_name(name, own))).values())
        filling = {"generation": own, "done": seen, "total": sum(heads.values())}
    return {
        "view": name,
        "generation": now.live,
        "building": now.building,
        "filling": filling,
        "behind": sum(heads.values()) - sum(offsets.values()),
        "parked": len(await opened.parked(name)),
    }


def _partitions(
    heads: dict[int, int], relayed: dict[int, int], projected: dict[str, dict[int, int]]
) -> list[dict[str, Any]]:
    return [
        {
            "partition": partition,
            "head": str(head),
            "relay": str(relayed.get(partition, 0)),
            "projectors": {
                name: str(offsets.get(partition, 0)) for name, offsets in projected.items()
            },
        }
        for partition, head in sorted(heads.items())
    ]


def _print_status(found: dict[str, Any]) -> None:
    """Print the views, then the partitions, then who works; in red what somebody has to see to."""
    columns = ["view", "generation", "rebuilding", "behind", "parked"]
    rows = [
        [v["view"], v["generation"], _filled(v), _late(v["behind"]), _bad(v["parked"])]
        for v in found["views"]
    ]
    print_table(columns, rows)
    print_text("")
    _print_partitions(found["partitions"])
    print_text("")
    held = [(lease["role"], lease["owner"]) for lease in found["leases"]]
    members: list[list[object]] = [
        [m["role"], m["owner"], held.count((m["role"], m["owner"])), m["fit"]]
        for m in found["members"]
    ]
    vacant = [[role, Coloured("nobody", LATE), None, None] for role in found["vacant_roles"]]
    print_table(["role", "member", "partitions", "fit"], [*members, *vacant])
    print_text("")
    counts = {"dead letters": found["dead_letters"], "parked": found["parked"]}
    rows = [[what, _bad(count), None] for what, count in counts.items()]
    waiting = {"scheduled, due": found["scheduled"]}
    waiting |= {f"for {name}, due": each for name, each in found["remotes"].items()}
    for what, each in waiting.items():
        seconds = f"the first for {each['overdue_seconds']:.0f} s" if each["due"] else None
        rows.append([what, _late(each["due"]), seconds])
    print_table([], rows)


def _filled(view: dict[str, Any]) -> object:
    """Say which generation is being filled, and how much of one that projectors fill."""
    filling = view["filling"]
    if filling is None:
        return view["building"]
    share = filling["done"] / filling["total"] if filling["total"] else 1.0
    return f"{filling['generation']} ({share:.0%})"


def _late(count: int) -> Coloured | int:
    return Coloured(count, LATE) if count else count


def _bad(count: int) -> Coloured | int:
    return Coloured(count, BAD) if count else count


def _print_partitions(partitions: list[dict[str, Any]]) -> None:
    names = list(partitions[0]["projectors"]) if partitions else []
    rows: list[list[object]] = []
    for p in partitions:
        head = int(p["head"])
        marks = [int(p["relay"]), *(int(p["projectors"][name]) for name in names)]
        cells = [Coloured(at, LATE) if at < head else at for at in marks]
        rows.append([int(p["partition"]), head, *cells])
    print_table(["partition", "head", "relay", *names], rows)


def stream(
    context: typer.Context,
    aggregate_type: Annotated[str, typer.Argument(metavar="TYPE", help="The aggregate's type.")],
    aggregate_id: Annotated[str, typer.Argument(metavar="ID", help="The aggregate's id.")],
    json: JsonFlag = False,
) -> None:
    """Show an aggregate's events.

    Example: cqrs-es stream account ACCT-001
    """
    key = AggregateKey(aggregate_type, aggregate_id)

    async def work(opened: OpenApplication) -> None:
        from cqrs_es.projection.replay import stored_stream

        write = await event_writer(opened, as_json=json)
        found = False
        async for event in stored_stream(opened.storage.events, key):
            write(event)
            found = True
        if not found:
            message = f"there is no aggregate {key}; its type and id are case-sensitive"
            raise errors.NotFound(message)

    with_application(context, work)


def outcome(
    context: typer.Context,
    command_id: Annotated[str, typer.Argument(help="The command's id, a UUID.")],
    json: JsonFlag = False,
) -> None:
    """Show what became of a command.

    Example: cqrs-es outcome 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    found = with_application(context, lambda opened: opened.outcome(command_id))
    if found is None:
        message = (
            f"command {command_id} has no outcome: it was not sent, waits still, "
            "or was decided longer ago than CQRS_ES_OUTCOME_RETENTION_DAYS"
        )
        raise errors.NotFound(message)
    print_outcome(found, as_json=json)


# --- view --------------------------------------------------------------------


PAGE: Final = 500
PATIENCE_SECONDS: Final = 10.0


def view(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The view's name.")],
    view_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One row's id.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only rows with a higher id: the last one of a page."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many rows; else all.")
    ] = None,
    wait_for: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND_ID",
            help="Wait until the view has seen this command, 10 s at most.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Read a view: one row by its id, or all rows, by id.

    Example: cqrs-es view account_query --after ACCT-001 --limit 20
    """
    if view_id is not None and (after is not None or limit is not None):
        raise errors.ConfigurationError("--after and --limit are for rows without an id given")
    page = Page(after or "", limit)

    async def work(opened: OpenApplication) -> None:
        opened.projection(name)
        if wait_for is not None:
            await _wait_for(opened, name, wait_for)
        if view_id is None:
            await _print_rows(opened, name, page, as_json=json)
        else:
            _print_row(await _read_row(opened, name, view_id), as_json=json)

    with_application(context, work)


class Page(msgspec.Struct, frozen=True):
    """Which rows of a view to print: those with an id above `after`, None for all of them."""

    after: str
    limit: int | None


async def _wait_for(opened: OpenApplication, name: str, command_id: str) -> None:
    """Wait until a command has an outcome, then until the view has seen it."""
    from cqrs_es.projection.seen import wait_for_outcome

    looking = wait_for_outcome(lambda: opened.outcome(command_id), command_id, PATIENCE_SECONDS)
    await opened.wait_for(name, await looking, PATIENCE_SECONDS)


# --- One row -----------------------------------------------------------------


async def _read_row(opened: OpenApplication, name: str, view_id: str) -> ViewRow:
    from cqrs_es.definitions import ProjectorDefinition

    if isinstance(opened.projection(name), ProjectorDefinition):
        message = f"{name} has rows of its own columns, not ids: leave the id out"
        raise errors.ConfigurationError(message)
    row = await opened.view_row(name, view_id)
    if row is None:
        raise errors.NotFound(f"view {name} has no row {view_id!r}; is its projector behind?")
    return row


def _print_row(row: ViewRow, *, as_json: bool) -> None:
    if as_json:
        print_json(row.payload)
    else:
        print_text(orjson.dumps(orjson.loads(row.payload), option=orjson.OPT_INDENT_2).decode())


# --- Many rows ---------------------------------------------------------------


async def _print_rows(opened: OpenApplication, name: str, page: Page, *, as_json: bool) -> None:
    from cqrs_es.definitions import ProjectorDefinition

    definition = opened.projection(name)
    if isinstance(definition, ProjectorDefinition):
        await _print_tables(opened, definition, page, as_json=as_json)
    elif as_json:
        async for row in _rows(opened, name, page):
            payload = orjson.Fragment(row.payload)
            print_json({"view_id": row.view_id, "version": row.version, "payload": payload})
    else:
        rows = [[r.view_id, r.version, r.payload] async for r in _rows(opened, name, page)]
        print_table(["view_id", "version", "payload"], rows)


async def _rows(opened: OpenApplication, name: str, page: Page) -> AsyncIterator[ViewRow]:
    after, left = page.after, page.limit
    while left is None or left > 0:
        limit = PAGE if left is None else min(PAGE, left)
        rows = await opened.view_rows(name, after=after, limit=limit)
        for row in rows:
            yield row
        if len(rows) < limit:
            return
        after, left = rows[-1].view_id, None if left is None else left - len(rows)


async def _print_tables(
    opened: OpenApplication, definition: ProjectorDefinition, page: Page, *, as_json: bool
) -> None:
    """Print the rows of a projector's own tables, by their own columns, in order of the first."""
    if page.after:
        raise errors.ConfigurationError(f"{definition.name} has no ids to go on after: use --limit")
    views = opened.storage.views
    from cqrs_es.projection.folding import required

    sql = required(views.sql, definition.name)
    number = await opened.generation(definition.name)
    for name in definition.cls.tables:
        table = physical_name(name, number)
        columns = await sql.columns(table)
        most = "" if page.limit is None else f" LIMIT {page.limit}"
        rows = await sql.query(f"SELECT * FROM {table} ORDER BY 1{most}")  # noqa: S608 - our names
        if not as_json:
            print_table(columns, rows)
            continue
        for row in rows:
            print_json(dict(zip(columns, row, strict=True)))


# --- tail --------------------------------------------------------------------


POLL_SECONDS: Final = 0.2
READ_LIMIT: Final = 500
_POSITION: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,18})")


class Start(msgspec.Struct, frozen=True):
    """Where to begin: at the start or the end of the log, but for some partitions elsewhere."""

    at_end: bool = True
    offsets: Mapping[int, int] = msgspec.field(default_factory=dict[int, int])

    @classmethod
    def parse(cls, texts: Collection[str]) -> Start:
        """Read `start`, `end` and `PARTITION:OFFSET`; raise `ConfigurationError`."""
        at_end, offsets = True, dict[int, int]()
        for text in texts:
            if position := _POSITION.fullmatch(text):
                offsets[int(position[1])] = int(position[2])
            elif text in {"start", "end"}:
                at_end = text == "end"
            else:
                message = f"--from takes start, end or PARTITION:OFFSET such as 3:120, not {text!r}"
                raise errors.ConfigurationError(message)
        return cls(at_end, offsets)

    def after(self, heads: Mapping[int, int]) -> dict[int, int]:
        """Return, by partition, the offset after which to read."""
        unknown = self.offsets.keys() - heads.keys()
        if unknown:
            message = f"there is no partition {min(unknown)}; there are 0 to {len(heads) - 1}"
            raise errors.ConfigurationError(message)
        base = heads if self.at_end else dict.fromkeys(heads, 0)
        given = {partition: max(0, offset - 1) for partition, offset in self.offsets.items()}
        return {**base, **given}


def tail(
    context: typer.Context,
    start: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="start|end|PARTITION:OFFSET",
            help="Where to begin; end unless given. May be given for several partitions.",
        ),
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="EVENT", help="Only events of this type; repeatable."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Follow the log as it grows, until ctrl-C or SIGTERM.

    Example: cqrs-es tail --from start --type CustomerDepositedMoney --json
    """
    where = Start.parse(start or ())
    settings, app = invocation_of(context).load()
    clean = asyncio.run(_tail(app, settings, Selection(where, frozenset(types or ()), json)))
    raise typer.Exit(DONE if clean else FAILED)


class Selection(msgspec.Struct, frozen=True):
    """What to show of the log (every type of event unless `types` names some), and how."""

    start: Start
    types: frozenset[str]
    as_json: bool


async def _tail(app: Application, settings: Settings, selection: Selection) -> bool:
    """Follow until a signal; return whether that ended cleanly."""
    from cqrs_es.runtime.stopping import run_until_stopped, stop_on_signals
    from cqrs_es.service import open_patiently

    async def follow(stopping: asyncio.Event) -> None:
        async with AsyncExitStack() as stack:
            opening = open_patiently(app, settings, stack, reach_broker=False, initialise=False)
            opened = await unless(stopping, opening)
            if opened is not None:
                await unless(stopping, _follow(opened, selection))

    with stop_on_signals() as stopping:
        return await run_until_stopped(follow(stopping.asked), stopping, settings.shutdown_timeout)


async def _follow(opened: OpenApplication, selection: Selection) -> None:
    """Print events as they are committed, for ever."""
    from cqrs_es.execution.retry import Retry
    from cqrs_es.telemetry.lines import get_logger

    log = get_logger("cqrs_es.cli")
    write = await event_writer(opened, as_json=selection.as_json)
    after = selection.start.after(await opened.storage.events.heads())
    log.info("following", after={str(partition): offset for partition, offset in after.items()})
    known = {name for each in opened.process.registry.aggregates.values() for name in each.events}
    for unknown in sorted(selection.types - known):  # a slip, or of older code
        log.warning("event type unknown", type=unknown, known=sorted(known))
    retry = Retry(log, "waiting for the store")
    while True:
        async with retry:
            async for event in _new_events(opened, after):
                if not selection.types or event.event_type in selection.types:
                    write(event)
        await asyncio.sleep(POLL_SECONDS)


async def _new_events(opened: OpenApplication, after: dict[int, int]) -> AsyncIterator[StoredEvent]:
    """Read what lies beyond the offsets in `after`, partition by partition, and move them on."""
    events = opened.storage.events
    for partition, head in sorted((await events.heads()).items()):
        while after[partition] < head:
            for event in await events.read_log(partition, after[partition], READ_LIMIT):
                yield event
                after[partition] = event.offset
