"""An application whose broker's driver takes a second longer to import than a lease lasts."""

from __future__ import annotations

import sys
import time
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING

from worker.app import app as app

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

LEASE_SECONDS = 1.0


class Slow(MetaPathFinder):
    """Finds nothing, slowly."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname == "redis":
            time.sleep(LEASE_SECONDS + 1)
        return None


sys.meta_path.insert(0, Slow())
