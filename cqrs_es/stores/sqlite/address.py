"""Which file, and how it is to be opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import msgspec

from cqrs_es import errors

BUSY_TIMEOUT_SECONDS: Final = 5.0


class SqliteTarget(msgspec.Struct, frozen=True):
    """What a URL says: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    `?timeout=` is how many seconds to wait for another process's lock,
    `?mode=ro` opens the file for reading only, `?max_pages=` bounds its size.
    """

    path: Path
    timeout: float = BUSY_TIMEOUT_SECONDS
    mode: str = "rwc"
    max_pages: int | None = None

    @classmethod
    def parse(cls, url: str) -> SqliteTarget:
        """Read a URL; raise `SettingsError` for one that names no file."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        path = unquote(parts.path).removeprefix("/")
        if parts.netloc or not path:
            message = "a SQLite URL is sqlite:///relative.db or sqlite:////absolute/path.db"
            raise errors.SettingsError(message)
        try:
            return cls(Path(path).absolute(), **_typed(options))
        except (TypeError, ValueError) as exc:
            message = f"a SQLite URL takes timeout, mode and max_pages, not {parts.query!r}"
            raise errors.SettingsError(message) from exc

    @property
    def uri(self) -> str:
        """The file as SQLite itself names it; it is made by `create`, not by being opened."""
        mode = "rw" if self.mode == "rwc" else self.mode
        return f"file:{quote(str(self.path))}?mode={mode}"

    def create(self) -> None:
        """Make the file, empty, unless it is there or may not be made."""
        if self.mode == "rwc":
            try:
                self.path.touch()
            except OSError as exc:
                raise errors.StoreReadOnly from exc


def _typed(options: Mapping[str, str]) -> dict[str, Any]:
    types = {"timeout": float, "mode": str, "max_pages": int}
    unknown = options.keys() - types.keys()
    if unknown:
        raise TypeError(unknown)
    return {name: types[name](value) for name, value in options.items()}
