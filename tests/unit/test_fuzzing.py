"""The targets of fuzzing work, and what it has found stays mended."""

from __future__ import annotations

import pytest

from tests.fuzz_targets import EXAMPLES, TARGETS

FOUND: dict[str, list[bytes]] = {}


@pytest.mark.parametrize("name", TARGETS)
def test_what_others_write_is_read_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("STORE", "BROKER"):
        monkeypatch.setenv(f"CQRS_ES_{setting}_URL", "memory://")
    for body in (b"", b"{}", b"\xff", *EXAMPLES[name], *FOUND.get(name, [])):
        TARGETS[name](body)
