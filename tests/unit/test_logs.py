"""Logs: one format on stderr, JSON for programs, and never a secret."""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import structlog

from cqrs_es.settings import masked
from cqrs_es.telemetry import logs
from tests.command_line import logs_put_back

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cqrs_es.settings import LogFormat, LogLevel

URL = "mysql://root:pa?s/s@wo:rd@host:3306/bank"


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    with logs_put_back():
        structlog.reset_defaults()  # an earlier test may have sent logs elsewhere
        yield


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [orjson.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    """With event, level, logger, time and what was bound; where stderr is no terminal."""
    logs.configure("info", "auto")
    structlog.get_logger("cqrs_es.test").bind(partition=3).info("taken", role="worker")
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "taken", "level": "info", "logger": "cqrs_es.test", "partition": 3,
        "role": "worker",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level(level: LogLevel, heard: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is below it is not written."""
    logs.configure(level, "json")
    log = structlog.get_logger()
    for method in (log.debug, log.info, log.warning, log.error):
        method("said")
    assert [line["level"] for line in lines(capsys)] == heard


def test_console_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """No JSON, and no colours where stderr is a file."""
    logs.configure("info", "console")
    structlog.get_logger("cqrs_es.test").info("taken", role="worker")
    text = capsys.readouterr().err
    assert "taken" in text
    assert "role=worker" in text
    assert "\x1b" not in text


def _fail_with_a_secret() -> None:
    secret = "hunter2"  # noqa: S105 - it must not be shown
    message = f"can't connect to {URL}: {len(secret)}"
    raise RuntimeError(message)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_secret_is_written(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in values nor in tracebacks, which show no variables."""
    logs.configure("info", log_format)
    log = structlog.get_logger()
    log.info("connecting", url=URL)
    try:
        _fail_with_a_secret()
    except RuntimeError:
        log.exception("failed")
    text = capsys.readouterr().err
    assert "RuntimeError" in text
    assert "root:***@host" in text
    for secret in ("pa?s", "wo:rd", "hunter2"):
        assert secret not in text


def test_secrets_hide_in_no_part_of_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists, mappings, objects and the query of a URL are searched too."""
    logs.configure("info", "json")
    error = RuntimeError(f"no answer from {URL}")
    nested = {"urls": [URL, (URL, 1)], "cause": error}
    structlog.get_logger().info(
        "failed", error=error, nested=nested, url="redis://host/0?db=1&password=wo:rd-pa?s"
    )
    text = capsys.readouterr().err
    for secret in ("pa?s", "wo:rd"):
        assert secret not in text
    (line,) = [orjson.loads(text)]
    assert line["nested"]["urls"][1] == ["mysql://root:***@host:3306/bank", 1]
    assert line["url"] == "redis://host/0?db=1&password=***"


def test_a_traceback_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    """With type, message and frames, of the error and of what caused it; without variables."""
    logs.configure("info", "json")
    try:
        try:
            _fail_with_a_secret()
        except RuntimeError as exc:
            raise ValueError("outer") from exc
    except ValueError as exc:
        structlog.get_logger().warning("failed", exc_info=exc)
    (line,) = lines(capsys)
    outer, cause = line["exception"]
    assert (outer["exc_type"], outer["exc_value"]) == ("ValueError", "outer")
    assert cause["exc_type"] == "RuntimeError"
    assert cause["exc_value"] == "can't connect to mysql://root:***@host:3306/bank: 7"
    assert cause["frames"][-1]["name"] == "_fail_with_a_secret"
    assert "hunter2" not in str(line)


@pytest.mark.parametrize("value", [2**70, "\ud800", float("nan"), {1: b"x"}, object()])
def test_whatever_is_logged_makes_a_line(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    """What JSON can't say is shown all the same: a log call never raises."""
    logs.configure("info", "json")
    structlog.get_logger().info("said", value=value)
    assert '"event"' in capsys.readouterr().err


def test_a_console_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What somebody sent neither begins a line of its own nor commands the terminal."""
    logs.configure("info", "console")
    structlog.get_logger().info("said\nforged", error="x\x1b[31m\r\nforged")
    (line,) = capsys.readouterr().err.splitlines()
    assert r"x\x1b[31m\r\nforged" in line


class _SlowPipe(io.StringIO):
    """Gives way to other threads in the middle of a write."""

    def write(self, text: str) -> int:
        for character in text:
            super().write(character)
            time.sleep(0)
        return len(text)


def test_lines_are_whole_though_threads_write_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, however slowly stderr takes them."""
    logs.configure("info", "json")
    pipe = _SlowPipe()
    monkeypatch.setattr(sys, "stderr", pipe)

    def write(number: int) -> None:
        for _ in range(20):
            structlog.get_logger().info("said", number=number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    numbers = [orjson.loads(line)["number"] for line in pipe.getvalue().splitlines()]
    assert sorted(numbers) == sorted(list(range(8)) * 20)


def test_ids_of_the_process_are_on_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Also on those of other threads and of libraries."""
    logs.configure("info", "json")
    logs.name_process(service="bank")
    logs.name_process(owner="host-1")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(structlog.get_logger().info, "said").result()
    logging.getLogger("library").warning("oh")
    for line in lines(capsys):
        assert (line["service"], line["owner"]) == ("bank", "host-1")


def test_libraries_and_warnings_come_out_in_the_same_format(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From warnings on; their chatter is left out unless debugging."""
    logs.configure("info", "json")
    library = logging.getLogger("some.library")
    library.info("chatter")
    library.warning("table %s exists", "events")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    first, second = lines(capsys)
    assert (first["logger"], first["event"]) == ("some.library", "table events exists")
    assert "DeprecationWarning: old" in second["event"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "mysql://root:***@host:3306/bank"),
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("sqlite:////tmp/bank.db", "sqlite:////tmp/bank.db"),
        ("memory://", "memory://"),
        ("dynamodb://eu/bank?endpoint=http://x&secret=y", "dynamodb://eu/bank?***"),
        ("amqp://guest@host/", "amqp://guest@host/"),
    ],
)
def test_a_url_in_the_banner_is_masked(url: str, shown: str) -> None:
    """Password and query are replaced, the rest is as it was written."""
    assert masked(url) == shown


class _Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("level", "message", "arguments"),
    [
        (logging.WARNING, "%d tables", ("two",)),
        (logging.WARNING, "%s of %s", (1,)),
        (logging.ERROR, "%s", (_Unprintable(),)),
        (35, "between two levels", ()),
        (99, "above all", ()),
    ],
)
def test_no_log_call_of_a_library_raises(
    level: int, message: str, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mistake is its own: what can be told is told, and the caller goes on."""
    logs.configure("info", "json")
    logging.getLogger("some.library").log(level, message, *arguments)
    (line,) = lines(capsys)
    assert line["event"].startswith(message)
    assert line["level"] in {"warning", "error", "critical"}


def test_in_somebody_elses_process_logs_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    """By the logger's name and level, with their fields, masked, whatever they are called."""
    logs.to_logging_unless_configured()
    logging.getLogger("cqrs_es.quiet").setLevel(logging.ERROR)
    structlog.get_logger("cqrs_es.quiet").warning("not said")
    with caplog.at_level(logging.INFO, logger="cqrs_es"):
        structlog.get_logger("cqrs_es.relay").info("100%s", url=URL, name="x", args=1)
        try:
            _fail_with_a_secret()
        except RuntimeError:
            structlog.get_logger("cqrs_es.relay").exception("failed")
    said, failed = caplog.records
    assert (said.name, said.levelno) == ("cqrs_es.relay", logging.INFO)
    assert said.getMessage() == "100%s url=mysql://root:***@host:3306/bank name=x args=1"
    assert said.__dict__["cqrs_es"]["name"] == "x"
    assert "RuntimeError: can't connect to mysql://root:***@host:3306/bank" in failed.getMessage()
    for secret in ("pa?s", "wo:rd", "hunter2"):
        assert secret not in caplog.text


def test_what_logging_gets_can_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """A traceback has no escapes of a terminal, and no half of a surrogate pair."""
    logs.to_logging_unless_configured()
    error = RuntimeError("\x1b[31m \ud800")
    structlog.get_logger("cqrs_es.relay").error("failed", exc_info=error)
    assert "RuntimeError: \\x1b[31m \\ud800" in caplog.text
    assert caplog.text.encode()


def test_who_has_set_structlog_up_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Its processors get what the framework logs."""
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    logs.to_logging_unless_configured()
    structlog.get_logger("cqrs_es.relay").warning("said")
    assert capsys.readouterr().out == '{"event": "said"}\n'
