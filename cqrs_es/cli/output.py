"""Data on stdout: JSON lines for programs, tables for people; everything else on stderr."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec
import orjson
import typer

from cqrs_es import wire
from cqrs_es.cloudevents import timestamp, to_cloudevent
from cqrs_es.telemetry.masking import mask_credentials, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rich.text import Text

    from cqrs_es.messages import Outcome, StoredEvent
    from cqrs_es.opened import OpenApplication

JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, one value a line.")]

# Where stdout is no terminal there is no width to keep to.
WIDTH_OF_A_FILE: Final = 10_000


def print_json(value: object) -> None:
    """Print one JSON value on a line of its own; bytes are JSON already."""
    body = value if isinstance(value, bytes) else orjson.dumps(value, default=_plain)
    sys.stdout.buffer.write(body + b"\n")
    sys.stdout.flush()


def _plain(value: object) -> str:
    """Return what JSON has no form for, and a projector's column may hold."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def print_text(text: str) -> None:
    """Print lines for people, without the control characters of terminals."""
    encoded = "\n".join(printable(line) for line in text.split("\n"))
    sys.stdout.buffer.write(encoded.encode() + b"\n")
    sys.stdout.flush()


class Coloured(msgspec.Struct, frozen=True):
    """A number or a word in a table that has a colour on a terminal."""

    value: int | str
    colour: str


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers to the right, without a line of names where there are none.

    On a terminal what is too long is folded, but not what a row is called: it is there to be
    copied.
    """
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
    console = Console(file=sys.stdout, width=width, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(columns))
    cells = [[_cell(value) for value in row] for row in rows]
    longest = max((len(row[0]) for row in cells), default=0)
    for number, column in enumerate(columns):
        whole = number == 0 and longest <= console.width // 2
        table.add_column(column, overflow="fold", no_wrap=whole)
    for row in cells:
        table.add_row(*row)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())
    sys.stdout.flush()


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing's fields below each other."""
    width = max(len(name) for name in fields)
    print_text("\n".join(f"{name:<{width}}  {shown(value)}" for name, value in fields.items()))


def shown(value: Any) -> str:
    """Return a value as a person reads it: JSON for what has parts, nothing for None."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case dict() | list() | tuple():
            return printable(orjson.dumps(value).decode())
        case bytes():
            return printable(value.decode(errors="replace"))
        case _:
            return printable(str(value))


def _cell(value: object) -> Text:
    from rich.text import Text

    match value:
        case Coloured(number, colour):
            return Text(str(number), justify="right", style=colour)
        case _:
            return Text(shown(value), justify=_side(value))


def _side(value: object) -> Any:
    return "right" if isinstance(value, int | float) and not isinstance(value, bool) else "left"


def complain(text: str) -> None:
    """Say on stderr what went wrong, without the passwords of URLs."""
    sys.stderr.write(f"cqrs-es: {printable(mask_credentials(text))}\n")


# --- Outcomes and events -----------------------------------------------------


def print_outcome(found: Outcome, *, as_json: bool) -> None:
    """Print an outcome as it is sent, or its fields below each other."""
    if as_json:
        print_json(wire.encode_outcome(found))
    else:
        print_fields(wire.outcome_fields(found))


async def event_writer(opened: OpenApplication, *, as_json: bool) -> Callable[[StoredEvent], None]:
    """Make what prints an event: as a CloudEvent, or as a line for people."""
    epoch = (await opened.storage.info()).log_epoch
    source = f"/{opened.process.service}"

    def write(event: StoredEvent) -> None:
        if as_json:
            print_json(to_cloudevent(event, source, epoch))
        else:
            print_text(_line(event))

    return write


def _line(event: StoredEvent) -> str:
    position = f"{event.partition}:{event.offset}"
    name = f"{event.event_type} {event.event_version}"
    moment = timestamp(event.recorded_at)
    return f"{position:<8} {moment}  {event.key}/{event.sequence}  {name}  {shown(event.payload)}"
