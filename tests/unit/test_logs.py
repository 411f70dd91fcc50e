"""Logs: one format on stderr, JSON for programs, and never a secret."""

from __future__ import annotations

import logging
import warnings
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
