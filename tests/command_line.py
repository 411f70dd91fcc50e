"""Calling the command line: in this process where only output counts, else as a process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest
import structlog

from cqrs_es import wire
from cqrs_es.cli.main import main
from cqrs_es.messages import CommandMessage
from cqrs_es.types import JsonObject, new_command_id
from tests.bank_data import PROJECT
from tests.waiting import until

if TYPE_CHECKING:
    import signal
    from collections.abc import Mapping
    from pathlib import Path

TIMEOUT_SECONDS = 60.0
EXAMPLE = PROJECT / "examples" / "bank.jsonl"


@dataclass(frozen=True, slots=True)
class Result:
    """What a call printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Stdout, each line as JSON."""
        return [orjson.loads(line) for line in self.out.splitlines()]

    @property
    def json(self) -> Any:
        """Stdout as the one JSON value that it is."""
        (value,) = self.lines
        return value

    @property
    def complaint(self) -> str:
        """The one line on stderr that says what went wrong."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("cqrs-es: ")]
        return line.removeprefix("cqrs-es: ")


def message(
    command: str,
    aggregate_type: str,
    aggregate_id: str,
    payload: dict[str, object] | None = None,
    command_id: str | None = None,
) -> bytes:
    """Write a command message."""
    return wire.encode_command(
        CommandMessage(
            id=command_id or new_command_id(),
            type=command,
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            payload=cast("JsonObject", payload or {}),
        )
    )


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with no other settings than those given."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("CQRS_ES_")}
    return {**others, "PYTHONPATH": str(PROJECT), **settings}


def cqrs_es(*arguments: str, cwd: Path = PROJECT, stdin: bytes = b"", **settings: str) -> Result:
    """Call the command line as a process and wait for its end."""
    done = subprocess.run(
        [sys.executable, "-m", "cqrs_es.cli", *arguments],
        cwd=cwd,
        env=environment(settings),
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


class Running:
    """A long-running verb as a process of its own; what it says is collected as it comes."""

    def __init__(self, *arguments: str, module: str = "cqrs_es.cli", **settings: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=PROJECT,
            env=environment(settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        self._stdin = self.process.stdin
        self._out: list[bytes] = []
        self._err: list[bytes] = []
        self._readers = [
            threading.Thread(target=self._out.extend, args=[self.process.stdout], daemon=True),
            threading.Thread(target=self._err.extend, args=[self.process.stderr], daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def out(self) -> str:
        return b"".join(self._out).decode()

    @property
    def err(self) -> str:
        return b"".join(self._err).decode()

    def wait_for(self, said: str) -> None:
        """Wait until it has said something on stderr."""
        until(lambda: said in self.err or self.process.poll() is not None)
        assert said in self.err, self.err

    def feed(self, content: bytes) -> None:
        """Write to its stdin, which stays open."""
        self._stdin.write(content)
        self._stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> Result:
        """Wait for its end."""
        code = self.process.wait(TIMEOUT_SECONDS)
        for reader in self._readers:
            reader.join(TIMEOUT_SECONDS)
        for pipe in (self._stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return Result(code, self.out, self.err)


@contextmanager
def running(*arguments: str, module: str = "cqrs_es.cli", **settings: str) -> Generator[Running]:
    """Start a long-running verb; kill it at the end of the block if it still runs."""
    started = Running(*arguments, module=module, **settings)
    try:
        yield started
    finally:
        started.process.kill()
        started.end()


class Here:
    """Calls of the command line within the test's process: ten times as fast."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store_url: str
    ) -> None:
        self._capsys = capsys
        monkeypatch.chdir(PROJECT)
        for name in [name for name in os.environ if name.startswith("CQRS_ES_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("CQRS_ES_STORE_URL", store_url)
        monkeypatch.setattr(sys, "path", list(sys.path))

    def __call__(self, *arguments: str) -> Result:
        """Call the command line and return how it ended."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert isinstance(ended.value.code, int)
        out, err = self._capsys.readouterr()
        return Result(ended.value.code, out, err)

    def done(self, *arguments: str) -> Result:
        """Call the command line; it must succeed."""
        result = self(*arguments)
        assert result.code == 0, result.err
        return result


@contextmanager
def logs_put_back() -> Generator[None]:
    """Undo what a verb does to the logs of the process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        structlog.reset_defaults()
        logging.captureWarnings(capture=False)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
