"""The targets of fuzzing work, and what it has found stays mended."""

from __future__ import annotations

import pytest

from tests.fuzz_targets import EXAMPLES, TARGETS

FOUND = {
    # A balance with exabytes of zeros.
    "stored": [b'\x04{"balance":"-92231e+30872036854775808"}'],
    # Metadata that are no JSON, and moments without a zone, which only their readers found.
    "event": [
        EXAMPLES["event"][0].replace(b'"{}"', b'"9\xc3\xa9"'),
        EXAMPLES["event"][0].replace(b"123456Z", b"123456+01:00"),
    ],
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_others_write_is_read_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("STORE", "BROKER"):
        monkeypatch.setenv(f"CQRS_ES_{setting}_URL", "memory://")
    for body in (b"", b"{}", b"\xff", *EXAMPLES[name], *FOUND.get(name, [])):
        TARGETS[name](body)
