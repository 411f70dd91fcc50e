"""A service in two versions, by `VERSION`: views change, one goes, another comes."""

from __future__ import annotations

import os

from tests.versions import NEW, OLD, version

app = version(*(NEW if os.environ.get("VERSION") == "new" else OLD))
