"""Differences, written for whoever reads a failed test."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS


def difference(expected: Sequence[str], actual: Sequence[str]) -> str:
    """Return lines marked `-` where only expected, `+` where only actual."""
    lines = difflib.ndiff(expected, actual)
    return "\n".join(["- expected, + actual:", *(line for line in lines if line[:1] != "?")])


def event_lines(events: Iterable[object]) -> list[str]:
    """Return one line for each event."""
    return [repr(event) for event in events]


def listed(events: Iterable[object]) -> str:
    """Return events as an indented list, or say that there are none."""
    return "\n".join(f"  {line}" for line in event_lines(events)) or "  (no events)"


def json_lines(body: bytes) -> list[str]:
    """Return JSON with a line for each value, its keys sorted."""
    return orjson.dumps(orjson.loads(body), option=_OPTIONS).decode().splitlines()
