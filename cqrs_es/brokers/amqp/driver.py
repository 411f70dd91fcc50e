"""kombu's pyamqp: where it connects, what we use of it, what we change.

What is changed: one bad message or channel does not end a connection, and
frames are read fast, without ever waiting longer than asked.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from amqp import spec
from amqp.exceptions import ChannelError, RecoverableConnectionError, error_for_code
from kombu.transport import pyamqp

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import Iterable

# kombu and amqp have no types; the rest of the adapter sees the protocols below instead.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false


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


def bear_silence(sock: socket.socket, *, blocked: bool) -> None:
    """Let what was sent stay unacknowledged while the server reads nothing, on purpose.

    Else the kernel ends the connection, and that the server is blocked is forgotten with it.
    Its heartbeats go on, so that one that is gone is still noticed.
    """
    for option, milliseconds in _socket_settings().items():
        sock.setsockopt(socket.IPPROTO_TCP, option, 0 if blocked else milliseconds)


# --- Where: from a URL as RabbitMQ's own clients write it ------------------------

PORT: Final = 5672
TLS_PORT: Final = 5671
_TLS_FILES: Final = {"cacertfile": "ca_certs", "certfile": "certfile", "keyfile": "keyfile"}
_BAD_URL: Final = (
    "CQRS_ES_BROKER_URL is no usable RabbitMQ URL; write amqp://user:password@host:5672/vhost"
    " (amqps:// for TLS, there with ?cacertfile=, certfile= and keyfile= where needed), with"
    " special characters of the password and the vhost percent-encoded"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A virtual host of a server, and how to get in; `tls` maps names of files, None for no TLS."""

    host: str
    port: int
    virtual_host: str
    user: str
    password: str = field(repr=False)
    tls: dict[str, str] | None = None

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL; raises `SettingsError`, without the password, for one that can't be used."""
        try:
            parts = urlsplit(url)
            return cls(
                host=parts.hostname or "localhost",
                port=parts.port or (TLS_PORT if parts.scheme == "amqps" else PORT),
                virtual_host=unquote(parts.path[1:]) or "/",
                user=unquote(parts.username or "guest"),
                password=unquote(parts.password or "guest"),
                tls=_tls(parts),
            )
        except ValueError:
            raise errors.SettingsError(_BAD_URL) from None  # its text may hold the password

    @property
    def host_and_port(self) -> str:
        """Both as drivers want them: an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def tls_options(self) -> dict[str, object] | None:
        """What a TLS connection is made with: only a certificate that can be verified will do."""
        if self.tls is None:
            return None
        return {"server_hostname": self.host, "cert_reqs": ssl.CERT_REQUIRED, **self.tls}

    def __str__(self) -> str:
        """Return what may be shown: no user, no password."""
        return f"{self.host_and_port}/{'' if self.virtual_host == '/' else self.virtual_host}"


def _tls(parts: SplitResult) -> dict[str, str] | None:
    options = parse_qsl(parts.query, strict_parsing=True) if parts.query else []
    if parts.scheme == "amqps":
        return {_option(name): value for name, value in options}
    if options or parts.fragment:
        raise ValueError
    return None


def _option(name: str) -> str:
    if name not in _TLS_FILES:
        raise ValueError
    return _TLS_FILES[name]


# --- What this adapter uses of it ------------------------------------------------


class QueueDeclared(Protocol):
    """The server's answer about a queue."""

    @property
    def message_count(self) -> int:
        """How many messages wait in it, not counting those that are out."""
        ...


class IncomingMessage(Protocol):
    """A message as it was delivered, or returned."""

    body: bytes
    properties: Mapping[str, Any]
    delivery_info: Mapping[str, Any]


class Channel(Protocol):
    """A channel; every method is for the thread of its connection.

    A method that the server refuses raises `ChannelError`, and the server
    closes the channel, for good.
    """

    is_open: bool
    on_closed: Callable[[Exception], None] | None
    """Told, with the reason, when the server closes the channel."""
    events: MutableMapping[str, set[Callable[..., None]]]
    """Callbacks for `basic_ack` and `basic_nack` (tag, multiple) and `basic_return`."""

    def exchange_declare(
        self,
        exchange: str,
        type: str,  # noqa: A002 - the driver's own name
        *,
        durable: bool,
        auto_delete: bool,
        arguments: dict[str, Any],
    ) -> None:
        """Create an exchange, or check that it is as said."""

    def queue_declare(
        self,
        queue: str,
        *,
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> QueueDeclared:
        """Create a queue, or check that it is as said; with `passive`, that it exists."""
        ...

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> object:
        """Have an exchange put messages with this key into a queue."""

    def queue_purge(self, queue: str) -> object:
        """Drop the messages that wait in a queue."""

    def queue_delete(self, queue: str) -> object:
        """Drop a queue with what is in it."""

    def exchange_delete(self, exchange: str) -> object:
        """Drop an exchange."""

    def basic_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool) -> object:  # noqa: FBT001 - as the driver has it
        """Bound what is out to each consumer that is begun after this."""

    def basic_consume(
        self,
        queue: str,
        *,
        callback: Callable[[IncomingMessage], None],
        on_cancel: Callable[[str], None],
    ) -> object:
        """Have a queue's messages delivered."""

    def basic_get(self, queue: str) -> IncomingMessage | None:
        """Take a queue's first message, None where it is empty; unsettled it goes back."""

    def basic_recover(self, *, requeue: bool) -> object:
        """Put back what was taken and not settled, and wait for the answer."""

    def acknowledge(self, tags: Sequence[tuple[int, bool]]) -> None:
        """Settle deliveries by their tags, each alone or with all before it."""

    def basic_publish(
        self, msg: object, *, exchange: str, routing_key: str, mandatory: bool
    ) -> object:
        """Write a message; whether it arrived is said by its confirm."""

    def confirm_select(self) -> object:
        """Have every message confirmed from now on, numbered from 1."""

    def flow(self, active: bool) -> object:  # noqa: FBT001 - as the driver has it
        """Ask for deliveries to go on, and wait for the answer."""

    def close(self) -> object:
        """Close the channel and wait for the answer; unsettled deliveries go back in order."""


class Connection(Protocol):
    """A connection; every method is for its thread."""

    on_blocked: Callable[[str], None] | None
    on_unblocked: Callable[[], None] | None

    @property
    def sock(self) -> socket.socket:
        """The socket, to wait on."""
        ...

    @property
    def has_frame(self) -> bool:
        """Whether there is something to handle that the socket does not show."""
        ...

    def channel(self) -> Channel:
        """Open a channel."""
        ...

    def drain_events(self, timeout: float) -> None:
        """Handle one method of the server; raises `TimeoutError` when there is none."""

    def heartbeat_tick(self) -> None:
        """Send a heartbeat when one is due; raise when the server's stay out."""

    def close(self) -> object:
        """Close it, and wait for the answer."""

    def collect(self) -> None:
        """Drop the socket."""


# --- Reading frames --------------------------------------------------------------
# py-amqp's own reading makes nine system calls for a message, and spins when a
# non-blocking read ends in the middle of a frame. This one takes what the socket
# has at once and keeps what is not a whole frame yet.

Frame: TypeAlias = "tuple[int, int, bytes]"
"""Type, channel, payload."""

METHOD: Final = 1
HEADER: Final = 2

RECEIVE_BYTES: Final = 128 * 1024
_START: Final = struct.Struct(">BHI")
_END: Final = 0xCE
_ACK: Final = struct.Struct(">BHIHHQBB")
_ACK_BYTES: Final = 13
_BASIC_ACK: Final = (60, 80)
_DELIVER: Final = struct.pack(">HH", 60, 60)
_FIXED_HEADER_BYTES: Final = 12  # class, weight and body size come before the properties
_NO_PROPERTIES: Final = b"\0\0"


class FrameReader:
    """Cuts what a socket receives into frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._data = b""
        self._at = 0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @property
    def has_frame(self) -> bool:
        """Whether a frame can be had without the socket, which would not say so."""
        return self._frame_end() <= len(self._data) or self._decrypted()

    def read(self, seconds: float) -> Frame:
        """Return the next frame.

        Raises `TimeoutError` when it is not there in time, with nothing lost,
        and `ConnectionError` when the server has hung up.
        """
        deadline = time.monotonic() + seconds
        while self._frame_end() > len(self._data):
            self._receive(max(0.0, deadline - time.monotonic()))
        return self._cut()

    def _frame_end(self) -> int:
        """Return where the next frame ends, or at least begins to."""
        begin = self._at + _START.size
        if begin > len(self._data):
            return begin
        _, _, size = _START.unpack_from(self._data, self._at)
        end: int = begin + size + 1
        return end

    def _cut(self) -> Frame:
        kind, channel, size = _START.unpack_from(self._data, self._at)
        begin = self._at + _START.size
        end = begin + size
        if self._data[end] != _END:
            raise ConnectionError("what the server sent is not AMQP")
        self._at = end + 1
        return kind, channel, self._data[begin:end]

    def _receive(self, seconds: float) -> None:
        if not self._decrypted() and not self._poll.poll(seconds * 1000):
            raise TimeoutError
        received = self._socket.recv(RECEIVE_BYTES)
        if not received:
            raise ConnectionResetError("the server closed the connection")
        self._data = self._data[self._at :] + received
        self._at = 0

    def _decrypted(self) -> bool:
        """Whether TLS holds bytes in user space, of which the socket knows nothing."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0


# --- Acknowledgements: py-amqp makes a system call for each ----------------------


def acknowledgements(channel: int, tags: Iterable[tuple[int, bool]]) -> bytes:
    """Return the frames that settle deliveries, each alone or with all before it."""
    return b"".join(
        _ACK.pack(METHOD, channel, _ACK_BYTES, *_BASIC_ACK, tag, multiple, _END)
        for tag, multiple in tags
    )


# --- Bytes that any sender may choose, and py-amqp trips over ------------------


def with_readable_routing_key(frame: Frame) -> Frame:
    """Return a frame whose routing key, if it is a delivery, can be decoded as text."""
    kind, channel, payload = frame
    if kind != METHOD or not payload.startswith(_DELIVER):
        return frame
    tag_end = 5 + payload[4]
    exchange_at = tag_end + 9  # after the delivery tag and the redelivered bit
    key_at = exchange_at + 1 + payload[exchange_at] + 1
    key = payload[key_at:]
    if key.isascii():
        return frame
    return kind, channel, payload[:key_at] + bytes(byte if byte < 128 else 63 for byte in key)  # noqa: PLR2004 - ASCII, and "?"


def without_properties(frame: Frame) -> Frame:
    """Return a content header whose properties are left out: its message is still delivered."""
    kind, channel, payload = frame
    return kind, channel, payload[:_FIXED_HEADER_BYTES] + _NO_PROPERTIES
