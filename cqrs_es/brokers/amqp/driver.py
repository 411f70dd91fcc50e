"""kombu's pyamqp connection, changed so that one bad message or channel does not end it."""

# kombu and amqp have no types; the rest of the adapter sees `interfaces` instead.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

from amqp import spec
from amqp.exceptions import ChannelError, RecoverableConnectionError, error_for_code
from kombu.transport import pyamqp

from cqrs_es.brokers.amqp.frames import (
    HEADER,
    FrameReader,
    acknowledgements,
    with_readable_routing_key,
    without_properties,
)

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.address import Address
    from cqrs_es.brokers.amqp.interfaces import Connection

CONNECT_SECONDS: Final = 5.0
# After half of it without traffic we send a heartbeat; after twice of it without any
# from the server the connection ends. A server gives a silent client up after three times of it
# (measured), and with it the partitions of a machine that was switched off.
HEARTBEAT_SECONDS: Final = 5
ANSWER_SECONDS: Final = 10.0  # for each frame that an answer consists of
WRITE_SECONDS: Final = 10.0
# How long what was sent may stay unacknowledged by the peer's kernel; py-amqp's
# own second is less than a network may take to recover.
UNACKNOWLEDGED_MS: Final = 10_000


class _Channel(pyamqp.Channel):
    """A channel that stays closed when the server closes it, and says why.

    py-amqp would open it again, silently and without its consumers, and raise
    the error in whatever happens to be waiting on the connection.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.auto_decode = False  # a body is bytes, whatever its sender says
        self.closed_by: Exception | None = None
        self.on_closed: Callable[[Exception], None] | None = None

    def send_method(self, *args: Any, **options: Any) -> Any:
        """Send, and wait where asked to; raises the `ChannelError` that closed the channel."""
        with self._saying_why():
            return super().send_method(*args, **options)

    def wait(self, *args: Any, **options: Any) -> Any:
        """Wait for an answer; raises as `send_method` does. Some methods call it by themselves."""
        with self._saying_why():
            return super().wait(*args, **options)

    @contextmanager
    def _saying_why(self) -> Generator[None]:
        try:
            yield
        except RecoverableConnectionError:
            if self.closed_by is None:
                raise
            raise self.closed_by from None

    def acknowledge(self, tags: Sequence[tuple[int, bool]]) -> None:
        """Settle deliveries, each alone or with all before it, by one write."""
        connection: Any = self.connection
        connection.transport.write(acknowledgements(cast("int", self.channel_id), tags))

    def dispatch_method(self, method_sig: Any, payload: Any, content: Any) -> None:
        """Handle what arrived; no warning of a delivery that arrives while the channel closes."""
        if self.is_closing and method_sig not in self._ALLOWED_METHODS_WHEN_CLOSING:
            return
        super().dispatch_method(method_sig, payload, content)

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.send_method(spec.Channel.CloseOk)
        method = (class_id, method_id)
        self.closed_by = error = error_for_code(reply_code, reply_text, method, ChannelError)
        self.collect()
        if self.on_closed is not None:
            self.on_closed(error)


class _Connection(pyamqp.Connection):
    """A connection that reads whole frames, and that no message can end."""

    Channel = _Channel
    _frames: FrameReader | None = None

    @property
    def has_frame(self) -> bool:
        """Whether there is something to handle that the socket does not show."""
        return self._reader().has_frame

    def blocking_read(self, timeout: float | None = None) -> Any:
        """Handle one frame; return whether it completed something."""
        seconds = ANSWER_SECONDS if timeout is None else timeout
        frame = with_readable_routing_key(self._reader().read(seconds))
        handle: Any = self.on_inbound_frame
        try:
            return handle(frame)
        except Exception:
            # Whatever decoding a sender's headers may raise: text that is no
            # UTF-8, unknown types, impossible times, tables too deep.
            if frame[0] != HEADER:
                raise
            return handle(without_properties(frame))

    def _reader(self) -> FrameReader:
        """Return the reader, which the handshake already uses."""
        if self._frames is None:
            self._frames = FrameReader(self.sock)
        return self._frames


def connect(address: Address, name: str) -> Connection:
    """Connect and log in, within deadlines; raises the driver's errors."""
    options: Any = address.tls_options or False  # declared bool, but options are taken too
    connection = _Connection(
        host=address.host_and_port,
        virtual_host=address.virtual_host,
        userid=address.user,
        password=address.password,
        login_method="PLAIN",
        ssl=options,
        connect_timeout=CONNECT_SECONDS,
        heartbeat=HEARTBEAT_SECONDS,
        socket_settings=_socket_settings(),
        client_properties={"connection_name": name},
    )
    try:
        connection.connect()
        connection.sock.settimeout(WRITE_SECONDS)
    except BaseException:
        connection.collect()
        raise
    return cast("Connection", connection)


def _socket_settings() -> dict[int, int]:
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    return {} if option is None else {option: UNACKNOWLEDGED_MS}
