"""The socket that `cqrs-es serve` listens on."""

from __future__ import annotations

import socket

from cqrs_es.http import Gateway
from cqrs_es.http.serving import _listen
from tests.samples import counting_app


def test_answers_are_sent_at_once() -> None:
    """An answer goes out in two parts: with Nagle's algorithm the second waits 40 ms."""
    with (
        _listen(Gateway(counting_app()), "127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
