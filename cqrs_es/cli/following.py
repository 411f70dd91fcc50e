"""Following the log as it grows: `tail`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of
from cqrs_es.cli.output import JsonFlag  # noqa: TC001 - typer evaluates annotations
from cqrs_es.cli.showing import event_writer
from cqrs_es.program import DONE, FAILED
from cqrs_es.runtime.waiting import unless

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.application import Application
    from cqrs_es.messages import StoredEvent
    from cqrs_es.opened import OpenApplication
    from cqrs_es.settings import Settings

POLL_SECONDS: Final = 0.2
READ_LIMIT: Final = 500
_POSITION: Final = re.compile(r"([0-9]{1,9}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin: at the start or the end of the log, but for some partitions elsewhere."""

    at_end: bool = True
    offsets: Mapping[int, int] = field(default_factory=dict[int, int])

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


@dataclass(frozen=True, slots=True)
class Selection:
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
    import structlog

    from cqrs_es.execution.retry import backoff

    log = structlog.get_logger("cqrs_es.cli")
    write = await event_writer(opened, as_json=selection.as_json)
    after = selection.start.after(await opened.storage.events.heads())
    log.info("following", after={str(partition): offset for partition, offset in after.items()})
    known = {name for each in opened.process.registry.aggregates.values() for name in each.events}
    for unknown in sorted(selection.types - known):  # a slip, or of older code
        log.warning("event type unknown", type=unknown, known=sorted(known))
    failures = 0
    while True:
        try:
            async for event in _new_events(opened, after):
                if not selection.types or event.event_type in selection.types:
                    write(event)
            failures = 0
        except errors.Unavailable as exc:
            failures += 1
            log.warning("waiting for the store", error=exc.message)
        await asyncio.sleep(POLL_SECONDS + (backoff(failures) if failures else 0))


async def _new_events(opened: OpenApplication, after: dict[int, int]) -> AsyncIterator[StoredEvent]:
    """Read what lies beyond the offsets in `after`, partition by partition, and move them on."""
    events = opened.storage.events
    for partition, head in sorted((await events.heads()).items()):
        while after[partition] < head:
            for event in await events.read_log(partition, after[partition], READ_LIMIT):
                yield event
                after[partition] = event.offset
