"""Which stores there are to test, and which of them a test is for."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cqrs_es.ports.views import SqlSession, ViewStore

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

GIVEN_URL = os.environ.get("CQRS_ES_TEST_STORE_URL", "")
"""Of a store that another package has; `{name}` in it is another for each test."""
SQL_STORES = ("memory", "sqlite", "mysql", "postgres")
STORES = (*SQL_STORES, "dynamodb", *(["given"] if GIVEN_URL else []))

on_sql = pytest.mark.parametrize("store_url", SQL_STORES, indirect=True)
"""For a test of SQL of one's own, or of more events than moto takes in good time."""
on_dynamodb = pytest.mark.parametrize("store_url", ["dynamodb"], indirect=True)
"""For a test of what only DynamoDB does, or can't."""


SERVERS = ("mysql", "postgres")


class _MayHaveSql(Protocol[T_co]):
    @property
    def sql(self) -> T_co | None: ...


def sql_of(one: _MayHaveSql[T]) -> T:
    """Return the SQL of views, or of a transaction, that have it."""
    assert one.sql is not None
    return one.sql


@asynccontextmanager
async def in_sql(views: ViewStore) -> AsyncGenerator[SqlSession]:
    """Open a transaction for its SQL alone."""
    async with views.transaction() as transaction:
        yield sql_of(transaction)
