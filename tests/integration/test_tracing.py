"""One trace from the sender to the view, and nothing at all where nobody traces."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import redis
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, StatusCode

from cqrs_es import Aggregate, Envelope, View, command, event
from cqrs_es.application import Application
from cqrs_es.client import Client, SyncClient
from cqrs_es.messages import Status
from cqrs_es.settings import Settings
from cqrs_es.telemetry.spans import Spans
from cqrs_es.telemetry.tracing import NO_TRACING, tracing_for
from cqrs_es.testing import TestApp
from cqrs_es.types import AggregateKey, new_command_id
from domain.account import BankAccount, OpenAccount
from tests.bank_data import PROJECT
from tests.samples import (
    Add,
    Added,
    AddThenCrash,
    Commit,
    Counter,
    Crash,
    Refuse,
    Services,
    T,
    counting_app,
)
from tests.tracing import Recorder, attributes_of, context_of, links_of, traceparent_of
from worker.app import app as bank

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.command_line import Here

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SENDER = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Set a provider up, as an application would at its start."""
    made = Recorder()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", made.provider)
    return made


@pytest.fixture
def services() -> Services:
    return Services()


@pytest.fixture
async def t(recorder: Recorder, services: Services) -> AsyncIterator[TestApp]:
    assert recorder.spans == []
    async with TestApp(counting_app(services)) as app:
        yield app


def added(n: int, aggregate_id: str = "A", **fields: object) -> bytes:
    message = {
        "id": new_command_id(),
        "type": "Add",
        "aggregate_type": "counter",
        "aggregate_id": aggregate_id,
        "payload": {"n": n},
    }
    return orjson.dumps(message | fields)


# --- One trace -----------------------------------------------------------------


@pytest.mark.parametrize("broker", ["redis", "amqp"])
async def test_one_trace_from_send_to_view(
    request: pytest.FixtureRequest, recorder: Recorder, mysql_url: str, broker: str
) -> None:
    """Over servers: sent, processed, appended, published, and projected into each view."""
    broker_url: str = request.getfixturevalue(f"{broker}_url")
    service = f"traced{new_command_id()[:8]}"
    settings = Settings(store_url=mysql_url, broker_url=broker_url, service=service, partitions=2)
    async with (
        bank.open(settings, initialise=True) as opened,
        opened.running(),
        Client(broker_url, service=service, store_url=mysql_url) as client,
    ):
        with trace.get_tracer("shop").start_as_current_span("order"):
            outcome = await client.execute("account", "A", "OpenAccount", {"account_id": "A"})
        for view in ("account_query", "bank_totals"):
            await client.wait_for_view(view, outcome)
    assert recorder.tree() == {
        "": {"order"},
        "order": {"send OpenAccount"},
        "send OpenAccount": {"process OpenAccount", "publish events", "project AccountOpened"},
        "process OpenAccount": {"append events"},
        "project AccountOpened": {"project account_query", "project bank_totals"},
    }
    assert len({context_of(span).trace_id for span in recorder.spans}) == 1
    process = recorder.one("process OpenAccount")
    assert process.kind is SpanKind.CONSUMER
    system, separator = ("redis", ":") if broker == "redis" else ("rabbitmq", ".")
    partition = AggregateKey("account", "A").partition(2)
    assert attributes_of(process) == {
        "messaging.system": system,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": f"{service}{separator}commands",
        "messaging.destination.partition.id": str(partition),
        "messaging.message.id": outcome.command_id,
        "messaging.message.body.size": attributes_of(process)["messaging.message.body.size"],
        "cqrs_es.command.type": "OpenAccount",
        "cqrs_es.aggregate.type": "account",
        "cqrs_es.aggregate.id": "A",
        "cqrs_es.outcome": "accepted",
        "cqrs_es.duplicate": False,
        "cqrs_es.events": 1,
    }
    assert recorder.one("send OpenAccount").kind is SpanKind.PRODUCER
    publish = attributes_of(recorder.one("publish events"))
    assert publish["messaging.operation.type"] == "send"
    assert (publish["cqrs_es.offset.first"], publish["messaging.batch.message_count"]) == (1, 1)


async def test_execution_within_the_process(recorder: Recorder) -> None:
    """The same, without a queue: the caller's span, execution, and the view's."""
    settings = Settings(store_url="memory://")
    async with bank.open(settings) as opened, opened.running():
        with trace.get_tracer("shop").start_as_current_span("order"):
            outcome = await opened.execute(BankAccount, "A", OpenAccount("A"))
        await opened.wait_for("account_query", outcome)
        await opened.wait_for("bank_totals", outcome)
    tree = recorder.tree()
    assert tree["order"] == {"execute OpenAccount"}
    assert tree["execute OpenAccount"] == {
        "append events",
        "project AccountOpened",
        "publish events",
    }


def test_the_command_line_begins_a_trace_too(
    here: Here, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """What `send` puts into the queue names its span."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    here.done("init")
    here.done("send", "account", "A", "OpenAccount", '{"account_id": "A"}')
    (body,) = _queued(redis_url)
    sent = recorder.one("send OpenAccount")
    assert orjson.loads(body)["metadata"] == {"traceparent": traceparent_of(sent)}


def test_threads_trace_too(
    here: Here, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """What a thread sends through the client without asyncio is a child of the thread's span."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    here.done("init")
    with (
        SyncClient(redis_url, service="bank") as client,
        trace.get_tracer("shop").start_as_current_span("order"),
    ):
        client.send("account", "A", "OpenAccount", {"account_id": "A"})
    assert recorder.tree() == {"": {"order"}, "order": {"send OpenAccount"}}


def _queued(redis_url: str) -> list[bytes]:
    with redis.Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType]
        entries: Any = client.xrange("bank:commands:0")
    return [fields[b"command"] for _, fields in entries]


@command
class Call:
    pass


@event
class Called:
    pass


@dataclass
class Caller(Aggregate[Call, Called, str], type="caller"):
    """Its services and its handler have spans of their own."""

    calls: int = 0

    async def handle(self, command: Call, services: str) -> AsyncIterator[Called]:
        del command
        with trace.get_tracer("author").start_as_current_span(f"call {services}"):
            yield Called()

    def apply(self, event: Called) -> None:
        del event
        self.calls += 1


@dataclass
class Calls(View[Called], name="calls"):
    calls: int = 0

    def update(self, event: Envelope[Called]) -> None:
        del event
        with trace.get_tracer("author").start_as_current_span("update"):
            self.calls += 1


def _dialled(_: object) -> str:
    with trace.get_tracer("author").start_as_current_span("dial"):
        return "home"


async def test_spans_of_authors_nest(recorder: Recorder) -> None:
    """Those of services and handlers in the command's, those of views in the projection's."""
    app = Application("calling")
    app.aggregate(Caller, services=_dialled)
    app.view(Calls)
    async with TestApp(app) as t:
        await t.send(Caller, "A", Call(), metadata={"traceparent": SENDER})
        await t.drain()
    tree = recorder.tree()
    assert tree["process Call"] == {"dial", "call home", "append events"}
    assert tree["project calls"] == {"update"}


async def test_a_batch_is_linked_with_its_messages(t: TestApp, recorder: Recorder) -> None:
    """Below the first, linked with the others, and they with it: every trace leads there."""
    contexts = [f"00-{n:032x}-{n:016x}-01" for n in range(1, 6)]
    bodies = [
        added(1, f"C-{n}", metadata={"traceparent": context}) for n, context in enumerate(contexts)
    ]
    await t.enqueue(*bodies)
    await t.drain()
    process = recorder.named("process Add")
    assert sorted(context_of(span).trace_id for span in process) == [1, 2, 3, 4, 5]
    ids = {context_of(span).span_id for span in process}
    batches = recorder.named("append events")
    for batch in batches:
        assert batch.parent is not None
        assert batch.parent.span_id in ids
        for span in process:
            if context_of(span).span_id in links_of(batch):
                assert context_of(batch).span_id in links_of(span)
    reached = [{batch.parent.span_id} | links_of(batch) for batch in batches if batch.parent]
    assert set().union(*reached) == ids
    assert len(recorder.named("project Added")) == 5
    projections = recorder.named("project totals")
    linked = sum(len(links_of(span)) for span in projections)
    assert len(projections) + linked == 5


# --- What becomes of commands ---------------------------------------------------


async def test_a_rejection_is_no_error(t: TestApp, recorder: Recorder) -> None:
    """It is an answer, with its code."""
    await t.send(Counter, "A", Refuse(), metadata={"correlation_id": "order-17"})
    span = recorder.one("process Refuse")
    assert span.status.status_code is StatusCode.UNSET
    attributes = attributes_of(span)
    assert attributes["cqrs_es.outcome"] == "rejected"
    assert attributes["cqrs_es.outcome.code"] == "refused"
    assert attributes["messaging.message.conversation_id"] == "order-17"


async def test_a_failure_is_an_error_with_every_attempt(t: TestApp, recorder: Recorder) -> None:
    """Each exception is recorded; the span ends with the last."""
    with t.expect_failures() as failures:
        outcome = await t.send(Counter, "A", AddThenCrash(1))
    assert outcome.status is Status.FAILED
    span = recorder.one("process AddThenCrash")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes_of(span)["error.type"] == "internal_error"
    exceptions = [e.attributes or {} for e in span.events if e.name == "exception"]
    assert len(exceptions) == len(failures) > 1
    assert all("Crash" in str(e["exception.type"]) for e in exceptions)


async def test_a_recorded_exception_has_no_password(
    t: TestApp, recorder: Recorder, services: Services
) -> None:
    """Neither its message nor its traceback, nor the span's status."""

    async def fail() -> None:
        raise Crash("no answer from https://user:hunter2@host/")

    services.hooks["atm"] = fail
    with t.expect_failures():
        await t.enqueue(added(1, type="AddAfterCall", payload={"name": "atm", "n": 1}))
        await t.drain()
    span = recorder.one("process AddAfterCall")
    assert "https://user:***@host/" in str([e.attributes for e in span.events])
    assert "hunter2" not in span.to_json()


async def test_a_duplicate_says_so(t: TestApp, recorder: Recorder) -> None:
    """Also where it is sent within another trace: metadata is no part of what a command is."""
    command_id = new_command_id()
    first = added(1, id=command_id, metadata={"traceparent": SENDER})
    again = added(1, id=command_id, metadata={"traceparent": SENDER.replace("4bf9", "5bf9")})
    await t.enqueue(first)
    await t.drain()
    await t.enqueue(again)
    await t.drain()
    said = [attributes_of(span)["cqrs_es.duplicate"] for span in recorder.named("process Add")]
    assert said == [False, True]


async def test_a_view_that_fails_is_an_error_of_its_event(recorder: Recorder) -> None:
    """Of the one event that it can't take, not of those that were in the batch with it."""

    @dataclass
    class Picky(View[Added], name="picky"):
        total: int = 0

        def update(self, event: Envelope[Added]) -> None:
            if event.data.n == 13:
                raise Crash
            self.total += event.data.n

    async with TestApp(counting_app(view=Picky)) as t:
        with t.expect_failures():
            bodies = [
                added(n, f"C-{n}", metadata={"traceparent": f"00-{n:032x}-{n:016x}-01"})
                for n in (11, 12, 13, 14)
            ]
            await t.enqueue(*bodies)
            await t.drain()
    projected = recorder.named("project Added")
    failed = [span for span in projected if span.status.status_code is StatusCode.ERROR]
    assert [context_of(span).trace_id for span in failed] == [13]


async def test_a_view_has_spans_of_the_events_that_it_follows(recorder: Recorder) -> None:
    """None of another aggregate's, nor of those that it passes over since their own is parked."""

    @dataclass
    class Picky(View[Added], name="picky"):
        total: int = 0

        def update(self, event: Envelope[Added]) -> None:
            if event.data.n == 13:
                raise Crash
            self.total += event.data.n

    app = counting_app(view=Picky)
    app.aggregate(T)
    async with TestApp(app) as t:
        with trace.get_tracer("shop").start_as_current_span("order"):
            await t.opened.execute(T, "t", Commit(["Started", "Done"]))
        await t.drain()
        assert not [span for span in recorder.spans if span.name.startswith("project")]
        with t.expect_failures(), trace.get_tracer("shop").start_as_current_span("order"):
            await t.opened.execute(Counter, "A", Add(13))
            await t.drain()
            await t.opened.execute(Counter, "A", Add(1))
            await t.drain()
    (failed,) = recorder.named("project Added")
    assert attributes_of(failed)["cqrs_es.aggregate.sequence"] == 1
    assert failed.status.status_code is StatusCode.ERROR


# --- What senders send ------------------------------------------------------------


async def test_what_a_sender_gave_goes_on_as_it_is(t: TestApp, recorder: Recorder) -> None:
    """The sender's context is the parent, in metadata and on the topic as it was sent."""
    metadata = {"traceparent": SENDER, "tracestate": "vendor=1"}
    await t.send(Counter, "A", Add(1), metadata=metadata)
    await t.drain()
    (envelope,) = await t.events(Counter, "A")
    assert envelope.metadata == metadata
    for name in ("process Add", "project Added", "publish events"):
        span = recorder.one(name)
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == TRACE_ID
        assert span.parent.span_id == 0x00F067AA0BA902B7
        assert span.parent.trace_state == {"vendor": "1"}
    assert recorder.named("send Add") == []


HOSTILE = [
    "",
    "00",
    "x" * 4000,
    f"00-{TRACE_ID}-00f067aa0ba902b7",
    f"ff-{TRACE_ID}-00f067aa0ba902b7-01",
    f"00-{'0' * 32}-00f067aa0ba902b7-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01",
    f"00-{TRACE_ID}-00f067aa0ba902b7-01-more",
    "00-٤bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    f"00-{TRACE_ID}-00f067aa0ba902b7-zz",
]


@pytest.mark.parametrize("traceparent", HOSTILE)
async def test_a_malformed_context_is_none(
    t: TestApp, recorder: Recorder, traceparent: str
) -> None:
    """The command is handled, in a trace of its own; nobody follows what was made up."""
    outcome = await t.send(Counter, "A", Add(1), metadata={"traceparent": traceparent})
    await t.drain()
    assert outcome.accepted
    assert recorder.one("process Add").parent is None
    assert recorder.named("project Added") == []


@pytest.mark.parametrize(
    "tracestate", ["", "=", "a=1,a=2", "," * 4000, "a=" + "x" * 4000, "\x00", "ü=1", "a" * 4000]
)
async def test_a_malformed_state_spoils_nothing(
    t: TestApp, recorder: Recorder, tracestate: str
) -> None:
    """The trace goes on without it."""
    metadata = {"traceparent": SENDER, "tracestate": tracestate}
    outcome = await t.send(Counter, "A", Add(1), metadata=metadata)
    assert outcome.accepted
    assert f"{context_of(recorder.one('process Add')).trace_id:032x}" == TRACE_ID


async def test_a_sender_can_not_make_up_names_of_spans(t: TestApp, recorder: Recorder) -> None:
    """What is no command here is called `unknown`: names are few."""
    await t.enqueue(added(1, type="MadeUp"), added(1, type="Other", aggregate_type="other"))
    await t.drain()
    assert {span.name for span in recorder.spans} == {"process unknown", "append events"}


async def test_metadata_without_room_stays_as_it_is(recorder: Recorder) -> None:
    """A message that was valid is not made invalid by a trace."""
    metadata = {f"key-{n}": "x" for n in range(32)}
    async with bank.open(Settings(store_url="memory://")) as opened:
        outcome = await opened.execute(BankAccount, "A", OpenAccount("A"), metadata=metadata)
        (envelope,) = await opened.events(BankAccount, "A")
    assert outcome.accepted
    assert envelope.metadata == metadata
    assert recorder.one("execute OpenAccount").parent is None


async def test_an_unsampled_trace_stays_unsampled(t: TestApp, recorder: Recorder) -> None:
    """Nothing is recorded, of the authors' spans neither."""
    await t.send(Counter, "A", Add(1), metadata={"traceparent": UNSAMPLED})
    await t.drain()
    assert recorder.spans == []


# --- Off --------------------------------------------------------------------------


def test_without_a_provider_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API alone, as instrumented libraries bring it, is not enough."""
    assert tracing_for("bank", "redis") is NO_TRACING
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    assert isinstance(tracing_for("bank", "redis"), Spans)


def test_opentelemetry_is_not_imported_unless_somebody_else_does() -> None:
    """A whole run of the bank does without it, and so where it is not installed."""
    program = (
        "import sys\n"
        "from cqrs_es.cli.main import _run\n"
        "assert _run(sys.argv[1:]) == 0\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    arguments = ["run", "--commands", "examples/bank.jsonl", "--until-idle"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=PROJECT,
        env={"CQRS_ES_STORE_URL": "memory://", "CQRS_ES_APP": "worker.app:app"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
