"""Verbs that show what there is: `status`, `stream`, `outcome`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import Coloured, JsonFlag, print_json, print_table, print_text
from cqrs_es.cli.showing import event_writer, print_outcome
from cqrs_es.projection.replay import stored_stream
from cqrs_es.reactor import reactor_role
from cqrs_es.runtime.due import overdue
from cqrs_es.runtime.roles import known_roles
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication

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
    storage = opened.storage
    heads = dict(await storage.events.heads())
    relayed = await storage.views.checkpoints(RELAY_MARK)
    projected = {
        name: await storage.views.checkpoints(await opened.table(name))
        for name in [*opened.registry.projections, *map(reactor_role, opened.registry.reactors)]
    }
    members = await storage.leases.members()
    vacant = known_roles(opened.registry) - {member.role for member in members}
    return {
        "views": [await _view(opened, name, heads, projected[name]) for name in projected],
        "partitions": _partitions(heads, relayed, projected),
        "members": [
            {"role": m.role, "owner": m.owner, "fit": m.fit, "expires_at": m.expires_at}
            for m in members
        ],
        "vacant_roles": sorted(vacant),
        "leases": [
            {"role": ls.role, "partition": ls.partition, "owner": ls.owner, "epoch": ls.epoch}
            for ls in await storage.leases.held()
        ],
        "dead_letters": await storage.dead_letters.count(),
        "parked": len(await opened.parked()),
        "scheduled": await _scheduled(opened),
    }


async def _scheduled(opened: OpenApplication) -> dict[str, Any]:
    """Say how many scheduled commands are due, and for how many seconds the first has been."""
    late = await overdue(opened.storage.events, range(opened.process.partitions))
    return {
        "due": sum(each.rows for each in late.values()),
        "overdue_seconds": max((each.seconds for each in late.values()), default=0.0),
    }


async def _view(
    opened: OpenApplication, name: str, heads: dict[int, int], offsets: dict[int, int]
) -> dict[str, Any]:
    """Say how a view is: `behind` counts events, `building` is a generation being rebuilt."""
    from cqrs_es.projection.generations import read_generations

    now = await read_generations(opened.storage.views, name)
    return {
        "view": name,
        "generation": now.live,
        "building": now.building,
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
        [v["view"], v["generation"], v["building"], _late(v["behind"]), _bad(v["parked"])]
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
    due = found["scheduled"]["due"]
    seconds = f"the first for {found['scheduled']['overdue_seconds']:.0f} s" if due else None
    rows = [[what, _bad(count), None] for what, count in counts.items()]
    print_table([], [*rows, ["scheduled, due", _late(due), seconds]])


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
