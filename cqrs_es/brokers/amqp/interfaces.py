"""What this adapter uses of kombu's pyamqp, which has no types: channels and connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import socket


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
