"""Every row of the tables of docs/contract.md about HTTP, asked for with the program curl."""

from __future__ import annotations

import re
import subprocess
import uuid
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.command_line import running
from tests.gateways import Answer, served
from tests.servers import free_port, installed
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.gateways import Served

UUID = str(uuid.uuid4())
TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a gateway, and beside it what keeps the views."""
    settings = {
        "CQRS_ES_STORE_URL": f"sqlite:///{tmp_path_factory.mktemp('web')}/web.db",
        "CQRS_ES_APP": "tests.apps.web:app",
    }
    with served(**settings) as gateway, running("run", **settings):
        yield gateway


def curl(port: int, path: str, *arguments: str) -> Answer:
    """Run curl; return what it got, also where it was to end before the answer did."""
    command = [installed("curl"), "--silent", "--include", "--max-time", "60", "--path-as-is"]
    command += [*arguments, f"http://127.0.0.1:{port}{path}"]
    head, _, body = subprocess.run(
        command, stdout=subprocess.PIPE, timeout=90, check=False
    ).stdout.partition(b"\r\n\r\n")
    first, *lines = head.decode().splitlines()
    fields = (line.partition(": ") for line in lines)
    headers = {name.lower(): value for name, _, value in fields}
    return Answer(int(first.split()[1]), headers, body)


def write(web: Served, note: str, text: str, *headers: str) -> Answer:
    more = [part for header in headers for part in ("--header", header)]
    return curl(
        web.port, f"/aggregates/note/{note}/Write", "--json", f'{{"text": "{text}"}}', *more
    )


# --- Routes ------------------------------------------------------------------


def test_a_command_and_its_outcome(web: Served) -> None:
    """200 with the outcome and its ETag; the outcome by its id."""
    done = write(web, "c-1", "hello")
    assert (done.status, done.headers["etag"], done.json["status"]) == (200, '"1"', "accepted")
    assert curl(web.port, f"/outcomes/{done.json['command_id']}").json == done.json


@pytest.mark.parametrize("preference", ["respond-async", "wait=1"])
def test_a_command_that_is_not_waited_for(web: Served, preference: str) -> None:
    """202 and where the outcome will be: 404 with Retry-After while there is none."""
    sleep = ("--json", '{"seconds": 3}', "--header", f"Prefer: {preference}")
    sent = curl(web.port, f"/aggregates/note/{preference}/Sleep", *sleep)
    where = sent.headers["location"]
    assert (sent.status, re.fullmatch("/outcomes/[-0-9a-f]{36}", where)) != (202, None)
    early = curl(web.port, where)
    assert (early.status, early.headers["retry-after"]) == (404, "1")
    until(lambda: curl(web.port, where).status == 200)


def test_rows_of_views(web: Served) -> None:
    """One with its ETag, 304, 404; pages; what was written a moment ago."""
    places = [write(web, f"v-{number}", "hello").json for number in range(3)]
    seen = f"seen={places[-1]['partition']}:{places[-1]['offset']}"
    one = curl(web.port, f"/views/notes/v-2?{seen}", "--header", "Prefer: wait=60")
    assert (one.status, one.json, one.headers["etag"]) == (200, {"last": "hello"}, '"1"')
    assert curl(web.port, "/views/notes/v-2", "--header", 'If-None-Match: "1"').status == 304
    assert curl(web.port, "/views/notes/v-3").status == 404
    page = curl(web.port, f"/views/notes?after=v-&limit=2&{seen}")
    assert [row["view_id"] for row in page.json] == ["v-0", "v-1"]
    assert page.headers["link"] == '</views/notes?after=v-1&limit=2>; rel="next"'
    rest = curl(web.port, page.headers["link"].partition(">")[0][1:])
    assert rest.json[0] == {"view_id": "v-2", "version": 1, "payload": {"last": "hello"}}


@pytest.mark.parametrize("path", ["/views/notes", "/views/notes/v-0"])
def test_a_view_that_has_not_seen_it(web: Served, path: str) -> None:
    """503 view_behind; 500 view_parked."""
    behind = curl(web.port, f"{path}?seen=0:99999999", "--header", "Prefer: wait=0")
    assert (behind.status, behind.code, behind.headers["retry-after"]) == (503, "view_behind", "1")
    bad = write(web, "v-bad", "poison").json
    parked = curl(web.port, f"{path}?seen={bad['partition']}:{bad['offset']}")
    assert (parked.status, parked.code) == (500, "view_parked")


def test_the_events_of_an_aggregate(web: Served) -> None:
    """CloudEvents, in pages, with what the headers said."""
    for number in range(3):
        write(web, "e-1", str(number), "Correlation-Id: order-7", f"traceparent: {TRACE}")
    page = curl(web.port, "/aggregates/note/e-1/events?limit=2")
    assert page.headers["content-type"] == "application/cloudevents-batch+json"
    assert [event["data"]["text"] for event in page.json] == ["0", "1"]
    assert page.headers["link"] == '</aggregates/note/e-1/events?after=2&limit=2>; rel="next"'
    (last,) = curl(web.port, "/aggregates/note/e-1/events?after=2").json
    assert (last["correlationid"], last["traceparent"][:35]) == ("order-7", TRACE[:35])


def test_live_events(web: Served) -> None:
    """From the start or behind an id, some types of a partition only; another epoch says so."""
    write(web, "l-1", "first")
    path = "/events?types=Written&partition=0"
    whole = curl(web.port, f"{path}&from=start", "--max-time", "1")
    assert whole.headers["content-type"].startswith("text/event-stream")
    frames = re.findall(r"data: (\{.*\})\nid: ([-0-9a-f]+);0:(\d+)\n", whole.body.decode())
    assert [int(offset) for *_, offset in frames] == sorted({int(each[2]) for each in frames})
    epoch, last = frames[-1][1:]
    write(web, "l-1", "second")
    rest = curl(web.port, path, "--max-time", "1", "--header", f"Last-Event-ID: {epoch};0:{last}")
    assert rest.body.count(b"data: ") == 1
    assert b'"text":"second"' in rest.body
    other = f"Last-Event-ID: {uuid.UUID(int=9)};0:{last}"
    again = curl(web.port, path, "--max-time", "1", "--header", other)
    assert again.body.startswith(b'event: epoch\ndata: {"logepoch":"' + epoch.encode())
    assert again.body.count(b"data: {") > len(frames)
    future = curl(web.port, path, "--header", f"Last-Event-ID: {epoch};0:99999999")
    assert (future.status, future.code) == (400, "invalid_header")


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
def test_the_documents(web: Served, name: str) -> None:
    assert curl(web.port, f"/{name}.json").json[name].startswith("3.")


# --- Headers, and what is refused ----------------------------------------------


def test_a_key_is_done_once(web: Served) -> None:
    """A UUID is the command's id, another text gives one, none is the server's."""
    for key in (UUID, "order-17"):
        answers = [write(web, "k-1", key, f"Idempotency-Key: {key}").json for _ in range(2)]
        assert [answer["duplicate"] for answer in answers] == [False, True]
        assert (answers[0]["command_id"] == UUID) == (key == UUID)
    ids = {write(web, "k-1", "none").json["command_id"] for _ in range(2)}
    assert len(ids) == 2


WRITE, BODY = "/aggregates/note/{note}/Write", ("--json", '{"text": "x"}')
REUSED = f"Idempotency-Key: {uuid.UUID(int=8)}"
LONG_KEY = f"Idempotency-Key: {'k' * 256}"
LARGE = f'{{"text": "{"x" * 300_000}"}}'
ROWS: dict[str, tuple[int, str | None, tuple[str, ...]]] = {
    "accepted": (200, None, (WRITE, *BODY)),
    "accepted, it is at 1": (200, None, (WRITE, *BODY, "--header", 'If-Match: "1"')),
    "a rule of the domain": (409, "conflict", ("/aggregates/note/{note}/Refuse", "--json", "{}")),
    "conflict with If-Match": (412, "conflict", (WRITE, *BODY, "--header", 'If-Match: "9"')),
    "conflict with If-None-Match": (
        412,
        "conflict",
        (WRITE, *BODY, "--header", "If-None-Match: *"),
    ),
    "invalid_command": (422, "invalid_command", (WRITE, "--json", '{"text": 7}')),
    "id_reused": (422, "id_reused", (WRITE, *BODY, "--header", REUSED)),
    "unknown type": (404, "unknown_aggregate_type", ("/aggregates/nothing/A/Write", *BODY)),
    "unknown command": (404, "unknown_command", ("/aggregates/note/{note}/Nothing", *BODY)),
    "unknown view": (404, "unknown_view", ("/views/nothing",)),
    "unknown id": (404, "unknown_id", ("/views/notes/nothing",)),
    "unknown path": (404, "unknown_route", ("/nothing",)),
    "not JSON": (400, "invalid_json", (WRITE, "--json", "{")),
    "bad header": (400, "invalid_header", (WRITE, *BODY, "--header", "If-Match: 1")),
    "bad id": (400, "invalid_id", ("/aggregates/note/%00/Write", *BODY)),
    "bad key": (400, "invalid_key", (WRITE, *BODY, "--header", LONG_KEY)),
    "too large": (413, "too_large", (WRITE, "--json", LARGE)),
    "content type": (415, "unsupported_media_type", (WRITE, "--data", "text=x")),
    "other method": (405, "method_not_allowed", (WRITE, "--request", "PUT")),
    "failed": (500, "internal_error", ("/aggregates/note/{note}/Crash", "--json", "{}")),
    "not allowed": (403, "denied", (WRITE, *BODY, "--header", "X-User: mallory")),
    "who are you": (401, "unknown", (WRITE, *BODY, "--header", "X-User: nobody")),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_status_says_what_became_of_it(web: Served, name: str, tmp_path: Path) -> None:
    """Problems have a code, and the outcome where there is one."""
    status, code, (path, *arguments) = ROWS[name]
    note = str(uuid.uuid4())
    write(web, note, "there is one")
    if REUSED in arguments:
        write(web, note, "another content", REUSED)
    if LARGE in arguments:  # it is no argument of a program's
        (tmp_path / "body").write_text(LARGE)
        arguments[-1] = f"@{tmp_path}/body"
    answer = curl(web.port, path.replace("{note}", note), *arguments)
    assert answer.status == status
    if code is not None:
        assert answer.code == code
        decided = {"conflict", "invalid_command", "id_reused", "internal_error"}
        assert ("outcome" in answer.json) == (code in decided)


def test_a_store_that_is_away_is_503() -> None:
    """With Retry-After: the gateway listens before it has found its store."""
    port = free_port()
    store = f"mysql://root@127.0.0.1:{free_port()}/web"
    serve = ("serve", "--port", str(port), "--gateway", "tests.apps.web:gateway")
    with running(*serve, CQRS_ES_STORE_URL=store):
        until(partial(_listens, port))
        away = curl(port, "/views/notes")
        assert (away.status, away.code, away.headers["retry-after"]) == (503, "not_open", "1")


def _listens(port: int) -> bool:
    asking = [installed("curl"), "--silent", f"http://127.0.0.1:{port}/"]
    return subprocess.run(asking, check=False, timeout=60).returncode == 0
