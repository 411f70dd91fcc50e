"""The demo of the Rust crate cqrs-es, route for route: `uvicorn examples.rust_demo:api`.

curl -i http://127.0.0.1:8000/account/A-1 --json '{"OpenAccount": {"account_id": "A-1"}}'
curl -i http://127.0.0.1:8000/account/A-1 --json '{"DepositMoney": {"amount": 1000.0}}'
curl -i http://127.0.0.1:8000/account/A-1
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import TYPE_CHECKING

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from cqrs_es.http import Gateway
from cqrs_es.messages import CommandMessage
from cqrs_es.types import new_command_id
from projectors.account_query import AccountQuery
from worker.app import app

if TYPE_CHECKING:
    from starlette.requests import Request

gateway = Gateway(app)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Open the bank, and keep its views beside."""
    async with app.open() as opened, opened.running(), gateway.on(opened):
        yield


async def command(request: Request) -> Response:
    """Decide `{"DepositMoney": {"amount": 1000.0}}`: 204, or 400 with the error's text."""
    account = request.path_params["account_id"]
    try:  # amounts exactly as they are written
        ((name, payload),) = json.loads(await request.body(), parse_float=str).items()
    except (ValueError, AttributeError):
        return Response("a command is {name: {field: value}}", 400)
    message = CommandMessage(new_command_id(), name, "account", account, payload)
    outcome = await gateway.outcome_of(message)
    if outcome is None:
        return Response("no outcome yet", 503)
    if outcome.error is not None:
        return Response(outcome.error.message, 400)
    await gateway.opened.wait_for("account_query", outcome)  # there it is written by then
    return Response(status_code=204)


async def query(request: Request) -> Response:
    """Return the view with its amounts as numbers; 404 without a body where there is none."""
    view = await gateway.opened.view(AccountQuery, request.path_params["account_id"])
    if view is None:
        return Response(status_code=404)
    return Response(orjson.dumps(view, default=_number), media_type="application/json")


def _number(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError


api = Starlette(
    routes=[
        Route("/account/{account_id}", command, methods=["POST"]),
        Route("/account/{account_id}", query, methods=["GET"]),
    ],
    lifespan=lifespan,
)
