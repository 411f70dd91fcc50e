"""Deposits over HTTP as one would write them by hand: FastAPI, SQLAlchemy and aiomysql.

    BY_HAND_DATABASE=mysql+aiomysql://… uvicorn benchmarks.contenders.by_hand:api

One transaction for each request, on the account's locked row: the ledger, the balance, an outbox
for events, and the key with its answer, so that a request sent again has one effect. It has no
rules, versions, views or relay. As the documentation of both has it: a transaction for each
request, an engine with a pool, SQLAlchemy's Core, whose statements are cheaper than the ORM's.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from decimal import Decimal  # noqa: TC003 - pydantic reads annotations
from typing import Annotated, Any

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import Column, ForeignKey, MetaData, Numeric, String, Table, Text, select
from sqlalchemy.dialects.mysql import BIGINT
from sqlalchemy.ext.asyncio import create_async_engine

metadata = MetaData()
accounts = Table(
    "accounts",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("balance", Numeric(30, 2), nullable=False),
    Column("version", BIGINT, nullable=False),
)
ledger = Table(
    "ledger",
    metadata,
    Column("id", BIGINT, primary_key=True, autoincrement=True),
    Column("account_id", String(255), ForeignKey(accounts.c.id), nullable=False),
    Column("description", String(50), nullable=False),
    Column("amount", Numeric(30, 2), nullable=False),
)
outbox = Table(
    "outbox",
    metadata,
    Column("id", BIGINT, primary_key=True, autoincrement=True),
    Column("type", String(50), nullable=False),
    Column("payload", Text, nullable=False),
)
answers = Table(
    "answers",
    metadata,
    Column("account_id", String(255), ForeignKey(accounts.c.id), primary_key=True),
    Column("idempotency_key", String(255), primary_key=True),
    Column("answer", Text, nullable=False),
)
# As many as requests come at once: who waits for a connection waits twice.
engine = create_async_engine(os.environ["BY_HAND_DATABASE"], pool_size=32, max_overflow=0)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    yield
    await engine.dispose()


api = FastAPI(lifespan=lifespan)


class Deposit(BaseModel):
    amount: Annotated[Decimal, Field(gt=0, max_digits=30, decimal_places=2)]


@api.post("/accounts/{account_id}")
async def open_account(account_id: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(accounts.insert().values(id=account_id, balance=0, version=1))


@api.post("/accounts/{account_id}/deposits")
async def deposit(
    account_id: str, body: Deposit, idempotency_key: Annotated[str, Header(max_length=255)]
) -> dict[str, Any]:
    async with engine.begin() as connection:
        one = accounts.c.id == account_id
        account = (
            await connection.execute(select(accounts).where(one).with_for_update())
        ).one_or_none()
        if account is None:
            raise HTTPException(404)
        mine = answers.c.account_id == account_id
        known = select(answers.c.answer).where(mine, answers.c.idempotency_key == idempotency_key)
        found = (await connection.execute(known)).scalar()
        if found is not None:
            before: dict[str, Any] = json.loads(found)
            return before | {"duplicate": True}
        balance, version = account.balance + body.amount, account.version + 1
        answer = {"version": version, "balance": str(balance)}
        entry = {"account_id": account_id, "amount": str(body.amount)}
        await connection.execute(
            accounts.update().where(one), {"balance": balance, "version": version}
        )
        await connection.execute(
            ledger.insert(), {"description": "deposit", **entry, "amount": body.amount}
        )
        await connection.execute(
            outbox.insert(),
            {"type": "CustomerDepositedMoney", "payload": json.dumps(entry | answer)},
        )
        await connection.execute(
            answers.insert(),
            {
                "account_id": account_id,
                "idempotency_key": idempotency_key,
                "answer": json.dumps(answer),
            },
        )
    return answer | {"duplicate": False}
