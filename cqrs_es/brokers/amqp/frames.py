"""Reading AMQP frames from a socket, fast, and without ever waiting longer than asked.

py-amqp's own reading makes nine system calls for a message, and spins when a
non-blocking read ends in the middle of a frame. This one takes what the socket
has at once and keeps what is not a whole frame yet.
"""

from __future__ import annotations

import select
import ssl
import struct
import time
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

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
            message = "what the server sent is not AMQP"
            raise ConnectionError(message)
        self._at = end + 1
        return kind, channel, self._data[begin:end]

    def _receive(self, seconds: float) -> None:
        if not self._decrypted() and not self._poll.poll(seconds * 1000):
            raise TimeoutError
        received = self._socket.recv(RECEIVE_BYTES)
        if not received:
            message = "the server closed the connection"
            raise ConnectionResetError(message)
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
