"""A gateway as a process, and asking it: by http.client, and by raw bytes."""

from __future__ import annotations

import http.client
import re
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import orjson

from tests.command_line import Running, running

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from cqrs_es.http import Gateway

SECONDS = 60.0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; of `headers` names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        """The code of a problem; its status is that of the answer."""
        assert self.headers["content-type"] == "application/problem+json", self
        assert self.json["status"] == self.status
        problem: str = self.json["type"]
        before, _, code = problem.rpartition("/problems/")
        assert before == ""
        return code


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request to a port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    fields = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, fields, content)


@dataclass(frozen=True, slots=True)
class Served:
    """A gateway that runs."""

    process: Running
    port: int

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request."""
        return ask(self.port, method, path, body, headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=_named(headers))

    def post(self, path: str, payload: object, **headers: str) -> Answer:
        return self.ask("POST", path, orjson.dumps(payload), JSON | _named(headers))

    def write(self, note: str, text: str = "text", **headers: str) -> Answer:
        """Have something written in a note."""
        return self.post(
            f"/aggregates/note/{quote(note, safe='')}/Write", {"text": text}, **headers
        )

    @contextmanager
    def connected(self) -> Generator[socket.socket]:
        """Lend a connection for raw bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as connection:
            yield connection

    def raw(self, request: bytes) -> bytes:
        """Send raw bytes; return everything until the server ends the connection."""
        with self.connected() as connection:
            connection.sendall(request)
            return read_all(connection)


async def ask_within(
    gateway: Gateway,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, bytes] | None = None,
) -> Answer:
    """Ask a gateway of this process, as a server would."""
    where, _, query = path.partition("?")
    named = {"Content-Type": b"application/json", "Prefer": f"wait={SECONDS:.0f}".encode()}
    scope = {
        "type": "http",
        "method": method,
        "headers": [
            (name.lower().encode(), value) for name, value in {**named, **(headers or {})}.items()
        ],
        "path": unquote(where),
        "raw_path": where.encode(),
        "query_string": query.encode(),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await gateway(scope, receive, send)
    fields = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], fields, b"".join(each.get("body", b"") for each in sent[1:]))


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side ends the connection."""
    found = bytearray()
    try:
        while chunk := connection.recv(65_536):
            found += chunk
    except ConnectionResetError:
        pass
    return bytes(found)


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    """Return `If_Match` as `If-Match`."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True)
class Sent:
    """A server-sent event."""

    event: str
    id: str
    data: Any


class Stream:
    """A stream of events that is read as a browser does."""

    def __init__(self, served: Served, path: str = "/events", last: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
        self.connection.request("GET", path, headers={"Last-Event-ID": last} if last else {})
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.getheader("Content-Type", "").startswith("text/event-stream")
        self.last = last or ""

    def __iter__(self) -> Iterator[Sent]:
        """Read events until the server ends the stream."""
        event, data = "message", ""
        while line := self.response.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                data = value
            elif name == "id":
                self.last = value
            elif not line.strip():
                if data:
                    yield Sent(event, self.last, orjson.loads(data))
                event, data = "message", ""

    def take(self, count: int) -> list[Sent]:
        """Read so many events."""
        source = iter(self)
        return [next(source) for _ in range(count)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@contextmanager
def served(
    *arguments: str, app: str = "tests.apps.web:gateway", **settings: str
) -> Generator[Served]:
    """Run a gateway on a port of its own."""
    settings = {"CQRS_ES_LOG_FORMAT": "json", **settings}
    with running("serve", "--port", "0", "--gateway", app, *arguments, **settings) as process:
        process.wait_for('"event":"serving"')
        found = re.search(r'"event":"serving".*"port":(\d+)', process.err)
        assert found is not None
        yield Served(process, int(found[1]))
