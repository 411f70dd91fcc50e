"""The gateway when things go wrong: deaths, a store that is away, clients that lie or dawdle."""

from __future__ import annotations

import http.client
import signal
import socket
import statistics
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.command_line import cqrs_es
from tests.conftest import run_on
from tests.gateways import Answer, Stream, read_all, served
from tests.processes import memory_of
from tests.servers import launch, start_mariadb
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from tests.gateways import Served

WEB = "tests.apps.web:app"
POST = b"POST /aggregates/note/%s/Write HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    url = f"sqlite:///{tmp_path_factory.mktemp('hasty')}/web.db"
    with served(app="tests.apps.hasty:gateway", CQRS_ES_STORE_URL=url, TEST_HASTY="1") as gateway:
        yield gateway


def head(note: str) -> bytes:
    return POST % note.encode()


def is_written(web: Served, note: str) -> bool:
    return web.get(f"/aggregates/note/{note}/events").status == 200


# --- Deaths ------------------------------------------------------------------------


def test_a_kill_between_commit_and_answer_is_made_good_by_the_same_key(tmp_path: Path) -> None:
    """It is the client's to repeat it: the next gateway answers what was decided, once."""
    settings = {"CQRS_ES_STORE_URL": f"sqlite:///{tmp_path}/web.db"}
    with served(app="tests.apps.hasty:dying", **settings) as gateway:
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            gateway.write("A", Idempotency_Key="order-17")
        assert gateway.process.end().code == -9
    with served(**settings) as gateway:
        assert is_written(gateway, "A")
        again = gateway.write("A", Idempotency_Key="order-17")
        assert (again.status, again.headers["etag"]) == (200, '"1"')
        assert (again.json["status"], again.json["duplicate"]) == ("accepted", True)
        assert len(gateway.get("/aggregates/note/A/events").json) == 1
        other = gateway.write("A", "other text", Idempotency_Key="order-17")
        assert (other.status, other.code) == (422, "id_reused")


def test_a_store_that_is_away_is_503_until_it_is_back(tmp_path: Path) -> None:
    """Of every route that asks it, with Retry-After; a stream goes on where it was."""
    server = start_mariadb(tmp_path)
    place = f"mysql://root@127.0.0.1:{server.port}/"
    run_on(place, "CREATE DATABASE web")
    url = urlunsplit(urlsplit(place)._replace(path="/web"))
    settings = {"CQRS_ES_STORE_URL": url, "CQRS_ES_APP": WEB}
    try:
        assert cqrs_es("init", CQRS_ES_STORE_URL=url, CQRS_ES_APP=WEB).code == 0
        with served(**settings) as gateway:
            first = gateway.write("A", Idempotency_Key="first").json
            stream = Stream(gateway, "/events?from=start")
            stream.take(1)
            server.kill()
            for answer in (
                gateway.write("A", Prefer="wait=3", Idempotency_Key="second"),
                gateway.get(f"/outcomes/{first['command_id']}"),
                gateway.get("/views/notes"),
                gateway.get("/aggregates/note/A/events"),
            ):
                is_away(answer)
            assert gateway.get("/openapi.json").status == 200
            server = launch(server.command, server.port, tmp_path / "again.log", user=server.user)
            until(lambda: gateway.write("A", Idempotency_Key="second").status == 200)
            (second,) = stream.take(1)
            assert second.data["aggregatesequence"] == "2"
            stream.close()
    finally:
        server.stop()


def is_away(answer: Answer) -> None:
    assert answer.status == 503, answer
    assert answer.code
    assert int(answer.headers["retry-after"]) >= 1


# --- Clients that dawdle --------------------------------------------------------------


def test_a_head_that_does_not_come_ends_the_connection(hasty: Served) -> None:
    """Byte by byte it is no faster: the time is that of the whole head."""
    with hasty.connected() as connection:
        began = time.monotonic()
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        assert read_all(connection) == b""
        assert time.monotonic() - began >= 0.9


def test_a_body_that_does_not_come_is_408(hasty: Served) -> None:
    """A second passes, and the command is not there."""
    with hasty.connected() as connection:
        connection.sendall(head("slow") + b'Content-Length: 16\r\n\r\n{"text": ')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"/problems/timeout" in answer
    described = hasty.get("/openapi.json").json["paths"]["/aggregates/note/{id}/Write"]
    assert "408" in described["post"]["responses"]
    assert not is_written(hasty, "slow")


DAWDLERS: Mapping[str, Sequence[bytes]] = {
    "nothing": [],
    "half a request line": [b"GET /vie"],
    "half a head": [b"GET / HTTP/1.1\r\nHost: x\r\n"],
    "a head, byte by byte": [b"GET / HTTP/1.1\r\nX: ", *[b"x"] * 1000],
    "half a body": [head("half") + b'Content-Length: 16\r\n\r\n{"text": '],
    "a body, byte by byte": [head("slow") + b"Content-Length: 9999\r\n\r\n", *[b" "] * 1000],
    "a body that nobody reads, byte by byte": [
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n",
        *[b" "] * 1000,
    ],
    "a request whose answer is not read": [
        b"GET /aggregates/note/A/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    ],
    "requests whose answers are not read": [
        b"GET /aggregates/note/A/events HTTP/1.1\r\nHost: x\r\n\r\n" * 9
    ],
    "a stream that is not read": [b"GET /events?from=start HTTP/1.1\r\nHost: x\r\n\r\n"],
}


class Dawdler:
    """A client that sends what it has a piece at a time, and reads nothing."""

    def __init__(self, served: Served, kind: str) -> None:
        self.kind = kind
        self._pieces = iter(DAWDLERS[kind])
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.connect(("127.0.0.1", served.port))
        self.port: int = self.connection.getsockname()[1]

    def go_on(self) -> None:
        """Send the next piece, if there is one and anybody who takes it."""
        with suppress(OSError):
            self.connection.sendall(next(self._pieces, b""))


def connected_to(served: Served) -> set[int]:
    """Return the ports of clients whose connections a gateway holds."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = f":{served.port:04X}"
    return {int(row[2][-4:], 16) for row in rows if row[1].endswith(here) and row[9] != "0"} - {0}


@contextmanager
def dawdling(gateway: Served) -> Generator[list[Dawdler]]:
    """Connect five of each kind."""
    with ExitStack() as stack:
        all_ = [Dawdler(gateway, kind) for kind in DAWDLERS for _ in range(5)]
        for each in all_:
            stack.enter_context(each.connection)
            each.go_on()
        yield all_


def test_clients_that_dawdle_keep_nobody_waiting(tmp_path: Path) -> None:
    """Each is hung up on in its time, and costs little; the others, and a stop, wait for none."""
    settings = {"CQRS_ES_STORE_URL": f"sqlite:///{tmp_path}/web.db", "TEST_HASTY": "1"}
    with served(app="tests.apps.hasty:gateway", **settings) as gateway:
        took: list[float] = []

        def ask() -> None:
            began = time.monotonic()
            assert gateway.write("A", "x" * 200_000).status == 200
            took.append(time.monotonic() - began)

        for _ in range(20):
            ask()
        memory = memory_of(gateway.process.process, "VmRSS")
        took.clear()
        with dawdling(gateway) as clients:

            def left() -> set[str]:
                ports = connected_to(gateway)
                return {each.kind for each in clients if each.port in ports}

            def are_gone() -> bool:
                ask()
                for each in clients:
                    each.go_on()
                return not left()

            ask()
            assert left() == set(DAWDLERS)
            with suppress(AssertionError):
                until(are_gone, within_seconds=20)
            assert left() == set()
        assert statistics.median(took) < 0.5
        assert memory_of(gateway.process.process, "VmHWM") - memory < 192 * 1024  # KiB
        with dawdling(gateway):
            began = time.monotonic()
            gateway.process.signal(signal.SIGTERM)
            assert gateway.process.end().code == 0
            assert time.monotonic() - began < 10


# --- Clients that lie ------------------------------------------------------------------


def test_a_body_shorter_than_it_was_said_to_be_is_not_taken(hasty: Served) -> None:
    """Were it whole as JSON: who hangs up before the end may have meant more."""
    with hasty.connected() as connection:
        connection.sendall(head("short") + b'Content-Length: 99\r\n\r\n{"text": "x"}')
    with hasty.connected() as connection:  # whose turn comes after that
        connection.sendall(head("after") + b"Content-Length: 13\r\nConnection: close\r\n\r\n")
        connection.sendall(b'{"text": "x"}')
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    assert not is_written(hasty, "short")


def test_a_body_longer_than_it_was_said_to_be_is_cut_and_no_request(hasty: Served) -> None:
    """What comes beyond its end is the next request, and none."""
    answer = hasty.raw(
        head("long") + b'Content-Length: 13\r\n\r\n{"text": "x"}, "more": 1}\r\n\r\n'
    )
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 " in answer


@pytest.mark.parametrize(
    "lengths",
    [
        b"Content-Length: 13\r\nContent-Length: 14\r\n",
        b"Content-Length: 13, 14\r\n",
        b"Content-Length: +13\r\n",
        b"Content-Length: 0x0d\r\n",
        b"Content-Length: 99999999999999999999999999\r\n",
    ],
)
def test_a_length_that_can_not_be_is_refused(hasty: Served, lengths: bytes) -> None:
    """As no request, or as too large; nothing is done."""
    answer = hasty.raw(head("bad") + lengths + b'\r\n{"text": "x"}')
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), answer
    assert not is_written(hasty, "bad")


def test_a_length_beside_chunks_smuggles_nothing(hasty: Served) -> None:
    """What a proxy before it may have taken for a body is no second command."""
    hidden = head("hidden") + b'Content-Length: 13\r\n\r\n{"text": "x"}'
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = hasty.raw(head("outer") + both + hidden)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert not is_written(hasty, "hidden"), answer
