"""Which stores there are to test, and which of them a test is for."""

from __future__ import annotations

import pytest

STORES = ("memory", "sqlite", "mysql", "postgres", "dynamodb")
SQL_STORES = tuple(store for store in STORES if store != "dynamodb")

on_sql = pytest.mark.parametrize("store_url", SQL_STORES, indirect=True)
"""For a test of SQL of one's own, or of more events than moto takes in good time."""
on_dynamodb = pytest.mark.parametrize("store_url", ["dynamodb"], indirect=True)
"""For a test of what only DynamoDB does, or can't."""
