"""The parts of the RabbitMQ broker that need no server."""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.brokers.amqp import driver, topology
from cqrs_es.brokers.amqp.consuming import acknowledgements
from cqrs_es.brokers.amqp.driver import (
    Address,
    Frame,
    FrameReader,
    with_readable_routing_key,
    without_properties,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "hunter2"  # noqa: S105 - what must not be shown


# --- Acknowledgements --------------------------------------------------------


def test_all_done_takes_one_acknowledgement() -> None:
    """However many there are."""
    assert list(acknowledgements(range(1, 501), range(1, 501))) == [(500, True)]


def test_what_is_not_done_is_not_covered() -> None:
    """Only what is done up to the first that is not goes together."""
    assert list(acknowledgements([3, 4, 5, 6, 9], [4, 3, 6])) == [(4, True), (6, False)]


@given(st.sets(st.integers(1, 60)), st.data())
def test_acknowledging_covers_exactly_what_is_done(
    unsettled: set[int], data: st.DataObject
) -> None:
    """Whatever is out and whatever is done of it, in any order."""
    done = data.draw(st.lists(st.sampled_from(sorted(unsettled)))) if unsettled else []
    left = set(unsettled)
    for tag, multiple in acknowledgements(sorted(unsettled), done):
        assert tag in left
        left -= {other for other in left if other <= tag} if multiple else {tag}
    assert left == unsettled - set(done)


def test_acknowledgements_are_what_the_protocol_asks_for() -> None:
    """A method frame for each: basic.ack, with the tag and whether it covers those before."""
    written = driver.acknowledgements(3, [(2**40 + 1, True), (7, False)])
    assert written == bytes.fromhex(
        "01 0003 0000000d 003c 0050 0000010000000001 01 ce"
        "01 0003 0000000d 003c 0050 0000000000000007 00 ce"
    )


# --- Frames ------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, FrameReader]]:
    """Lend a socket to write to, and a reader of what comes out at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, FrameReader(theirs)


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def test_frames_come_out_whole(pair: tuple[socket.socket, FrameReader]) -> None:
    """However they were cut on the way, and however many came at once."""
    writer, reader = pair
    sent = [(1, 0, b""), (3, 7, b"\xce" * 300), (8, 0, b"x" * 70_000), (1, 65_535, b"last")]
    stream = b"".join(_frame(*frame) for frame in sent)
    received: list[Frame] = []
    for at in range(0, len(stream), 1_013):
        writer.sendall(stream[at : at + 1_013])
        try:
            while True:
                received.append(reader.read(0))
        except TimeoutError:
            assert not reader.has_frame
    assert received == sent


def test_nothing_is_waited_for_longer_than_asked(pair: tuple[socket.socket, FrameReader]) -> None:
    """A peer that stops in the middle of a frame costs neither time nor what it sent."""
    writer, reader = pair
    writer.sendall(_frame(1, 2, b"payload")[:9])
    for seconds in (0.0, 0.05):
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            reader.read(seconds)
        assert seconds <= time.monotonic() - before < seconds + 1
    writer.sendall(_frame(1, 2, b"payload")[9:])
    assert reader.read(1) == (1, 2, b"payload")


def test_frames_at_hand_are_known(pair: tuple[socket.socket, FrameReader]) -> None:
    """Two came at once: after the first, the socket is silent and there is one more."""
    writer, reader = pair
    writer.sendall(_frame(1, 1, b"a") + _frame(1, 1, b"b"))
    reader.read(1)
    assert reader.has_frame
    reader.read(0)
    assert not reader.has_frame


def test_a_peer_that_hangs_up_is_an_error(pair: tuple[socket.socket, FrameReader]) -> None:
    """It is told apart from one that is silent."""
    writer, reader = pair
    writer.close()
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        reader.read(1)


def test_what_is_not_amqp_is_an_error(pair: tuple[socket.socket, FrameReader]) -> None:
    """A web server, for one."""
    writer, reader = pair
    writer.sendall(b"\x01\x00\x00\x00\x00\x00\x02okX")
    with pytest.raises(ConnectionError, match="not AMQP"):
        reader.read(1)


def _delivery(exchange: bytes, routing_key: bytes) -> bytes:
    head = struct.pack(">HH", 60, 60) + b"\x04ctag" + struct.pack(">QB", 2**63 + 200, 1)
    return b"".join(
        [head, bytes([len(exchange)]), exchange, bytes([len(routing_key)]), routing_key]
    )


def test_a_routing_key_is_made_readable() -> None:
    """Only what can't be decoded is replaced; everything else is left as it is."""
    odd = with_readable_routing_key((1, 5, _delivery(b"bank", b"a\xff\xfeb")))
    assert odd == (1, 5, _delivery(b"bank", b"a??b"))
    for plain in ((1, 5, _delivery(b"", b"")), (3, 5, b"\xff" * 40), (1, 5, b"\x00\x3c\x00\x3b")):
        assert with_readable_routing_key(plain) == plain


def test_properties_can_be_left_out() -> None:
    """The size of the body stays."""
    fixed = struct.pack(">HHQ", 60, 0, 314)
    assert without_properties((2, 5, fixed + b"\xff\xff...")) == (2, 5, fixed + b"\0\0")


# --- Addresses ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "virtual_host"),
    [
        ("amqp://", "localhost:5672/", "/"),
        ("amqp://host", "host:5672/", "/"),
        ("amqp://u:p@host:5673/", "host:5673/", "/"),
        ("amqp://u:p@host/%2f", "host:5672/", "/"),
        ("amqp://u:p@host/bank", "host:5672/bank", "bank"),
        ("amqp://u:p@host/a%2Fb", "host:5672/a/b", "a/b"),
        ("amqps://host", "host:5671/", "/"),
        ("amqp://[::1]:5672/bank", "[::1]:5672/bank", "bank"),
    ],
)
def test_urls_are_read_as_rabbitmqs_clients_do(url: str, shown: str, virtual_host: str) -> None:
    """Host, port and virtual host, with their defaults; no user and no password is shown."""
    address = Address.of(url)
    assert (str(address), address.virtual_host) == (shown, virtual_host)


def test_special_characters_are_decoded_and_hidden() -> None:
    """A password may hold anything, and is not in what is printed of an address."""
    address = Address.of(f"amqp://b%40nk:{SECRET}%2F%3A@host/")
    assert (address.user, address.password) == ("b@nk", f"{SECRET}/:")
    assert SECRET not in f"{address} {address!r}"


def test_tls_verifies_and_takes_files() -> None:
    """Certificates are named as in RabbitMQ's own URLs; plain AMQP has none."""
    options = Address.of("amqps://host?cacertfile=/ca.pem&certfile=/c.pem").tls_options
    assert options is not None
    assert (options["ca_certs"], options["certfile"]) == ("/ca.pem", "/c.pem")
    assert (options["server_hostname"], options["cert_reqs"]) == ("host", 2)
    assert Address.of("amqp://host").tls_options is None


@pytest.mark.parametrize(
    "url",
    [
        f"amqp://user:{SECRET}@host:port/",
        f"amqp://user:{SECRET}#@host/",
        f"amqp://user:{SECRET}@host/?cacertfile=/ca.pem",
        f"amqps://user:{SECRET}@host/?verify=verify_none",
        f"amqps://user:{SECRET}@host/?cacertfile",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    """The error says how to write one and shows nothing of the password, nor does its cause."""
    with pytest.raises(errors.SettingsError, match="amqp://user:password@host") as refusal:
        Address.of(url)
    assert SECRET not in str(refusal.value)
    assert refusal.value.__cause__ is None


# --- Topology ----------------------------------------------------------------


def test_the_topology_is_the_contracts() -> None:
    """Exchanges, queues and what keeps commands from being lost, as others rely on them."""
    wanted = topology.topology(topology.Names("bank"), 2)
    exchanges = {exchange.name: exchange for exchange in wanted.exchanges}
    queues = {queue.name: queue for queue in wanted.queues}
    assert {name: exchange.type for name, exchange in exchanges.items()} == {
        "bank.commands": "direct",
        "bank.commands.dead": "fanout",
        "bank.events": "topic",
        "bank.marks": "direct",
        "bank.nudges": "direct",
    }
    assert exchanges["bank.commands"].arguments == {"alternate-exchange": "bank.commands.dead"}
    commands = ["bank.commands.dead", "bank.commands.0", "bank.commands.1"]
    assert list(queues) == [*commands, "bank.marks.0", "bank.marks.1"]
    assert queues["bank.marks.1"].arguments == {"x-max-length": 1, "x-overflow": "drop-head"}
    assert (queues["bank.commands.1"].exchange, queues["bank.commands.1"].routing_key) == (
        "bank.commands",
        "1",
    )
    assert queues["bank.commands.1"].arguments == {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-delivery-limit": 1_000_000,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "bank.commands.dead",
        "x-dead-letter-strategy": "at-least-once",
    }
