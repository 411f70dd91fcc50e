"""Verbs for a view as a whole: `rebuild`, and what there is of all of them, `views`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json, print_table, print_text
from cqrs_es.program import INTERRUPTED
from cqrs_es.runtime.waiting import unless

if TYPE_CHECKING:
    from cqrs_es.application import Application
    from cqrs_es.opened import Kept, OpenApplication
    from cqrs_es.projection.rebuild import Rebuild, RebuildProgress
    from cqrs_es.settings import Settings

# --- rebuild -----------------------------------------------------------------


SECONDS_BETWEEN_LINES: Final = 1.0


def rebuild(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The view or projector.")],
    abort: Annotated[
        bool, typer.Option("--abort", help="Give up a rebuild under way and drop what it filled.")
    ] = False,
    switch_to: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Bring generation N up to date and make it live."),
    ] = None,
    drop: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Drop generation N, which is not live.")
    ] = None,
    remove: Annotated[
        bool,
        typer.Option("--remove", help="Drop all of a view or table that the code has no more."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Fill a view anew beside the live one, then switch to it.

    Goes on where an interrupted rebuild stopped. When the view fails on an event, the live
    one is left as it is. The old generation stays until it is dropped.

    Example: cqrs-es rebuild account_query
    """
    if sum([abort, switch_to is not None, drop is not None, remove]) > 1:
        raise errors.ConfigurationError("give one of --abort, --switch-to, --drop and --remove")
    if remove:
        done: dict[str, object] | None = _remove(context, name)
    else:
        from cqrs_es.service import run_to_end

        settings, app = invocation_of(context).load()
        work = _rebuild(app, settings, name, abort=abort, switch_to=switch_to, drop=drop)
        done = run_to_end(work)
    if done is None:
        raise typer.Exit(INTERRUPTED)
    if json:
        print_json(done)
    else:
        print_fields(done)


def _remove(context: typer.Context, name: str) -> dict[str, object]:
    tables = with_application(context, lambda opened: opened.remove_view(name))
    return {"view": name, "removed": tables}


async def _rebuild(
    app: Application,
    settings: Settings,
    name: str,
    *,
    abort: bool,
    switch_to: int | None,
    drop: int | None,
) -> dict[str, object] | None:
    """Do what is asked; return what was done, None when it was interrupted."""
    from cqrs_es.runtime.stopping import stop_on_signals

    with stop_on_signals() as stopping, ExitStack() as stack:
        async with app.open(settings, initialise=False, reach_broker=False) as opened:
            opened.projection(name)
            rebuild = opened.rebuild(name, _display(name, stack))
            work = _work(rebuild, abort=abort, switch_to=switch_to, drop=drop)
            done = await unless(stopping.asked, work)
    return None if done is None else {"view": name} | done


async def _work(
    rebuild: Rebuild, *, abort: bool, switch_to: int | None, drop: int | None
) -> dict[str, object]:
    if abort:
        return {"dropped": await rebuild.abort()}
    if drop is not None:
        await rebuild.drop(drop)
        return {"dropped": drop}
    if switch_to is not None:
        await rebuild.switch_to(switch_to)
        return {"live": switch_to}
    return {"live": await rebuild.run()}


# --- views -------------------------------------------------------------------

views = typer.Typer(help="See and drop the generations of views.", no_args_is_help=True)


@views.command("list")
def list_views(context: typer.Context, json: JsonFlag = False) -> None:
    """List every generation of every view: whose it is, and how far.

    `live` is what everybody reads; `filled`, what processes with that code read; `filling`,
    what their projectors fill; `rebuilding`, what `rebuild` fills. A view that the
    application has no more is `removed`.

    Example: cqrs-es views list
    """
    kept = with_application(context, lambda opened: opened.generations())
    if json:
        for each in kept:
            print_json(_kept_fields(each))
        return
    columns = ["view", "generation", "state", "this code", "code", "behind", "processes"]
    print_table(
        columns,
        [[k.view, k.number, k.state, k.own, k.code or "", k.behind, k.members] for k in kept],
    )


@views.command("prune")
def prune(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be dropped.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Drop generations that nobody needs, and views that the code has no more.

    What is live, of this code, being rebuilt, or has a process that projects into it, is
    kept. Run it when no older code is to come back: that would have to fill its own anew.

    Example: cqrs-es views prune
    """

    async def work(opened: OpenApplication) -> list[Kept]:
        return [each async for each in opened.prune_views(dry_run=dry_run)]

    for each in with_application(context, work):
        if json:
            print_json(_kept_fields(each) | {"dropped": not dry_run})
        else:
            said = "would be dropped" if dry_run else "is dropped"
            print_text(f"generation {each.number} of {each.view} ({each.state}) {said}")


def _kept_fields(kept: Kept) -> dict[str, object]:
    return {
        "view": kept.view,
        "generation": kept.number,
        "state": kept.state,
        "this_code": kept.own,
        "code": kept.code,
        "behind": kept.behind,
        "processes": kept.members,
    }


# --- Progress ----------------------------------------------------------------


def _display(name: str, stack: ExitStack) -> Callable[[RebuildProgress], None]:
    if sys.stderr.isatty():
        return _bar(name, stack)
    return _Lines(name).show


def _bar(name: str, stack: ExitStack) -> Callable[[RebuildProgress], None]:
    """Show a bar with the share done, the rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,} of {task.total:,} events  {task.fields[pace]}"),
    )
    progress = stack.enter_context(Progress(*columns, console=Console(stderr=True, soft_wrap=True)))
    task = progress.add_task(name, total=1, pace="")

    def show(state: RebuildProgress) -> None:
        total = max(state.total, 1)
        done = state.done if state.total else total
        progress.update(task, completed=done, total=total, pace=_pace(state))

    return show


def _pace(state: RebuildProgress) -> str:
    """Say how fast it goes and how long it takes, once that is known."""
    left = state.seconds_left
    if left is None:
        return ""
    return f"{state.per_second:,.0f}/s, {timedelta(seconds=round(left))} left"


class _Lines:
    """Writes a log line a second, and one at the end."""

    def __init__(self, name: str) -> None:
        from cqrs_es.telemetry.lines import get_logger

        self._log = get_logger("cqrs_es.cli")
        self._name = name
        self._written = time.monotonic()

    def show(self, state: RebuildProgress) -> None:
        now = time.monotonic()
        if now - self._written < SECONDS_BETWEEN_LINES and state.done < state.total:
            return
        self._written = now
        left = state.seconds_left
        self._log.info(
            "rebuilding",
            view=self._name,
            generation=state.generation,
            events=state.done,
            of=state.total,
            percent=round(100 * state.share, 1),
            events_per_second=round(state.per_second),
            seconds_left=None if left is None else round(left, 1),
        )
