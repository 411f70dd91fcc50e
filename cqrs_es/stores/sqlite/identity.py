"""Whether a path still leads to the file that was opened by it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cqrs_es import errors

if TYPE_CHECKING:
    from pathlib import Path


class FileIdentity:
    """The file that a connection has open.

    SQLite goes on with a file that was deleted or replaced, and all that is
    written to it is gone when it is closed.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise `StoreUnusable` where the file is another than at the first call, or none."""
        present = self._present()
        self._opened = self._opened or present
        if present != self._opened:
            message = (
                f"{self._path} was deleted or replaced while it was open; nothing is written"
                " any more: see what is there now, then start again"
            )
            raise errors.StoreUnusable(message)

    def _present(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - of a path's own takes thrice as long
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino
