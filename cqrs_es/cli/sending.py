"""Enqueueing one command: `send`."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Final, cast

import orjson
import typer

from cqrs_es import errors, wire
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import JsonFlag, print_json, print_outcome, print_text
from cqrs_es.cloudevents import timestamp
from cqrs_es.program import DONE, FAILED
from cqrs_es.runtime.waiting import within
from cqrs_es.types import JsonObject, shown, utc_now

if TYPE_CHECKING:
    from datetime import datetime

    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import ReplyInbox

# Seconds without a reply after which the store is asked: a reply may get lost.
REPLY_SECONDS: Final = 1.0


def send(  # noqa: PLR0913, PLR0917 - what a command message consists of
    context: typer.Context,
    aggregate_type: Annotated[str, typer.Argument(metavar="TYPE", help="The aggregate's type.")],
    aggregate_id: Annotated[str, typer.Argument(metavar="ID", help="The aggregate's id.")],
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="The command's name.")],
    payload: Annotated[str, typer.Argument(metavar="JSON", help="Its payload, a JSON object.")],
    command_id: Annotated[
        str | None,
        typer.Option("--id", metavar="UUID", help="Its id: sent twice, it is done once."),
    ] = None,
    expected: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Reject unless at this sequence.")
    ] = None,
    command_version: Annotated[
        str | None,
        typer.Option(metavar="V", help="Of which version the payload is; 1.0 unless given."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Have it decided then: 2027-01-01T00:00:00Z."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the outcome; exit 1 unless accepted.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait, at most.")] = 30.0,
    json: JsonFlag = False,
) -> None:
    """Enqueue one command for the workers.

    Prints its id, or with --wait its outcome. With --at the workers keep it until then:
    see `cqrs-es scheduled`.

    Example: cqrs-es send account ACCT-001 DepositMoney '{"amount": "200.00"}' --wait
    """
    from cqrs_es.commands import new_command

    due = None if at is None else wire.check_due(wire.parse_moment(at, "--at"), utc_now())
    if due is not None and wait:
        text = "--wait does not go with --at: later, `cqrs-es outcome` has the outcome"
        raise errors.ConfigurationError(text)
    message = new_command(
        aggregate_type,
        aggregate_id,
        command,
        _parsed(payload),
        command_id=command_id,
        expected_sequence=expected,
        reply_to=f"cli-{secrets.token_hex(8)}" if wait else None,
        version=command_version,
    )
    message = _checked(message, invocation_of(context).load()[0].max_message_bytes)
    if not wait:
        with_application(
            context, lambda opened: _send(opened, message, due), durable=True, broker=True
        )
        print_json({"command_id": message.id}) if json else print_text(message.id)
        return
    outcome = with_application(
        context,
        lambda opened: _send_and_wait(opened, message, timeout),
        durable=True,
        broker=True,
    )
    print_outcome(outcome, as_json=json)
    raise typer.Exit(DONE if outcome.accepted else FAILED)


def _parsed(payload: str) -> JsonObject:
    try:
        parsed = orjson.loads(payload)
    except orjson.JSONDecodeError as exc:
        message = f"the payload is not JSON: {exc.msg} at character {exc.pos}"
        raise errors.InvalidMessage(message) from exc
    if not isinstance(parsed, dict):
        raise errors.InvalidMessage(f"the payload must be a JSON object, not {shown(parsed)}")
    return cast("JsonObject", parsed)


def _checked(message: CommandMessage, max_bytes: int) -> CommandMessage:
    """Read the message as its receiver will: what is wrong with it is said before it is sent."""
    return wire.parse_command(wire.encode_command(message, sent_at=timestamp(utc_now())), max_bytes)


async def _send(
    opened: OpenApplication, message: CommandMessage, due: datetime | None = None
) -> None:
    from cqrs_es.client.sending import outgoing

    process = opened.process
    with process.tracing.sending([message]) as (traced,):
        limit = process.settings.max_message_bytes
        await process.broker.send([outgoing(traced, process.partitions, limit, due)])


async def _send_and_wait(
    opened: OpenApplication, message: CommandMessage, seconds: float
) -> Outcome:
    assert message.reply_to is not None  # noqa: S101 - send() gives one to who waits
    inbox = await opened.process.broker.open_replies(message.reply_to)
    try:
        await _send(opened, message)
        outcome = await within(seconds, _outcome(opened, message, inbox))
    finally:
        await inbox.close()
    if outcome is None:
        text = f"no outcome within {seconds:g} s; later: cqrs-es outcome {message.id}"
        raise errors.WaitTimeout(text)
    return outcome


async def _outcome(opened: OpenApplication, message: CommandMessage, inbox: ReplyInbox) -> Outcome:
    """Wait for the reply; while there is none, look whether the store has the outcome."""
    while True:
        reply = await within(REPLY_SECONDS, inbox.receive())
        if reply is not None:
            return wire.decode_outcome(reply)
        found = await opened.storage.events.find_outcomes([message.id])
        stored = found.get(message.id)
        if stored is not None and stored.content_hash == message.content_hash():
            return stored.outcome
