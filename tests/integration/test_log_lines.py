"""What a process says about its work: a line when it begins, for each batch, and when it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog
from structlog.testing import capture_logs

from cqrs_es import service
from cqrs_es.execution import report
from cqrs_es.settings import Settings
from cqrs_es.telemetry.lines import reads_info
from cqrs_es.testing import TestApp
from tests.acceptance.test_injection import HOSTILE, MESSAGES, encoded
from tests.bank_data import PROJECT
from tests.command_line import EXAMPLE, cqrs_es, environment, message, running
from tests.raw import raw
from tests.samples import Add, AddThenCrash, Counter, counting_app
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command_line import Here


def lines(err: str, event: str | None = None) -> list[dict[str, Any]]:
    every = [orjson.loads(line) for line in err.splitlines() if line.startswith("{")]
    return [line for line in every if event is None or line["event"] == event]


def test_a_run_from_its_start_to_its_end(sqlite_url: str) -> None:
    """Banner, one line for each batch of each role, and what came of it; no payload."""
    result = cqrs_es(
        "run", "--commands", str(EXAMPLE), "--until-idle", CQRS_ES_STORE_URL=sqlite_url
    )
    (banner,) = lines(result.err, "started")
    assert banner["roles"] == [
        "projector:account_query",
        "projector:bank_totals",
        "reactor:transfer",
        "relay",
        "worker",
    ]
    assert (banner["service"], banner["app"], banner["partitions"]) == ("bank", "worker.app:app", 1)
    assert banner["store"] == sqlite_url
    batches = lines(result.err, "batch done")
    for name, total in {"accepted": 26, "rejected": 6, "failed": 0, "duplicate": 1}.items():
        assert sum(batch[name] for batch in batches) == total
    assert all(batch["append_seconds"] > 0 for batch in batches)
    published = lines(result.err, "published")
    assert [(line["role"], line["partition"]) for line in published][:1] == [("relay", 0)]
    assert (published[0]["from_offset"], published[-1]["to_offset"]) == (1, 26)
    for view in ("account_query", "bank_totals"):
        projected = [line for line in lines(result.err, "projected") if line["view"] == view]
        assert (projected[0]["from_offset"], projected[-1]["to_offset"]) == (1, 26)
        assert projected[0]["role"] == f"projector:{view}"
    (end,) = lines(result.err)[-1:]
    assert (end["event"], end["reason"], end["exit_code"]) == ("ended", "idle", 0)
    assert (end["accepted"], end["published"], end["projected"]) == (26, 26, 52)
    assert "amount" not in result.err
    owner = banner["owner"]
    assert {line["owner"] for line in lines(result.err, "published")} == {owner}


def test_a_batch_of_one_command_says_which(sqlite_url: str) -> None:
    """Its id, its aggregate, and the correlation id that its sender gave."""
    command = orjson.loads(message("OpenAccount", "account", "A", {"account_id": "A"}))
    command["metadata"] = {"correlation_id": "order-17"}
    result = cqrs_es(
        "run", "--commands", "-", "--until-idle",
        stdin=orjson.dumps(command), CQRS_ES_STORE_URL=sqlite_url,
    )  # fmt: skip
    (batch,) = lines(result.err, "batch done")
    assert batch["command_id"] == command["id"]
    assert (batch["command"], batch["aggregate"]) == ("OpenAccount", "account/A")
    assert batch["correlation_id"] == "order-17"


def test_a_signal_and_an_error_are_reasons_to_end(sqlite_url: str, tmp_path: Path) -> None:
    """The last line says which it was, and the exit code."""
    with running("run", CQRS_ES_STORE_URL=sqlite_url) as run:
        run.wait_for("partition taken")
        run.signal(signal.SIGTERM)
        (end,) = lines(run.end().err)[-1:]
    assert (end["event"], end["reason"], end["exit_code"]) == ("ended", "asked to stop", 0)
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    result = cqrs_es("run", CQRS_ES_STORE_URL=f"sqlite:///{broken}")
    (end,) = lines(result.err)[-1:]
    assert (end["event"], end["level"], end["exit_code"]) == ("ended", "error", 1)
    assert result.code == 1


def test_a_level_or_format_that_there_is_not(sqlite_url: str) -> None:
    """Is refused by name, with what there is."""
    level = cqrs_es("status", CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LOG_LEVEL="loud")
    log_format = cqrs_es("status", CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LOG_FORMAT="loud")
    assert (level.code, log_format.code) == (2, 2)
    assert level.complaint.startswith("CQRS_ES_LOG_LEVEL: must be one of debug, info")
    assert log_format.complaint.startswith("CQRS_ES_LOG_FORMAT: must be one of auto, console")


def test_level_and_format_by_environment(sqlite_url: str) -> None:
    """At `warning` a good run says nothing; `console` is for people also in a pipe."""
    arguments = ("run", "--commands", str(EXAMPLE), "--until-idle")
    quiet = cqrs_es(*arguments, CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LOG_LEVEL="WARNING")
    assert (quiet.code, quiet.err) == (0, "")
    people = cqrs_es(*arguments, CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LOG_FORMAT="console")
    assert "batch done" in people.err
    assert "aggregates=" in people.err
    assert "{" not in people.err


def test_a_terminal_gets_lines_for_people(sqlite_url: str) -> None:
    """By itself; what a pipe gets is JSON."""
    mine, its = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_es.cli", "run", "--commands", str(EXAMPLE), "--until-idle"],
        cwd=PROJECT,
        env=environment({"CQRS_ES_STORE_URL": sqlite_url, "TERM": "xterm", "COLUMNS": "200"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=its,
    )
    os.close(its)
    said = bytearray()
    while chunk := _read(mine):
        said += chunk
    os.close(mine)
    assert process.wait(30) == 0
    assert b"batch done" in said
    assert b'"event"' not in said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that nobody is on the other side any more
        return b""


def test_a_process_whose_stderr_nobody_reads_is_ended(sqlite_url: str) -> None:
    """It blocks at a log line; the watchdog can't say so either, and ends it all the same."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    while _fill(writes):
        pass
    os.set_blocking(writes, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_es.cli", "run"],
        cwd=PROJECT,
        env=environment({"CQRS_ES_STORE_URL": sqlite_url, "CQRS_ES_LEASE_SECONDS": "1"}),
        stdin=subprocess.DEVNULL,
        stderr=writes,
    )
    try:
        until(lambda: process.poll() is not None)
        assert process.returncode == 1
    finally:
        process.kill()
        process.wait()
        os.close(reads)
        os.close(writes)


def test_a_watchdog_with_little_of_its_core_still_says_why() -> None:
    """Writing the line may take far longer than a tick: the process ends with it, not before."""
    program = (
        "import asyncio, time, structlog\n"
        "from cqrs_es.runtime.stopping import watched\n"
        "def starved(_logger, _method, event):\n"
        "    time.sleep(1)\n"
        "    return event\n"
        "structlog.configure(processors=[starved, structlog.processors.JSONRenderer()])\n"
        "async def main():\n"
        "    async with watched(0.5):\n"
        "        await asyncio.sleep(0)\n"
        "        time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert orjson.loads(ended.stdout)["event"] == "event loop blocked"


def _fill(descriptor: int) -> bool:
    try:
        os.write(descriptor, b"x" * 1024)
    except BlockingIOError:
        return False
    return True


async def test_a_handler_that_fails_is_logged_with_what_finds_it() -> None:
    """Command, aggregate, correlation, how often, and the exception itself."""
    structlog.reset_defaults()
    async with TestApp(counting_app()) as t:
        with capture_logs() as captured, t.expect_failures() as failures:
            outcome = await t.send(
                Counter, "A", AddThenCrash(1), metadata={"correlation_id": "c-1"}
            )
    logged = [line for line in captured if line["event"] == "handler failed"]
    assert failures
    assert logged[0]["command_id"] == outcome.command_id
    assert (logged[0]["aggregate"], logged[0]["correlation_id"]) == ("counter/A", "c-1")
    assert logged[0]["exc_info"] is failures[0]


async def test_a_reader_that_does_not_run_is_asked_for_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While events wait for it and nothing moves, the store is asked ever less often."""
    async with counting_app().open(Settings(store_url="memory://")) as opened:
        await opened.execute(Counter, "c", Add(1))
        supervisor = opened.supervisor({"worker"})
        asked = 0
        lag = supervisor.lag

        async def counted() -> int:
            nonlocal asked
            asked += 1
            return await lag()

        monkeypatch.setattr(supervisor, "lag", counted)
        seen = 0
        async for look in service.looks(supervisor, 0.005):
            assert look.lag == 1
            seen += 1
            if seen == 100:
                break
        assert 1 < asked < 20


def test_lines_that_nobody_reads_are_not_made() -> None:
    """By the level of structlog's filter, or of the logger beneath; else they are made."""
    quiet = structlog.wrap_logger(
        structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(30)
    )
    loud = structlog.wrap_logger(
        structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(20)
    )
    assert not reads_info(quiet)
    assert reads_info(loud)
    beneath = logging.getLogger("cqrs_es.test")
    routed = structlog.wrap_logger(
        beneath, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET)
    )
    for level, read in ((logging.WARNING, False), (logging.INFO, True)):
        beneath.setLevel(level)
        assert reads_info(routed) == read
    other = structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=structlog.BoundLogger)
    assert reads_info(other)


def test_whether_lines_are_read_follows_the_configuration() -> None:
    """A logger is put together once for each, not once."""
    log = structlog.get_logger("cqrs_es.test")
    try:
        for level, read in ((logging.WARNING, False), (logging.INFO, True)):
            filtering = structlog.make_filtering_bound_logger(level)
            structlog.configure(
                wrapper_class=filtering, logger_factory=structlog.PrintLoggerFactory()
            )
            assert reads_info(log) == read
    finally:
        structlog.reset_defaults()


async def test_a_batch_is_described_to_readers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[object] = []

    def ids(batch: object) -> dict[str, str]:
        described.append(batch)
        return {}

    monkeypatch.setattr(report, "_ids", ids)
    async with counting_app().open(Settings(store_url="memory://")) as opened:
        for level in (logging.WARNING, logging.INFO):
            filtering = structlog.make_filtering_bound_logger(level)
            log = structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=filtering)
            monkeypatch.setattr(report, "log", log)
            await opened.execute(Counter, "c", Add(1))
    assert len(described) == 1


@pytest.mark.parametrize("form", ["json", "console"])
def test_nobody_writes_lines_of_their_own(
    here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    """Whatever senders call things: no line more, and nothing that a terminal obeys."""
    commands = tmp_path / "commands"
    sent = [encoded(each) for each, _ in MESSAGES.values()]
    alone = [
        encoded(raw("Remind", {"name": value}, aggregate_type="box", aggregate_id=value[:255]))
        for value in HOSTILE.values()
    ]
    commands.write_bytes(b"\n".join([*sent, *alone]))
    monkeypatch.setenv("CQRS_ES_APP", "tests.acceptance.test_injection:app")
    monkeypatch.setenv("CQRS_ES_LOG_FORMAT", form)
    monkeypatch.setenv("CQRS_ES_BATCH_SIZE", "1")  # whose lines say which command it was
    said = here.done("--log-level", "debug", "run", "--commands", str(commands), "--until-idle").err
    assert "DROP TABLE" in said
    for line in said.splitlines():
        assert not line.startswith("X-Injected"), line
    kinds = {"json": ("Cc",), "console": ("Cc", "Cf")}[form]  # no reader of JSON obeys the latter
    assert {each for each in said if unicodedata.category(each) in kinds} == {"\n"}
    if form == "json":
        assert len(lines(said)) == len(said.splitlines())
