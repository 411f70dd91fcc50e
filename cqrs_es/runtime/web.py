"""A small web server for probes: GET and HEAD, one request for each connection.

It runs on the event loop of the work, so it does not answer when that is blocked,
which is what a liveness probe is to find out. Everything is bounded: the bytes
and the seconds of a request, and how many are open at a time; where they are
too many, the oldest goes, so that idle connections keep no probe out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, TypeAlias

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.telemetry.lines import get_logger

log = get_logger("cqrs_es.runtime")

MOST_REQUEST_BYTES: Final = 8 * 1024
MOST_CONNECTIONS: Final = 256
# From the connection's first byte to the last of the answer.
REQUEST_SECONDS: Final = 5.0


class Answer(msgspec.Struct, frozen=True):
    """What is sent back."""

    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] | None = None


Page: TypeAlias = Callable[[str], Answer]
"""Makes the answer for a path, given the request's Accept header."""


def json_answer(status: HTTPStatus, content: object) -> Answer:
    """Make an answer of JSON."""
    return Answer(status, orjson.dumps(content) + b"\n")


class WebServer:
    """Serves pages by their paths until it is closed."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], None] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which the system chooses for 0.

        Raises `ConfigurationError` where that can't be done.
        """
        try:
            self._server = await asyncio.start_server(
                self._connected, host, port, limit=MOST_REQUEST_BYTES
            )
        except OSError as exc:
            raise errors.ConfigurationError(
                f"--health-port {host}:{port} can't be listened on ({exc.strerror or exc}); "
                "choose another, or end what uses it"
            ) from exc
        listening: int = self._server.sockets[0].getsockname()[1]
        return listening

    async def close(self) -> None:
        """Listen no more and drop what is open."""
        if self._server is None:
            return
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._open)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            next(iter(self._open)).cancel()
        task = asyncio.create_task(self._serve(reader, writer))
        self._open[task] = None
        task.add_done_callback(self._open.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request; a connection that breaks or is too slow is dropped."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._answer_one(reader, writer)
        except (OSError, TimeoutError):
            pass
        except Exception:
            log.exception("probe not answered")
        finally:
            writer.transport.abort()  # no more than is sent already would come

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            writer.write(_encode(_plain(status), with_body=True))
        else:
            writer.write(self._answer(head))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        line, *fields = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 - method, target, version
            return _encode(_plain(HTTPStatus.BAD_REQUEST), with_body=True)
        method, target, _ = words
        answer = self._page(method, target.partition("?")[0], _accept(fields))
        return _encode(answer, with_body=method != "HEAD")

    def _page(self, method: str, path: str, accept: str) -> Answer:
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(self._pages)
            return _plain(HTTPStatus.NOT_FOUND, f"there are {known}")
        if method not in {"GET", "HEAD"}:
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, headers={"Allow": "GET, HEAD"})
        return page(accept)


def _accept(fields: list[str]) -> str:
    pairs = (field.partition(":") for field in fields)
    return ",".join(value.strip() for name, _, value in pairs if name.lower() == "accept")


def _plain(status: HTTPStatus, more: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    text = f"{status.phrase}: {more}\n" if more else f"{status.phrase}\n"
    return Answer(status, text.encode(), "text/plain; charset=utf-8", headers)


def _encode(answer: Answer, *, with_body: bool) -> bytes:
    fields = {
        "Date": formatdate(usegmt=True),
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "Connection": "close",
        **(answer.headers or {}),
    }
    lines = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head + answer.body if with_body else head
