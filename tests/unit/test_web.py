"""The web server for probes, asked over real sockets by well- and ill-behaved clients."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest
import structlog

from cqrs_es import errors
from cqrs_es.runtime import web
from cqrs_es.runtime.web import Answer, WebServer, json_answer
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

HOST = "127.0.0.1"
BIG = 20_000_000
LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


def live(_accept: str) -> Answer:
    return json_answer(HTTPStatus.OK, {"live": True})


def broken(_accept: str) -> Answer:
    raise ZeroDivisionError


def accepted(accept: str) -> Answer:
    return Answer(HTTPStatus.OK, accept.encode(), "text/plain")


def big(_accept: str) -> Answer:
    return Answer(HTTPStatus.OK, b"x" * BIG)


@asynccontextmanager
async def listening() -> AsyncGenerator[tuple[WebServer, int]]:
    pages = {"/live": live, "/broken": broken, "/accept": accepted, "/big": big}
    server = WebServer(pages)
    port = await server.start(HOST, 0)
    try:
        yield server, port
    finally:
        await server.close()


@asynccontextmanager
async def serving() -> AsyncGenerator[int]:
    async with listening() as (_, port):
        yield port


async def ask(port: int, request: bytes) -> bytes:
    """Send bytes and return all that comes back."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_a_page() -> None:
    """Status, length and body; the connection is closed after it."""
    async with serving() as port:
        head, body = (await ask(port, LIVE)).split(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert {b"Content-Length: 14", b"Connection: close", b"Cache-Control: no-store"} < set(lines)
    assert body == b'{"live":true}\n'


async def test_head_has_no_body() -> None:
    """Otherwise it is as GET: the length is that of the body it would have had."""
    async with serving() as port:
        head, body = (await ask(port, LIVE.replace(b"GET", b"HEAD"))).split(b"\r\n\r\n")
    assert b"Content-Length: 14" in head
    assert body == b""


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /live HTTP/1.0", b"200 OK"),
        (b"GET /live?verbose=1 HTTP/1.1", b"200 OK"),
        (b"GET /nothing HTTP/1.1", b"404 Not Found"),
        (b"GET /live/../etc HTTP/1.1", b"404 Not Found"),
        (b"POST /live HTTP/1.1", b"405 Method Not Allowed"),
        (b"BREW /live HTTP/1.1", b"405 Method Not Allowed"),
        (b"GET /live", b"400 Bad Request"),
        (b"PRI * HTTP/2.0", b"400 Bad Request"),
        (b"\xff\xfe\x00", b"400 Bad Request"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1", b"431 Request Header Fields Too Large"),
    ],
)
async def test_requests_good_and_bad(request_line: bytes, status: bytes) -> None:
    """Each gets an answer, and the next request is served all the same."""
    async with serving() as port:
        answer = await ask(port, request_line + b"\r\n\r\n")
        assert answer.split(b"\r\n")[0] == b"HTTP/1.1 " + status
        assert b"200 OK" in await ask(port, LIVE)


async def test_accept_is_handed_on() -> None:
    """Whatever its case, from all its lines."""
    request = b"GET /accept HTTP/1.1\r\naccept: a/b\r\nACCEPT: c/d\r\n\r\n"
    async with serving() as port:
        assert (await ask(port, request)).endswith(b"\r\n\r\na/b,c/d")


async def test_a_page_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """Its connection is dropped, the error is logged, and other pages go on."""
    structlog.reset_defaults()  # an earlier test may have sent logs elsewhere
    async with serving() as port:
        assert await ask(port, b"GET /broken HTTP/1.1\r\n\r\n") == b""
        assert b"200 OK" in await ask(port, LIVE)
    assert "ZeroDivisionError" in "".join(capsys.readouterr())


async def test_idle_connections_keep_no_probe_out() -> None:
    """Many more than the limit, all of which send nothing."""
    async with serving() as port:
        idle = [await asyncio.open_connection(HOST, port) for _ in range(300)]
        assert b"200 OK" in await ask(port, LIVE)
        dropped = [reader for reader, _ in idle if reader.at_eof()]
        assert len(dropped) >= 300 - web.MOST_CONNECTIONS
        for _, writer in idle:
            writer.close()


async def test_who_dawdles_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not end, and an answer that nobody reads."""
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.1)
    async with listening() as (server, port):
        assert await ask(port, b"GET /live HTTP/1.1\r\n") == b""
        reader, writer = await asyncio.open_connection(HOST, port, limit=1024)
        writer.write(b"GET /big HTTP/1.1\r\n\r\n")
        assert b"200 OK" in await ask(port, LIVE)

        async def dropped() -> bool:
            return not server.open

        await eventually(dropped)
        assert len(await reader.read()) < BIG
        writer.close()


async def test_closing_ends_what_is_open() -> None:
    """Closing waits for nobody."""
    async with serving() as port:
        reader, writer = await asyncio.open_connection(HOST, port)
        assert b"200 OK" in await ask(port, LIVE)
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_a_port_in_use() -> None:
    """A sentence with the port and a remedy."""
    async with serving() as port:
        with pytest.raises(errors.ConfigurationError, match=rf"{HOST}:{port} .*choose another"):
            await WebServer({}).start(HOST, port)


async def test_an_address_that_is_not_ours() -> None:
    """The same."""
    with pytest.raises(errors.ConfigurationError, match=r"192\.0\.2\.1:0 can't be listened on"):
        await WebServer({}).start("192.0.2.1", 0)
