"""Small values that everything else is made of: names, ids, versions, partitions."""

from __future__ import annotations

import functools
import os
import re
import threading
import time
import unicodedata
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

import msgspec

from cqrs_es import errors

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
VIEW_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
METADATA_KEY = re.compile(r"[a-z0-9_-]{1,64}")
REPLY_TO = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_AGGREGATE_ID_CHARACTERS = 255
MAX_REASON_CHARACTERS = 2000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_VERSION = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,9})(?:\.([0-9]{1,9})(?:\.[^.].*)?)?)?")


class AggregateKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """The identity of an aggregate: its type's name and its id, both case-sensitive."""

    type: str
    id: str

    def partition(self, partitions: int) -> int:
        """Return the aggregate's partition among `partitions`, as every sender computes it."""
        return partition_of(self.type, self.id, partitions)

    def __str__(self) -> str:
        return f"{self.type}/{self.id}"


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A semantic version of an event; compared as three numbers."""

    major: int
    minor: int = 0
    patch: int = 0

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `"2"`, `"2.3"` or `"2.3.4"`; anything after a third dot is ignored.

        Raises `ValueError` for text that is no version.
        """
        match = _VERSION.fullmatch(text)
        if match is None:
            message = f"{text!r} is no version; write one like '1.0' or '2.3.4'"
            raise ValueError(message)
        major, minor, patch = match.groups(default="0")
        return cls(int(major), int(minor), int(patch))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def partition_of(aggregate_type: str, aggregate_id: str, partitions: int) -> int:
    """Return `crc32("<type>/<id>") mod partitions`, CRC-32 as in zlib."""
    return zlib.crc32(f"{aggregate_type}/{aggregate_id}".encode()) % partitions


def utc_now() -> datetime:
    """Return the present moment, aware, in UTC, to the microsecond."""
    return datetime.now(UTC)


MOST_PARTITIONS: Final = 1024
"""How many a store may have."""
_LANES: Final = 2**20


def lane_of(service: str, partition: int) -> int:
    """Return the number of where rows for another service lie that a partition has caused.

    It is below 0: workers, which look at partitions, never see them.
    """
    return -1 - partition - MOST_PARTITIONS * (zlib.crc32(service.encode()) % _LANES)


def partition_of_lane(number: int) -> int:
    """Return the partition whose lock is that of a lane, or of itself."""
    return number if number >= 0 else (-1 - number) % MOST_PARTITIONS


def new_command_id() -> str:
    """Make a UUID of version 7 (RFC 9562): it begins with the time, so it indexes well.

    One made later in this process is greater [method 2 of section 6.2].
    """
    return _ids.next()


class _Ids:
    """Makes UUIDs in ascending order: random within a millisecond, then counting on."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> str:
        milliseconds = time.time_ns() // 1_000_000
        fresh = (milliseconds << 74) | int.from_bytes(os.urandom(9), "big") << 1
        with self._lock:
            self._last = last = max(fresh, self._last + 1)
        high, low = last >> 62, last & (1 << 62) - 1
        value = (high >> 12) << 80 | 0x7 << 76 | (high & 0xFFF) << 64 | 0x2 << 62 | low
        text = f"{value:032x}"  # written out, as `UUID` takes five times as long
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


_ids = _Ids()


def time_of(command_id: str) -> datetime | None:
    """Return when an id of version 7 was made, as it says itself; None of another."""
    if command_id[14] != "7":
        return None
    try:
        return _EPOCH + timedelta(milliseconds=int(command_id[:8] + command_id[9:13], 16))
    except OverflowError:
        return None


def parse_command_id(text: str) -> str:
    """Return a UUID of any version in lower-case hyphenated form; raise `InvalidMessage`."""
    if not _UUID.fullmatch(text):
        message = f"id must be a UUID such as {uuid.UUID(int=0)}, not {shown(text)}"
        raise errors.InvalidMessage(message)
    return text.lower()


@functools.lru_cache(maxsize=1024)
def check_name(text: str, what: str) -> None:
    """Refuse a name of a service, aggregate type, command or event that does not match `NAME`."""
    if not NAME.fullmatch(text):
        message = f"{what} must match {NAME.pattern}, not {shown(text)}"
        raise errors.InvalidMessage(message)


def check_aggregate_id(text: str) -> None:
    """Refuse an aggregate id that is empty, too long, or has control characters."""
    if not 1 <= len(text) <= MAX_AGGREGATE_ID_CHARACTERS:
        message = f"aggregate_id must have 1 to {MAX_AGGREGATE_ID_CHARACTERS} characters"
        raise errors.InvalidMessage(f"{message}, not {len(text)}")
    if text.isascii() and text.isprintable():
        return
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in text):
        message = "aggregate_id must have no control characters and no lone surrogates"
        raise errors.InvalidMessage(message)


def storable(text: str) -> str:
    """Return text from somebody else's code as every store can hold it, cut where it is long.

    That is without NUL, which PostgreSQL refuses, and without lone surrogates.
    """
    cut = text if len(text) <= MAX_REASON_CHARACTERS else text[: MAX_REASON_CHARACTERS - 1] + "…"
    return cut.encode(errors="backslashreplace").decode().replace("\0", r"\x00")


def text_of(exc: BaseException | None, form: Callable[[object], str] = repr) -> str:
    """Return an exception's repr, or its text; what its own code may do wrong, it may do there."""
    try:
        return form(exc)
    except Exception:  # noqa: BLE001 - an author's __repr__ can raise anything
        return f"{type(exc).__name__}, which can't be shown"


def shown(value: object, limit: int = 60) -> str:
    """Return a value's repr cut to `limit` characters, safe to put in a message or a log."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
