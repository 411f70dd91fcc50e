"""The HTTP gateway as docs/contract.md has it, asked from outside as a process."""

from __future__ import annotations

import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.command_line import cqrs_es, running
from tests.gateways import JSON, Stream, served
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gateways import Served


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a gateway, and beside it what keeps the views."""
    settings = {
        "CQRS_ES_STORE_URL": f"sqlite:///{tmp_path_factory.mktemp('web')}/web.db",
        "CQRS_ES_APP": "tests.apps.web:app",
    }
    with served(**settings) as gateway, running("run", **settings):
        yield gateway


@pytest.fixture
def note() -> str:
    """Name a note that is not there yet."""
    return f"note {uuid.uuid4()}"


# --- Commands -------------------------------------------------------------------


def test_a_command_is_answered_with_its_outcome(web: Served, note: str) -> None:
    answer = web.write(note)
    assert answer.status == 200
    assert answer.headers["etag"] == '"1"'
    outcome = answer.json
    assert (outcome["status"], outcome["aggregate_id"], outcome["sequence"]) == (
        "accepted",
        note,
        1,
    )
    assert outcome["events"] == [{"type": "Written", "sequence": 1}]
    assert web.get(f"/outcomes/{outcome['command_id']}").json == outcome


def test_what_takes_longer_is_answered_by_202_and_a_place_to_look(web: Served, note: str) -> None:
    path = f"/aggregates/note/{note}/Sleep".replace(" ", "%20")
    for preference in ("respond-async", "wait=0", "respond-async, wait=5"):
        answer = web.post(path, {"seconds": 0.2}, Prefer=preference)
        assert answer.status == 202, answer
        where = answer.headers["location"]
        until(partial(_is_there, web, where))
        assert web.get(where).json["status"] == "accepted"
    waited = web.post(path, {"seconds": 3}, Prefer="wait=1")
    assert waited.status == 202
    early = web.get(waited.headers["location"])
    assert (early.status, early.code, early.headers["retry-after"]) == (404, "unknown_outcome", "1")


def _is_there(web: Served, path: str) -> bool:
    return web.get(path).status == 200


def test_a_key_is_done_once_by_each_principal(web: Served, note: str) -> None:
    first = web.write(note, Idempotency_Key=note, X_User="ada").json
    again = web.write(note, Idempotency_Key=f'"{note}"', X_User="ada").json
    assert again == first | {"duplicate": True}
    assert uuid.UUID(first["command_id"]).version == 8
    assert web.write(note, Idempotency_Key=note, X_User="bob").json["sequence"] == 2
    reused = web.write(note, "other", Idempotency_Key=note, X_User="ada")
    assert (reused.status, reused.code) == (422, "id_reused")


def test_a_uuid_as_key_is_the_command_id(web: Served, note: str) -> None:
    command_id = str(uuid.uuid4())
    assert web.write(note, Idempotency_Key=command_id.upper()).json["command_id"] == command_id


def test_a_key_from_fifty_connections_at_once_has_one_effect(web: Served, note: str) -> None:
    """All of them get the same outcome, and all but one as a duplicate."""
    gate = threading.Barrier(50)

    def ask(_: int) -> tuple[int, dict[str, object]]:
        gate.wait(60)
        answer = web.write(note, Idempotency_Key=note)
        return answer.status, answer.json

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {status for status, _ in answers} == {200}
    assert sorted(bool(outcome.pop("duplicate")) for _, outcome in answers) == [False] + [True] * 49
    assert all(outcome == answers[0][1] for _, outcome in answers)
    assert web.write(note).json["sequence"] == 2


def test_conditions_say_what_the_aggregate_must_be_at(web: Served, note: str) -> None:
    assert web.write(note, If_None_Match="*").status == 200
    taken = web.write(note, If_None_Match="*")
    assert (taken.status, taken.code) == (412, "conflict")
    assert taken.json["outcome"]["error"]["code"] == "conflict"
    assert web.write(note, If_Match='"1"').headers["etag"] == '"2"'
    assert web.write(note, If_Match='"1"').status == 412
    refused = web.post(f"/aggregates/note/{uuid.uuid4()}/Refuse", {})
    assert (refused.status, refused.code) == (409, "conflict")


@pytest.mark.parametrize(
    "headers",
    [
        {"If_Match": "1"},
        {"If_Match": '"one"'},
        {"If_Match": 'W/"1"'},
        {"If_Match": '"1", "2"'},
        {"If_Match": '"99999999999999999999"'},
        {"If_Match": '"-1"'},
        {"If_Match": "*"},
        {"If_None_Match": '"1"'},
        {"If_Match": '"1"', "If_None_Match": "*"},
        {"Correlation_Id": "x" * 9000},
    ],
    ids=str,
)
def test_a_bad_header_is_400(web: Served, note: str, headers: dict[str, str]) -> None:
    answer = web.write(note, **headers)
    assert (answer.status, answer.code[:8]) == (400, "invalid_")


@pytest.mark.parametrize("key", ["", '""', "x" * 256])
def test_a_bad_key_is_400(web: Served, note: str, key: str) -> None:
    assert web.write(note, Idempotency_Key=key).code == "invalid_key"


def test_a_header_says_of_which_version_the_payload_is(web: Served, note: str) -> None:
    path = f"/aggregates/note/{note}/Sign".replace(" ", "%20")
    whole = web.post(path, {"name": "Ada Lovelace"})
    split = web.post(path, {"first": "Ada", "last": "Lovelace"}, Command_Version="1.1")
    assert (whole.status, split.status) == (200, 200)
    path = path.replace("Sign", "events")
    assert [each["data"]["text"] for each in web.get(path).json] == ["Lovelace, Ada"] * 2
    newer = web.post(path.replace("events", "Sign"), {"all": "Ada"}, Command_Version="9.0")
    assert (newer.status, newer.code) == (503, "unknown_version")
    none = web.post(path.replace("events", "Sign"), {"name": "Ada"}, Command_Version="new")
    assert (none.status, none.code) == (400, "invalid_message")


def test_a_command_of_another_name_than_this_code_has(web: Served, note: str) -> None:
    """One of before is upcast; one with a version is newer code's, which may be there soon."""
    path = f"/aggregates/note/{note}/".replace(" ", "%20")
    assert web.post(path + "Scribble", {"text": "as it was called"}).status == 200
    newer = web.post(path + "Paint", {"colour": "red"}, Command_Version="1.1")
    assert (newer.status, newer.code) == (503, "unknown_version")
    assert "retry-after" in newer.headers
    wrong = web.post(path + "Paint", {"colour": "red"}, Command_Version="1")
    assert (wrong.status, wrong.code) == (404, "unknown_command")


def test_headers_become_metadata(web: Served, note: str) -> None:
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    web.write(note, Correlation_Id="order-17", traceparent=trace)
    (event,) = web.get(f"/aggregates/note/{note}/events".replace(" ", "%20")).json
    assert event["correlationid"] == "order-17"
    assert event["traceparent"].startswith(f"00-{'ab' * 16}-")
    assert '"principal":"ada"' in event["metadata"]


@pytest.mark.parametrize(
    ("path", "body", "content_type", "expected"),
    [
        ("/aggregates/note/A/Write", b'{"text": 1}', JSON, (422, "invalid_command")),
        ("/aggregates/note/A/Write", b"{}", JSON, (422, "invalid_command")),
        ("/aggregates/note/A/Nothing", b"{}", JSON, (404, "unknown_command")),
        ("/aggregates/nothing/A/Write", b"{}", JSON, (404, "unknown_aggregate_type")),
        ("/aggregates/follow/A/Elapsed", b"{}", JSON, (404, "unknown_aggregate_type")),
        ("/aggregates/note/A/Write", b"{", JSON, (400, "invalid_json")),
        ("/aggregates/note/A/Write", b"", JSON, (400, "invalid_json")),
        ("/aggregates/note/A/Write", b'{"text": "\xff"}', JSON, (400, "invalid_json")),
        ("/aggregates/note/A/Write", b"[]", JSON, (400, "invalid_message")),
        (
            "/aggregates/note/A/Write",
            b'{"a":' * 17 + b"1" + b"}" * 17,
            JSON,
            (400, "invalid_message"),
        ),
        ("/aggregates/note/A%00/Write", b"{}", JSON, (400, "invalid_id")),
        (f"/aggregates/note/{'x' * 256}/Write", b"{}", JSON, (400, "invalid_id")),
        ("/aggregates/note/%ff/Write", b"{}", JSON, (400, "invalid_path")),
        (
            "/aggregates/note/A/Write",
            b'{"text": "%s"}' % (b"x" * 262_200),
            JSON,
            (413, "too_large"),
        ),
        ("/aggregates/note/A/Write", b"x" * 3_000_000, JSON, (413, "too_large")),
        ("/aggregates/note/A/Write", b"{}", {}, (415, "unsupported_media_type")),
        (
            "/aggregates/note/A/Write",
            b"{}",
            {"Content-Type": "text/plain"},
            (415, "unsupported_media_type"),
        ),
        ("/aggregates/note/A/Crash", b"{}", JSON, (500, "internal_error")),
        ("/outcomes/A", b"{}", JSON, (405, "method_not_allowed")),
        ("/nothing", b"{}", JSON, (404, "unknown_route")),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_a_problem(
    web: Served, path: str, body: bytes, content_type: dict[str, str], expected: tuple[int, str]
) -> None:
    answer = web.ask("POST", path, body, content_type)
    assert (answer.status, answer.code) == expected
    assert ("outcome" in answer.json) == (expected[1] in {"invalid_command", "internal_error"})


def test_who_may_not_is_403_and_who_is_unknown_401(web: Served, note: str) -> None:
    denied, unknown = web.write(note, X_User="mallory"), web.write(note, X_User="nobody")
    assert (denied.status, denied.code) == (403, "denied")
    assert (unknown.status, unknown.code) == (401, "unknown")
    assert unknown.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "name", ["a/b", "../..", "\u00e9", "e\u0301", "%2F", "'; DROP--", "?x=1#y", "😀", ""]
)
def test_an_id_is_what_its_segment_decodes_to(web: Served, name: str) -> None:
    """Two that differ by normalisation are two; a slash within one is written %2F."""
    note = f"{uuid.uuid4()} {name}"
    outcome = web.write(note).json
    assert (outcome["aggregate_id"], outcome["sequence"]) == (note, 1)


# --- Views ----------------------------------------------------------------------


def seen(outcome: dict[str, object]) -> str:
    return f"seen={outcome['partition']}:{outcome['offset']}"


def test_a_row_is_had_with_what_was_written_before(web: Served, note: str) -> None:
    outcome = web.write(note, "hello").json
    path = f"/views/notes/{note}".replace(" ", "%20")
    answer = web.get(f"{path}?{seen(outcome)}", Prefer="wait=60")
    assert (answer.status, answer.json, answer.headers["etag"]) == (200, {"last": "hello"}, '"1"')
    unchanged = web.get(path, If_None_Match='"0", "1"')
    assert (unchanged.status, unchanged.body, unchanged.headers["etag"]) == (304, b"", '"1"')
    assert web.get(path, If_None_Match='"2"').status == 200
    assert web.ask("HEAD", path).headers["etag"] == '"1"'


def test_a_view_that_is_behind_says_so(web: Served) -> None:
    for path in ("/views/notes", f"/views/notes/{uuid.uuid4()}"):
        answer = web.get(f"{path}?seen=0:999999999", Prefer="wait=0")
        assert (answer.status, answer.code) == (503, "view_behind")
        assert answer.headers["retry-after"] == "1"


def test_a_parked_aggregate_says_so(web: Served, note: str) -> None:
    outcome = web.write(note, "poison").json
    path = f"/views/notes/{note}?{seen(outcome)}".replace(" ", "%20")
    answer = web.get(path, Prefer="wait=60")
    assert (answer.status, answer.code) == (500, "view_parked")


def test_rows_come_in_pages(web: Served, note: str) -> None:
    outcomes = [web.write(f"~{note} {number}").json for number in range(5)]
    path: str | None = f"/views/notes?limit=2&after=~{note}&{seen(outcomes[-1])}".replace(
        " ", "%20"
    )
    found: list[str] = []
    while path:
        answer = web.get(path)
        found += [row["view_id"] for row in answer.json]
        link = answer.headers.get("link", "")
        assert not link or link.endswith('>; rel="next"')
        path = link.partition(">")[0][1:]
    assert found == [f"~{note} {number}" for number in range(5)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/views/nothing", (404, "unknown_view")),
        ("/views/notes/nothing", (404, "unknown_id")),
        ("/views/notes/%00", (400, "invalid_id")),
        ("/views/notes?limit=0", (400, "invalid_query")),
        ("/views/notes?limit=x", (400, "invalid_query")),
        ("/views/notes?seen=99:1", (400, "invalid_query")),
        ("/views/notes?seen=1", (400, "invalid_query")),
        ("/outcomes/nothing", (400, "invalid_id")),
        (f"/outcomes/{uuid.UUID(int=7)}", (404, "unknown_outcome")),
        ("/aggregates/note/nothing/events", (404, "unknown_id")),
        ("/aggregates/note/nothing/events?after=7", (404, "unknown_id")),
        ("/aggregates/note/nothing/events?after=x", (400, "invalid_query")),
        (f"/aggregates/note/nothing/events?after={'9' * 5_000}", (400, "invalid_query")),
        ("/aggregates/nothing/A/events", (404, "unknown_aggregate_type")),
        ("/aggregates/follow/A/events", (404, "unknown_aggregate_type")),
        ("/events?partition=99", (400, "invalid_query")),
        ("/events?from=x", (400, "invalid_query")),
    ],
)
def test_what_there_is_not_is_a_problem(web: Served, path: str, expected: tuple[int, str]) -> None:
    answer = web.get(path)
    assert (answer.status, answer.code) == expected


# --- Events ---------------------------------------------------------------------


def test_an_aggregates_events_come_in_pages(web: Served, note: str) -> None:
    for number in range(5):
        web.write(note, str(number))
    path: str | None = f"/aggregates/note/{note}/events?limit=2".replace(" ", "%20")
    found: list[str] = []
    while path:
        answer = web.get(path)
        assert answer.headers["content-type"] == "application/cloudevents-batch+json"
        found += [event["data"]["text"] for event in answer.json]
        path = answer.headers.get("link", "").partition(">")[0][1:]
    assert found == ["0", "1", "2", "3", "4"]
    beyond = web.get(f"/aggregates/note/{note}/events?after=5".replace(" ", "%20"))
    assert beyond.json == []


def test_events_come_as_they_are_committed(web: Served, note: str) -> None:
    stream = Stream(web)
    outcome = web.write(note).json
    (sent,) = stream.take(1)
    assert (sent.event, sent.data["commandid"]) == ("message", outcome["command_id"])
    epoch, _, places = sent.id.partition(";")
    assert epoch == sent.data["logepoch"]
    assert places == f"{outcome['partition']}:{outcome['offset']}"
    stream.close()


def test_a_stream_resumes_behind_the_last_event(web: Served, note: str) -> None:
    """Killed and resumed a hundred times while commands come, it has each offset once, in order."""
    begin = Stream(web, "/events?partition=0")
    first = web.write(note).json
    begin.take(1)
    begin.close()
    last, offsets = begin.last, [int(first["offset"])]
    writing = ThreadPoolExecutor(4)
    written = [writing.submit(web.write, f"{note} {number}") for number in range(200)]
    while len(offsets) < 201:
        stream = Stream(web, last=last)
        some = stream.take(min(2, 201 - len(offsets)))
        stream.close()
        offsets += [int(sent.data["offset"]) for sent in some]
        last = some[-1].id
    assert all(each.result().status == 200 for each in written)
    assert offsets == list(range(offsets[0], offsets[0] + 201))


def test_a_stream_may_be_of_some_types(web: Served, note: str) -> None:
    stream = Stream(web, "/events?types=Slept,Nothing")
    web.write(note)
    web.post(f"/aggregates/note/{uuid.uuid4()}/Sleep", {"seconds": 0})
    assert [sent.data["type"] for sent in stream.take(1)] == ["Slept"]
    stream.close()


def test_another_epoch_begins_from_the_start(web: Served, note: str) -> None:
    web.write(note)
    stream = Stream(web, last=f"{uuid.UUID(int=1)};0:7")
    epoch, event = stream.take(2)
    assert (epoch.event, epoch.data["logepoch"]) == ("epoch", event.data["logepoch"])
    assert event.data["offset"] == "1"
    stream.close()


def test_a_place_in_the_future_or_none_is_refused(web: Served, note: str) -> None:
    web.write(note)
    epoch = Stream(web, "/events?from=start")
    (sent,) = epoch.take(1)
    epoch.close()
    for place in (f"{sent.data['logepoch']};0:999999999", "nonsense", ";;"):
        answer = web.get("/events", Last_Event_ID=place)
        assert (answer.status, answer.code) == (400, "invalid_header")


def test_the_schemas_are_served(web: Served) -> None:
    assert "/aggregates/note/{id}/Write" in web.get("/openapi.json").json["paths"]
    assert web.get("/asyncapi.json").json["asyncapi"] == "3.0.0"


def test_a_path_is_described_with_its_methods_and_what_it_refuses(web: Served) -> None:
    """Those who are unknown, at every path; other methods, by those that the path has."""
    for path, item in web.get("/openapi.json").json["paths"].items():
        (method, operation) = next(iter(item.items()))
        where = (
            path.replace("{command_id}", str(uuid.UUID(int=7))).replace("{", "").replace("}", "")
        )
        assert web.ask(method.upper(), where, b"", {"X-User": "nobody"}).status == 401
        assert "401" in operation["responses"], path
        other = web.ask("DELETE", where)
        allowed = {each.strip().lower() for each in other.headers["allow"].split(",")}
        assert (other.code, allowed - {"head"}) == ("method_not_allowed", {method}), path


# --- Raw bytes --------------------------------------------------------------------


def test_a_gibibyte_is_refused_without_being_read(web: Served) -> None:
    head = (
        b"POST /aggregates/note/A/Write HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    )
    answer = web.raw(head + b"Content-Length: 1073741824\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.endswith(b"}")


def test_what_is_no_request_is_a_problem(web: Served) -> None:
    for request in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ):
        answer = web.raw(request)
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"/problems/invalid_request" in answer


def test_headers_that_are_too_large_are_refused(web: Served) -> None:
    """Also where they come at once, and are complete."""
    answer = web.get("/nothing", X="x" * 60_000, Y="y" * 40_000)
    assert (answer.status, answer.code) == (400, "invalid_header")


def test_pipelined_requests_are_answered_in_order(web: Served) -> None:
    first = b"GET /views/nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = web.raw(first + last)
    assert 0 < answer.index(b"unknown_view") < answer.index(b"unknown_route")


def test_a_client_that_leaves_during_a_wait_loses_nothing(web: Served, note: str) -> None:
    command_id = str(uuid.uuid4())
    path = f"/aggregates/note/{note}/Sleep".replace(" ", "%20").encode()
    body = b'{"seconds": 0.3}'
    with web.connected() as connection:
        connection.sendall(
            b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Idempotency-Key: " + command_id.encode() + b"\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
    until(partial(_is_there, web, f"/outcomes/{command_id}"))


def test_nobody_is_believed_about_other_hosts(web: Served, note: str) -> None:
    answer = web.write(
        note, Prefer="respond-async", X_Forwarded_Host="evil", X_Forwarded_Prefix="/evil"
    )
    assert answer.headers["location"].startswith("/outcomes/")


# --- Ends --------------------------------------------------------------------------


def test_a_stop_ends_streams_and_finishes_what_was_begun(tmp_path: Path) -> None:
    with served(CQRS_ES_STORE_URL=f"sqlite:///{tmp_path}/web.db") as gateway:
        stream = Stream(gateway)
        with ThreadPoolExecutor(1) as pool:
            sleeping = pool.submit(gateway.post, "/aggregates/note/A/Sleep", {"seconds": 1})
            gateway.write("B")
            stream.take(1)
            gateway.process.signal(signal.SIGTERM)
            assert sleeping.result().status == 200
        list(stream)
        stream.close()
        assert gateway.process.end().code == 0


def test_without_authorize_only_this_machine_is_served(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bank.db"
    result = cqrs_es("serve", "--host", "0.0.0.0", CQRS_ES_STORE_URL=url)  # noqa: S104
    assert result.code == 2
    assert "authorize" in result.complaint


def test_by_the_queue_a_worker_decides(redis_url: str, tmp_path: Path) -> None:
    """Each partition keeps its one worker; without one, 202 until there is."""
    settings = {
        "CQRS_ES_STORE_URL": f"sqlite:///{tmp_path}/web.db",
        "CQRS_ES_BROKER_URL": redis_url,
        "CQRS_ES_APP": "tests.apps.web:app",
    }
    with served(app="tests.apps.web:queued", **settings) as gateway:
        waiting = gateway.write("A", Prefer="wait=1", Idempotency_Key="one")
        assert waiting.status == 202
        with running("worker", **settings):
            until(partial(_is_there, gateway, waiting.headers["location"]))
            # Its own reply may still be under way.
            until(lambda: gateway.write("A", Idempotency_Key="one").json["duplicate"])
            assert gateway.write("A", If_Match='"1"').headers["etag"] == '"2"'
            assert gateway.write("A", If_Match='"1"').status == 412


def test_a_hundred_streams_get_everything(web: Served, note: str) -> None:
    streams = [Stream(web, "/events?types=Written") for _ in range(100)]
    sent = [web.write(f"{note} {number}").json["command_id"] for number in range(20)]
    for stream in streams:
        assert [each.data["commandid"] for each in stream.take(20)] == sent
        stream.close()
