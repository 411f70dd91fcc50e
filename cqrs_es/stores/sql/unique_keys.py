"""Who holds which unique key, as statements within a session.

Rows change only in an append that has locked the heads of the keys' partitions.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final

from cqrs_es.ports.store import UniqueKey
from cqrs_es.stores.sql.dialect import marks
from cqrs_es.stores.sql.session import chunks
from cqrs_es.stores.sql.tables import UNIQUE_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cqrs_es.stores.sql.session import Session

_FIND: Final = f"{UNIQUE_KEYS.select} WHERE aggregate_type = ? AND name = ? AND value_hash IN "
_DELETE: Final = "DELETE FROM unique_keys WHERE aggregate_type = ? AND name = ? AND value_hash IN "
_LIST: Final = f"""
    {UNIQUE_KEYS.select}
    WHERE aggregate_type = ? AND (name > ? OR (name = ? AND value_hash > ?))
    ORDER BY name, value_hash LIMIT ?"""


async def find(session: Session, keys: Iterable[UniqueKey]) -> dict[UniqueKey, str]:
    """Read the holders of those keys that are held."""
    found: dict[UniqueKey, str] = {}
    for aggregate_type, name, hashes in _grouped(keys):
        sql = _FIND + marks(len(hashes))
        rows = await session.fetch(sql, (aggregate_type, name, *hashes))
        found.update({UniqueKey(*row[:3]): row[3] for row in rows})
    return found


async def page(
    session: Session, aggregate_type: str, after: UniqueKey | None, limit: int
) -> list[tuple[UniqueKey, str]]:
    """Read the keys of a type behind one, and their holders."""
    name, value_hash = (after.name, after.value_hash) if after else ("", "")
    rows = await session.fetch(_LIST, (aggregate_type, name, name, value_hash, limit))
    return [(UniqueKey(*row[:3]), row[3]) for row in rows]


async def move(
    session: Session, freed: Iterable[UniqueKey], held: Iterable[tuple[UniqueKey, str]]
) -> None:
    """Delete the rows of keys, then add rows of keys with their holders."""
    for aggregate_type, name, hashes in _grouped(freed):
        await session.execute(_DELETE + marks(len(hashes)), (aggregate_type, name, *hashes))
    rows = [(key.aggregate_type, key.name, key.value_hash, holder) for key, holder in held]
    await session.write(session.dialect.insert(UNIQUE_KEYS), rows)


def _grouped(keys: Iterable[UniqueKey]) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Sort keys; cut them into groups of one type and name that fit into a statement each."""
    for (aggregate_type, name), some in groupby(
        sorted(keys), key=lambda key: (key.aggregate_type, key.name)
    ):
        for hashes in chunks([key.value_hash for key in some]):
            yield aggregate_type, name, hashes
