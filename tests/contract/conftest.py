"""The store under test, initialised, and more connections to the same database."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from cqrs_es.stores import storage_for
from tests.contract.building import PARTITIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.storage import Storage


class Database:
    """An empty database, to be opened any number of times."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened = AsyncExitStack()
        # What is in memory is one object for everybody.
        self._shared = storage_for(url) if url == "memory://" else None

    async def open(self) -> Storage:
        """Open the database as one more process would."""
        storage = self._shared or storage_for(self.url)
        await storage.open()
        self._opened.push_async_callback(storage.close)
        return storage

    async def close(self) -> None:
        """Close what was opened."""
        await self._opened.aclose()


@pytest.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    """Lend the database under test, empty and not yet initialised."""
    database = Database(store_url)
    yield database
    await database.close()


@pytest.fixture
async def storage(database: Database) -> Storage:
    """Open and initialise the store under test."""
    storage = await database.open()
    await storage.initialise(PARTITIONS)
    return storage
