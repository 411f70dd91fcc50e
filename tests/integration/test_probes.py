"""`--health-port`: what a process answers from its first moment to its last."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.asking import Asked
from tests.command_line import EXAMPLE, cqrs_es, message, running
from tests.servers import free_port
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.command_line import Running

MEMORY = {"CQRS_ES_STORE_URL": "memory://"}
NO_SERVERS = {
    "CQRS_ES_STORE_URL": "mysql://root:secret@127.0.0.1:1/bank",
    "CQRS_ES_BROKER_URL": "redis://127.0.0.1:1/0",
}
TROUBLE = ("--app", "tests.integration.troublesome:app")


@pytest.fixture
def asked() -> Asked:
    return Asked(free_port())


def at(asked: Asked) -> tuple[str, str]:
    return "--health-port", f"127.0.0.1:{asked.port}"


def test_a_process_that_is_well(asked: Asked) -> None:
    """Alive, ready once its roles have begun, and counting; a signal ends it with code 0."""
    with running("run", *at(asked), "--commands", str(EXAMPLE), **MEMORY) as process:
        until(asked.listening)
        assert asked.live
        until(lambda: not asked.reasons)
        until(lambda: asked.samples.get(("events_published_total",)) == 26)
        samples = asked.samples
        assert samples["ready",] == 1
        assert samples["info", "worker.app:app", "bank", "0.1.0"] == 1
        assert samples["partitions_held", "projector:bank_totals"] == 1
        assert samples["commands_total", "account", "WriteCheck", "accepted"] == 6
        until(lambda: asked.samples.get(("queue_commands", "0")) == 0)
        assert asked.get("/metrics", method="HEAD") == (200, b"")
        assert asked.get("/", method="GET")[0] == 404
        assert asked.get("/ready", method="POST")[0] == 405
        process.signal(signal.SIGTERM)
        assert process.end().code == 0


@pytest.mark.parametrize("verb", ["worker", "relay", "projector", "run"])
def test_both_servers_are_down(verb: str, asked: Asked) -> None:
    """Alive from the start; not ready, and why, without a password; metrics all the same."""
    with running(verb, *at(asked), **NO_SERVERS) as process:
        until(asked.listening)
        assert asked.live
        until(lambda: asked.unready_for("not open yet: "))
        until(lambda: asked.unready_for("check CQRS_ES_STORE_URL"))
        assert b"secret" not in asked.get("/ready")[1]
        samples = asked.samples
        assert samples["ready",] == 0
        assert asked.live
        process.signal(signal.SIGTERM)
        assert process.end().code == 0


def test_the_port_from_the_environment(asked: Asked) -> None:
    """For containers; the option is stronger."""
    other = Asked(free_port())
    environment = {"CQRS_ES_HEALTH_PORT": f"127.0.0.1:{other.port}", **MEMORY}
    with running("run", **environment):
        until(other.listening)
    with running("run", *at(asked), **environment):
        until(asked.listening)
        assert not other.listening()


def test_a_port_alone_listens_to_everybody(asked: Asked) -> None:
    """Who asks is, as a rule, not in the same container."""
    with running("run", "--health-port", str(asked.port), **MEMORY):
        until(asked.listening)
        with socket.create_connection(("127.0.0.2", asked.port)) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    with running("run", *at(asked), **MEMORY):
        until(asked.listening)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", asked.port))


def test_a_port_of_the_systems_choice() -> None:
    """The log says which."""
    with running(
        "--log-format", "json", "run", "--health-port", "127.0.0.1:0", **MEMORY
    ) as process:
        process.wait_for("probes served")
        (line,) = [line for line in process.err.splitlines() if "probes served" in line]
        port = int(line.partition('"port":')[2].split("}")[0].split(",")[0])
        assert Asked(port).live


@pytest.mark.parametrize("verb", ["worker", "relay", "projector", "run"])
def test_a_port_in_use(verb: str, asked: Asked) -> None:
    """Wrong usage, before anything else is tried: exit code 2 and a sentence."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", asked.port))
        taken.listen()
        result = cqrs_es(
            verb,
            *at(asked),
            CQRS_ES_STORE_URL=NO_SERVERS["CQRS_ES_STORE_URL"],
            CQRS_ES_BROKER_URL=NO_SERVERS["CQRS_ES_BROKER_URL"],
        )
    assert result.code == 2
    assert f"--health-port 127.0.0.1:{asked.port}" in result.complaint
    assert "choose another" in result.complaint


@pytest.mark.parametrize("value", ["", "http", "70000", "host:", ":8000", "[::1", "1:2:3", "-1"])
def test_no_port(value: str) -> None:
    """Exit code 2, by option and by variable; each says which it was."""
    result = cqrs_es("run", f"--health-port={value}")
    assert result.code == 2
    assert "--health-port must be PORT or HOST:PORT" in result.complaint
    result = cqrs_es("run", CQRS_ES_HEALTH_PORT=value)
    assert result.code == 2
    assert "CQRS_ES_HEALTH_PORT: must be" in result.complaint


def test_ipv6(asked: Asked) -> None:
    """In brackets, as in a URL."""
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6")
    with running("run", "--health-port", f"[::1]:{asked.port}", **MEMORY) as process:
        process.wait_for("probes served")
        with socket.create_connection(("::1", asked.port)) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


# --- Without prometheus-client -------------------------------------------------


def test_without_prometheus_client(asked: Asked) -> None:
    """Probes work; /metrics answers 501 with the remedy."""
    with running("run", *at(asked), module="tests.apps.no_prometheus", **MEMORY):
        until(asked.listening)
        assert asked.live
        until(lambda: not asked.reasons)
        status, body = asked.get("/metrics")
    assert status == 501
    assert b"pip install 'cqrs-es[metrics]'" in body


def test_prometheus_client_is_loaded_only_when_wanted() -> None:
    """A process without a health port does not know it."""
    program = "import sys; import cqrs_es.service; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- A process in trouble ------------------------------------------------------


@pytest.fixture
def troubled(asked: Asked) -> Iterator[Running]:
    """Run an application whose handlers do what nobody's should, fed through stdin."""
    feeding = ("--commands", "-")
    with running(*TROUBLE, "run", *at(asked), *feeding, **MEMORY) as process:
        until(asked.listening)
        until(lambda: not asked.reasons)
        yield process


def test_a_blocked_event_loop_does_not_answer(troubled: Running, asked: Asked) -> None:
    """Whoever only has a thread that answers is not alive."""
    troubled.feed(message("Block", "trouble", "t") + b"\n")
    until(lambda: "blocking" in troubled.out)
    with pytest.raises(TimeoutError):
        asked.get("/live", seconds=1.0)


def test_a_process_that_stops(troubled: Running, asked: Asked) -> None:
    """It is alive and not ready while it finishes what is in hand."""
    troubled.feed(message("Wait", "trouble", "t") + b"\n")
    until(lambda: "waiting" in troubled.out)
    troubled.signal(signal.SIGTERM)
    until(lambda: asked.unready_for("stopping"))
    assert asked.live
    troubled.signal(signal.SIGTERM)
    assert troubled.end().code == 1
