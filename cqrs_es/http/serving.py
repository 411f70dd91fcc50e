"""A process that is a gateway alone, under uvicorn: from its start to its end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import h11
import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cqrs_es import errors
from cqrs_es.http.events import WRITE_SECONDS
from cqrs_es.http.requests import MOST_HEAD_BYTES, is_local
from cqrs_es.program import DONE, FAILED, version
from cqrs_es.runtime.health import Probes, probed
from cqrs_es.runtime.stopping import run_until_stopped, stop_on_signals, watched
from cqrs_es.runtime.supervisor import Supervisor
from cqrs_es.runtime.waiting import cancelled, unless
from cqrs_es.service import open_patiently, run_to_end
from cqrs_es.settings import masked
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Generator

    from cqrs_es.http.gateway import Gateway
    from cqrs_es.opened import OpenApplication
    from cqrs_es.runtime.stopping import Stopping
    from cqrs_es.settings import Settings

log = get_logger("cqrs_es.http")

# From the first byte of a request to the end of its headers.
HEAD_SECONDS: Final = 10.0


def run(gateway: Gateway, settings: Settings, host: str, port: int) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code."""
    return run_to_end(serve(gateway, settings, host, port))


async def serve(gateway: Gateway, settings: Settings, host: str, port: int) -> int:
    """Listen at once, open the application as soon as its servers are there, and serve it.

    Told to stop it takes no more connections, ends the streams, finishes what was begun.
    Raises `ConfigurationError` where it must not listen, or can't.
    """
    listening = _listen(gateway, host, port)
    app = gateway.app
    service = settings.service or app.service
    with listening, stop_on_signals() as stopping:
        probes = Probes(app.registry, settings, service, (), stopping.asked)
        async with probed(probes, settings.health_address):
            work = _serve(gateway, settings, listening, probes, stopping)
            clean = await run_until_stopped(work, stopping, settings.shutdown_timeout)
    log.info("ended", reason="asked to stop", exit_code=DONE if clean else FAILED)
    return DONE if clean else FAILED


def _listen(gateway: Gateway, host: str, port: int) -> socket.socket:
    if not gateway.guarded and not (host == "localhost" or _is_loopback(host)):
        message = (
            f"without authorize the gateway would serve everybody at {host}: give it "
            "Gateway(…, authorize=…), say --public if that is meant, or listen on 127.0.0.1"
        )
        raise errors.ConfigurationError(message)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as exc:
        message = f"{host}:{port} can't be listened on ({exc.strerror or exc}); choose another"
        raise errors.ConfigurationError(message) from exc
    # Inherited by connections; asyncio does it for none of a socket that names no protocol. With
    # Nagle's algorithm an answer's body waits some 40 ms for the acknowledgement of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _is_loopback(host: str) -> bool:
    known_address = host.replace(".", "").isdigit() or ":" in host
    return known_address and is_local((host, None))


class _Server(uvicorn.Server):
    """A server that leaves the signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Take none."""
        yield


async def _serve(
    gateway: Gateway,
    settings: Settings,
    listening: socket.socket,
    probes: Probes,
    stopping: Stopping,
) -> None:
    config = uvicorn.Config(
        cast("Any", gateway),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody is trusted to say who else it was
        h11_max_incomplete_event_size=MOST_HEAD_BYTES,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    try:
        async with AsyncExitStack() as stack:
            opening = open_patiently(
                gateway.app,
                settings,
                stack,
                probes,
                reach_broker=gateway.via == "queue",
                answering=True,
            )
            opened = await unless(stopping.asked, opening)
            if opened is not None:
                await stack.enter_async_context(watched(settings.lease_seconds))
                await stack.enter_async_context(gateway.on(opened))
                await _until_asked(gateway, opened, settings, listening, probes, stopping)
                gateway.leave()
            server.should_exit = True
            await serving
    finally:
        await cancelled(serving)


async def _until_asked(
    gateway: Gateway,
    opened: OpenApplication,
    settings: Settings,
    listening: socket.socket,
    probes: Probes,
    stopping: Stopping,
) -> None:
    process = opened.process
    host, port = listening.getsockname()[:2]
    log.info(
        "serving",
        version=version(),
        app=settings.app,
        service=process.service,
        store=masked(settings.url_of_store(process.service)),
        via=gateway.via,
        host=host,
        port=port,
    )
    probing = asyncio.create_task(probes.follow(process, Supervisor(process, ())))
    try:
        await stopping.asked.wait()
    finally:
        await cancelled(probing)


class Connection(H11Protocol):
    """A connection that is dropped when its client takes too long to send, or to read."""

    _sending: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin; `abort` in a request's state drops the connection with what is not sent yet."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses while anything is left to be sent
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take note of whether a request is still to come: its head, or the rest of one answered.

        The body of a request that is being answered has a time of its own.
        """
        super().data_received(data)
        if self.conn.our_state in {h11.IDLE, h11.DONE} and not self.transport.is_closing():
            self._expect_head()
        else:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._expect_nothing()
        self._expect_no_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait until the client has read what there is for it."""
        super().pause_writing()
        if self._reading is None:
            self._expect_reading()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._expect_no_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or has too long a head."""
        problem = {
            "type": "/problems/invalid_request",
            "title": "Bad Request",
            "status": 400,
            "detail": msg,
        }
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = orjson.dumps(problem)
            headers = [
                ("Content-Type", "application/problem+json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_head(self) -> None:
        if self._sending is None:
            self._sending = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _expect_reading(self, before: int | None = None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and left >= before:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(WRITE_SECONDS, self._expect_reading, left)

    def _expect_no_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
