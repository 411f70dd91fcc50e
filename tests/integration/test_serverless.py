"""The bank as functions: in AWS's own runtime, and its handler called as Lambda calls it."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import Response

from cqrs_es import errors, serverless, wire
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.sqs import _requests
from cqrs_es.client import Client
from cqrs_es.client.sending import outgoing
from cqrs_es.commands import new_command
from cqrs_es.http import Action, Gateway
from cqrs_es.ports.broker import OutgoingCommand, OutgoingEvent
from cqrs_es.settings import Settings
from cqrs_es.telemetry import logs
from tests.bank_data import PROJECT, bank_folder
from tests.cloud import Cloud, Doorbell, Subscriber, initialised
from tests.conftest import run_on
from tests.lambda_runtime import (
    REGION,
    SCHEDULED,
    Killed,
    QueueSource,
    Sandbox,
    records_of,
    request,
)
from tests.servers import psql
from tests.waiting import until
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.requests import Request

    from cqrs_es.messages import CommandMessage

QUEUE = "arn:aws:sqs:eu-central-1:123456789012:bank-commands.fifo"


@pytest.fixture
def cloud(dynamodb_url: str, dynamodb_server: str, tmp_path: Path) -> Cloud:
    """Make the bank's table, queue and topic."""
    return initialised(dynamodb_url, dynamodb_server, tmp_path)


@pytest.fixture
def sandbox(cloud: Cloud, tmp_path: Path) -> Iterator[Sandbox]:
    """Run the bank's function."""
    log = tmp_path / "function.log"
    with Sandbox("worker.serverless.handler", cloud.environment, log) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Invocation:
    """What Lambda tells a handler of its invocation."""

    seconds: float = 60.0
    aws_request_id: str = "a request"

    def get_remaining_time_in_millis(self) -> int:
        """Return all of it: the clock stands still."""
        return int(self.seconds * 1000)


def _leave_logs(_level: str, _format: str) -> None:
    """Leave logging to pytest."""


def _everybody(_request: Request, _action: Action) -> dict[str, str]:
    return {"principal": "teller"}


@pytest.fixture
def handler(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[serverless.Handler]:
    """Have the handler in this process."""
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs, "configure", _leave_logs)
    made = serverless.handler(app, authorize=_everybody)
    yield made
    made.close()


def account(number: int, command: str, **payload: str) -> CommandMessage:
    payload = {"account_id": f"A-{number}"} if command == "OpenAccount" else payload
    return new_command("account", f"A-{number}", command, payload)


def record(message: CommandMessage, *, group: str = "", body: str = "", times: int = 1) -> Any:
    """Make what SQS gives of a command."""
    return {
        "MessageId": message.id,
        "ReceiptHandle": "r",
        "Body": body or wire.encode_command(message).decode(),
        "Attributes": {
            "MessageGroupId": group or message.aggregate_id,
            "ApproximateReceiveCount": str(times),
            "SentTimestamp": "1764400000000",
        },
    }


def body_of(answer: dict[str, Any]) -> Any:
    return json.loads(answer["body"])


# --- In the runtime ----------------------------------------------------------------


def test_a_command_its_events_the_topic_and_a_view_with_nothing_running(
    cloud: Cloud, sandbox: Sandbox
) -> None:
    """By HTTP and by the queue, between two freezes and after a kill; one ring does the rest."""
    token = "Bearer secret"  # noqa: S105 - nobody's
    subscribed = Subscriber(cloud)
    opened = request("POST", "/aggregates/account/A-1/OpenAccount", {"account_id": "A-1"})
    assert sandbox.invoke(opened)["statusCode"] == 401
    opened["headers"]["authorization"] = token
    assert body_of(sandbox.invoke(opened))["status"] == "accepted"

    cloud.send([account(1, "DepositMoney", amount="5.00"), account(2, "OpenAccount")])
    source = QueueSource(cloud.endpoint, "bank-commands.fifo")
    taken = source.receive()
    with pytest.raises(Killed):
        sandbox.invoke(records_of(taken, source.arn), kill_after=0.01)
    source.put_back(taken)
    while source.depth():
        source.bring(sandbox)

    done = sandbox.invoke(SCHEDULED)
    assert done == {"idle": True, "reactor:transfer": 3, "projector:account_query": 3, "relay": 3}
    view = sandbox.invoke(request("GET", "/views/account_query/A-1", authorization=token))
    assert body_of(view)["balance"] == "5.00"
    assert sandbox.invoke(SCHEDULED) == {"idle": True}
    events = subscribed.events()
    assert [(each["subject"], each["aggregatesequence"]) for each in events] == [
        ("A-1", "1"),
        ("A-1", "2"),
        ("A-2", "1"),
    ]
    assert sandbox.starts == 2


# --- The queue -----------------------------------------------------------------------


def test_one_group_that_gets_stuck_keeps_its_order_and_no_other_waits(
    handler: serverless.Handler,
) -> None:
    """From the first command that this code can't decide on, its group comes again as a whole."""
    newer = new_command("account", "A-1", "DepositMoney", {"amount": "1.00"}, version="9.9")
    stuck = [account(1, "OpenAccount"), newer, account(1, "DepositMoney", amount="2.00")]
    others = [account(2, "OpenAccount"), account(2, "DepositMoney", amount="3.00")]
    mixed = [stuck[0], others[0], stuck[1], others[1], stuck[2]]
    event = records_of([record(message) for message in mixed], QUEUE)
    answer = handler(event, Invocation(seconds=20))
    left = [failure["itemIdentifier"] for failure in answer["batchItemFailures"]]
    assert left == [stuck[1].id, stuck[2].id]
    outcome = handler(request("GET", f"/outcomes/{others[1].id}"), Invocation())
    assert body_of(outcome)["sequence"] == 2
    # What was decided and comes again all the same is answered, and settled.
    assert handler(records_of([record(others[1], times=2)], QUEUE), Invocation()) == {
        "batchItemFailures": []
    }


def test_what_is_no_command_is_a_dead_letter_and_done(handler: serverless.Handler) -> None:
    """Else it would come again until the queue gives it up, and its group would wait."""
    message = account(1, "OpenAccount")
    records = [
        record(account(1, "OpenAccount"), group="A-1", body="no JSON"),
        record(message, group="A-1"),
    ]
    assert handler(records_of(records, QUEUE), Invocation()) == {"batchItemFailures": []}
    outcome = handler(request("GET", f"/outcomes/{message.id}"), Invocation())
    assert body_of(outcome)["status"] == "accepted"
    assert handler._loop is not None
    letters = handler._loop.run_until_complete(app.opened.storage.dead_letters.page())
    assert [(letter.body, letter.source) for letter in letters] == [(b"no JSON", "commands")]


def test_without_time_nothing_is_begun(handler: serverless.Handler) -> None:
    """Two seconds before the deadline commands are put back, and the pump does nothing."""
    message = account(1, "OpenAccount")
    answer = handler(records_of([record(message)], QUEUE), Invocation(seconds=2))
    assert answer == {"batchItemFailures": [{"itemIdentifier": message.id}]}
    assert handler(SCHEDULED, Invocation(seconds=2)) == {"idle": False}
    answer = handler(request("GET", f"/outcomes/{message.id}"), Invocation(seconds=2))
    assert answer["statusCode"] == 404


def test_a_queue_that_is_not_fifo_is_refused(handler: serverless.Handler) -> None:
    """Such a queue has no groups, and no order."""
    plain = record(account(1, "OpenAccount"))
    del plain["Attributes"]["MessageGroupId"]
    with pytest.raises(errors.ConfigurationError, match=r"ends in \.fifo"):
        handler(records_of([plain], QUEUE.removesuffix(".fifo")), Invocation())


def test_a_sender_keeps_an_aggregates_order(cloud: Cloud) -> None:
    """No request has two messages of a group: SQS may refuse one of a request and not another."""
    sent = [account(number % 3, "DepositMoney", amount=str(number)) for number in range(1, 31)]
    cloud.send(sent)
    cloud.send(sent)  # within five minutes, what came comes once
    requests = list(_requests([outgoing(each, 1, 1_000_000) for each in sent]))
    assert sum(map(len, requests)) == len(sent)
    for entries in requests:
        assert len({entry["MessageGroupId"] for entry in entries}) == len(entries) <= 10
    source = QueueSource(cloud.endpoint, "bank-commands.fifo")
    came: list[Any] = []
    while messages := source.receive():
        came += (json.loads(message["Body"]) for message in messages)
        source.delete(messages)
    for number in range(3):
        ids = [each["id"] for each in came if each["aggregate_id"] == f"A-{number}"]
        assert ids == [each.id for each in sent if each.aggregate_id == f"A-{number}"]


async def test_a_client_only_sends(cloud: Cloud) -> None:
    """What SQS and SNS can't do is refused with what to do instead."""
    async with Client(cloud.broker_url, service="bank") as client:
        with pytest.raises(errors.ConfigurationError, match="store_url"):
            await client.execute("account", "A-1", "OpenAccount", {"account_id": "A-1"})
        broker = client._broker
        with pytest.raises(errors.ConfigurationError, match="Lambda"):
            await broker.open_intake(0, "me")
        with pytest.raises(errors.ConfigurationError, match="pump"):
            await broker.subscribe({0: 0})
        strange = '{"\uffff": "\ufffe"}'.encode()
        await broker.send([OutgoingCommand(0, "", strange)])
        assert await broker.queue_depth() == {0: 1}


# --- HTTP ----------------------------------------------------------------------------


def test_requests_and_answers_are_as_the_gateways(handler: serverless.Handler) -> None:
    """Binary bodies, stages, paths of both kinds of front; live events are refused."""
    body = base64.b64encode(b'{"account_id": "a/\xc3\xbc"}').decode()
    event = request("POST", "/aggregates/account/a%2F%C3%BC/OpenAccount", body, url=True)
    event["isBase64Encoded"] = True
    answer = handler(event, Invocation())
    assert (answer["statusCode"], answer["headers"]["etag"]) == (200, '"1"')
    paid = request("POST", "/aggregates/account/a%2F%C3%BC/DepositMoney", {"amount": "1"}, url=True)
    paid["headers"]["prefer"] = "respond-async"  # then nobody would decide it
    assert handler(paid, Invocation())["statusCode"] == 200
    read = request("GET", "/aggregates/account/a%2F%C3%BC/events?limit=1", url=True)
    (opened,) = body_of(handler(read, Invocation()))
    assert opened["subject"] == "a/ü"

    plain = request("POST", "/prod/aggregates/account/ü ?/OpenAccount".replace("?", "%"), {})
    plain["requestContext"]["stage"] = "prod"
    plain["body"] = '{"account_id": "\u00fc %"}'
    assert body_of(handler(plain, Invocation()))["aggregate_id"] == "ü %"

    answer = handler(request("GET", "/events"), Invocation())
    assert answer["statusCode"] == 501
    assert body_of(answer)["type"] == "/problems/not_streamed"
    assert handler(request("HEAD", "/views/account_query"), Invocation())["body"] == ""
    large = request("POST", "/aggregates/account/A-1/OpenAccount", {"account_id": "x" * 300_000})
    assert handler(large, Invocation())["statusCode"] == 413


def test_an_answer_over_six_megabytes_is_a_problem(
    cloud: Cloud, handler: serverless.Handler
) -> None:
    """Lambda would make an error of it that says nothing."""
    del cloud
    handler._asgi = Response(b"x" * 7 * 1024 * 1024)
    answer = handler(request("GET", "/large"), Invocation())
    assert (answer["statusCode"], len(answer["body"]) < 1000) == (500, True)
    assert body_of(answer)["type"] == "/problems/answer_too_large"
    handler._asgi = Response(bytes(range(256)))
    answer = handler(request("GET", "/binary"), Invocation())
    assert base64.b64decode(answer["body"]) == bytes(range(256))


def test_nobody_is_this_machine_in_a_function(cloud: Cloud, handler: serverless.Handler) -> None:
    """Without authorize everything is refused, whatever the event says of its sender."""
    del cloud
    open_to_nobody = serverless.handler(app, gateway=Gateway(app))
    event = request("GET", "/openapi.json")
    del event["requestContext"]["http"]["sourceIp"]
    try:
        assert open_to_nobody(event, Invocation())["statusCode"] == 403
    finally:
        open_to_nobody.close()
    with pytest.raises(errors.ConfigurationError, match="store"):
        serverless.handler(app, gateway=Gateway(app, via="queue"))
    assert handler(event, Invocation())["statusCode"] == 200


# --- Rings -----------------------------------------------------------------------------


def bell(table: str, pk: str, sk: str) -> dict[str, Any]:
    """Make the event of a change in a table."""
    arn = f"arn:aws:dynamodb:{REGION}:123456789012:table/{table}/stream/2026-01-01T00:00:00.000"
    keys = {"pk": {"S": pk}, "sk": {"S": sk}}
    one = {"eventSource": "aws:dynamodb", "eventSourceARN": arn, "dynamodb": {"Keys": keys}}
    return {"Records": [one]}


def test_a_stream_rings_for_heads_of_its_own_table_only(
    cloud: Cloud, handler: serverless.Handler
) -> None:
    """Else what the pump itself writes would ring it for ever."""
    handler(records_of([record(account(1, "OpenAccount"))], QUEUE), Invocation())
    assert handler(bell(cloud.table, "checkpoints/x", "1"), Invocation()) == {"rung": False}
    rung = handler(bell(cloud.table, "log/1", "head"), Invocation())
    assert rung["projector:account_query"] == 1
    with pytest.raises(errors.ConfigurationError, match=cloud.table):
        handler(bell("another", "log/1", "head"), Invocation())


@pytest.mark.parametrize(
    "event",
    [{}, {"Records": []}, {"Records": [{"eventSource": "aws:s3"}]}, {"httpMethod": "GET"}, []],
    ids=repr,
)
def test_an_unknown_event_is_refused(event: Any, handler: serverless.Handler) -> None:
    """Its sender, or Lambda's own metrics, have to tell somebody."""
    with pytest.raises(errors.ConfigurationError, match=r"payload format 2\.0"):
        handler(event, Invocation())


async def test_an_event_that_sns_does_not_take_says_where_its_data_is(cloud: Cloud) -> None:
    """The topic goes on behind it, in order, whatever somebody has put into an event."""
    subscriber = Subscriber(cloud)
    broker = broker_for(cloud.broker_url, service="bank")
    await broker.open()
    fields = {"id": "account/a/\u00fc/1", "partitionkey": "account/a/\u00fc", "partition": 0}
    events = [
        {**fields, "aggregatesequence": str(sequence), "data": {"text": "x" * size}}
        for sequence, size in ((1, 300_000), (2, 10))
    ]
    outgoing = [
        OutgoingEvent(offset, "account", "Event", json.dumps(event).encode())
        for offset, event in enumerate(events, 1)
    ]
    assert await broker.publish(0, "epoch", outgoing) == 2
    await broker.close()
    large, small = subscriber.events()
    assert large["dataref"] == "/aggregates/account/a%2F%C3%BC/events?after=0&limit=1"
    assert "data" not in large
    assert small == events[1]


def test_a_store_that_a_function_would_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite, which is the default too, is in the function's own folder."""
    monkeypatch.setattr(logs, "configure", _leave_logs)
    monkeypatch.delenv("CQRS_ES_STORE_URL", raising=False)
    made = serverless.handler(app)
    with pytest.raises(errors.SettingsError, match="CQRS_ES_STORE_URL"):
        made({"pump": {}}, Invocation())
    made.close()


def test_the_documentation_calls_the_handler(handler: serverless.Handler) -> None:
    """As a test of an application of one's own would."""
    text = (PROJECT / "docs" / "serverless.md").read_text()
    example = text.partition("## On your own machine")[2].split("```")[1].removeprefix("python")
    names: dict[str, Any] = {"handler": handler}
    exec(example, names)  # noqa: S102 - our own
    assert names["answer"]["idle"]


# --- Freezing ----------------------------------------------------------------------------


@pytest.fixture(params=["mysql", "postgres"])
def sql_url(request: pytest.FixtureRequest) -> str:
    """Name an empty database."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.mark.usefixtures("dynamodb_url")  # has credentials
def test_what_a_server_has_hung_up_on_during_a_freeze_is_connected_anew(
    sql_url: str, dynamodb_server: str, tmp_path: Path
) -> None:
    """A frozen function does not hear that; its next invocation, whatever of, is none the worse."""
    hang_up = _hung_up_by_mysql if sql_url.startswith("mysql") else _hung_up_by_postgres
    cloud = initialised(sql_url, dynamodb_server, tmp_path)
    source = QueueSource(cloud.endpoint, "bank-commands.fifo")
    token, log = "Bearer secret", tmp_path / "function.log"
    with Sandbox("worker.serverless.handler", cloud.environment, log) as sandbox:

        def post(path: str, **payload: str) -> None:
            event = request("POST", f"/aggregates/account/{path}", payload, authorization=token)
            assert sandbox.invoke(event)["statusCode"] == 200

        post("A-1/OpenAccount", account_id="A-1")
        hang_up(sql_url)
        post("A-1/DepositMoney", amount="5.00")
        hang_up(sql_url)
        cloud.send([account(1, "DepositMoney", amount="6.00")])
        source.bring(sandbox)
        assert source.depth() == 0
        hang_up(sql_url)
        assert sandbox.invoke(SCHEDULED)["idle"]
        hang_up(sql_url)
        row = request("GET", "/views/account_query/A-1", authorization=token)
        assert body_of(sandbox.invoke(row))["balance"] == "11.00"
        assert sandbox.starts == 1


def _hung_up_by_mysql(url: str) -> None:
    """End the connections to a database, as its wait_timeout does; wait until they are gone."""
    server, _, database = url.rpartition("/")
    these = f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"  # noqa: S608
    connected = run_on(server, these)
    assert connected
    for (id_,) in connected:
        run_on(server, f"KILL {id_}")
    until(lambda: not run_on(server, these), "connections stay")


def _hung_up_by_postgres(url: str) -> None:
    server, _, database = url.rpartition("/")
    these = f"FROM pg_stat_activity WHERE datname = '{database}'"
    ended = psql(server, f"SELECT pg_terminate_backend(pid) {these}")
    assert ended.split()
    until(lambda: psql(server, f"SELECT count(*) {these}").strip() == "0", "connections stay")


# --- Whole stories ---------------------------------------------------------------------


def test_a_transfer_spans_ten_invocations(cloud: Cloud, tmp_path: Path) -> None:
    """Frozen between any two, killed twice; its time-out fires while the money is on its way."""
    token = "Bearer secret"  # noqa: S105 - nobody's
    log = tmp_path / "transfers.log"
    done: list[dict[str, Any]] = []
    with Sandbox("tests.apps.transfer_function.handler", cloud.environment, log) as sandbox:

        def post(path: str, **payload: str) -> None:
            event = request("POST", f"/aggregates/account/{path}", payload, authorization=token)
            assert sandbox.invoke(event)["statusCode"] == 200

        for name in ("ada", "ben"):
            post(f"{name}/OpenAccount", account_id=name)
        post("ada/DepositMoney", amount="100.00")
        post("ada/TransferMoney", to_account="ben", amount="30.00")
        while len(done) < 2:  # the transfer has seen that, and begins
            done.append(sandbox.invoke(SCHEDULED))
        sandbox.kill()
        time.sleep(1.1)  # for so long nobody rings
        while not done[-1]["idle"]:
            done.append(sandbox.invoke(SCHEDULED))
            if len(done) == 5:
                sandbox.kill()
        for name, balance in (("ada", "70.00"), ("ben", "30.00")):
            row = request("GET", f"/views/account_query/{name}", authorization=token)
            assert body_of(sandbox.invoke(row))["balance"] == balance
    assert 4 + len(done) >= 10
    assert asyncio.run(_transfers_of(cloud)) == [
        "TransferBegan",
        "TransferDelayed",
        "TransferEnded",
    ]


async def _transfers_of(cloud: Cloud) -> list[str]:
    settings = Settings(store_url=cloud.store_url)
    async with app.open(settings, initialise=False, reach_broker=False) as opened:
        every = [event async for event in opened.replay()]
        left = await opened.storage.events.list_scheduled(None, 10)
        assert [row.key.type for row in left] == ["statement"]  # that of next month
        return [type(event.data).__name__ for event in every if event.aggregate_type == "transfer"]


def test_the_demos_own_script_is_answered(cloud: Cloud, tmp_path: Path) -> None:
    """The view that its last request reads is kept by another function, which the stream rings."""
    demo = bank_folder().parent / "rust_demo"
    if not demo.is_dir():
        pytest.skip(f"the demo's own requests are not in {demo}")
    template = (demo / "lambda_payload.json").read_text()
    names = ("DepositMoney", "WithdrawMoney", "WriteCheck")
    sent = [(demo / f"{name}.json").read_text() for name in names]
    bodies = ['{"OpenAccount": {"account_id": "demo"}}', *sent]

    def event(method: str, body: str) -> Any:
        text = template.replace("$ACCOUNT", "demo").replace('"POST"', f'"{method}"')
        return json.loads(text.replace("$PAYLOAD", json.dumps(body)[1:-1]))

    bell, over = Doorbell(cloud), threading.Event()
    function, pump = (
        Sandbox("examples.rust_demo_lambda.handler", cloud.environment, tmp_path / f"{name}.log")
        for name in ("function", "pump")
    )

    def ring() -> None:
        while not over.wait(0.05):
            if records := bell.rung():
                pump.invoke({"Records": records})

    with function, pump, ThreadPoolExecutor(1) as pool:
        pump.invoke(SCHEDULED)  # a request waits for its view for ten seconds: this has started
        ringing = pool.submit(ring)
        try:
            for body in bodies:
                assert function.invoke(event("POST", body))["statusCode"] == 204
            refused = function.invoke(event("POST", bodies[0]))
            assert (refused["statusCode"], bool(refused["body"])) == (400, True)
            answer = function.invoke(event("GET", ""))
        finally:
            over.set()
        ringing.result()
    assert (answer["statusCode"], body_of(answer)) == (
        200,
        {
            "account_id": "demo",
            "balance": 343.72,
            "written_checks": ["1170"],
            "ledger": [
                {"description": "deposit", "amount": 1000.0},
                {"description": "atm withdrawal", "amount": 400.0},
                {"description": "1170", "amount": 256.28},
            ],
        },
    )
