"""Cursors: where subscribers keep how far they have got."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import orjson

from cqrs_es import errors


@dataclass(frozen=True, slots=True)
class Position:
    """How far a subscriber has got: the last offset it handled of each partition of a log."""

    log_epoch: str
    offsets: Mapping[int, int]


class Cursor(Protocol):
    """Where one subscriber keeps its position.

    To handle every event exactly once, write the position in the transaction
    that writes what the event means, from `event.partition`, `event.offset` and
    the subscription's `log_epoch`; let `load` read it, and `save` do nothing.
    """

    async def load(self) -> Position | None:
        """Return the position saved last, None before the first."""
        ...

    async def save(self, position: Position) -> None:
        """Keep a position durably; called after its events were handled."""
        ...


class FileCursor:
    """Keeps a position in a JSON file of its own, replaced as a whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._writing = threading.Lock()

    async def load(self) -> Position | None:
        """Read the file; None when there is none."""
        return await asyncio.to_thread(self._read)

    async def save(self, position: Position) -> None:
        """Replace the file and have it reach the disk."""
        content = {"log_epoch": position.log_epoch, "offsets": dict(position.offsets)}
        body = orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS)
        await asyncio.to_thread(self._replace, body)

    def _read(self) -> Position | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Position)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            message = f"the cursor {self._path} can't be read ({exc}); fix it, or delete it"
            raise errors.ConfigurationError(f"{message} to begin anew") from exc

    def _replace(self, body: bytes) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            with self._writing:
                _write_through(new, body)
                new.replace(self._path)
                _flush_folder(self._path.parent)
        except OSError as exc:
            message = f"the cursor {self._path} can't be written: {exc}"
            raise errors.ConfigurationError(message) from exc


def _write_through(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make a renaming durable: it is the folder that it changed."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
