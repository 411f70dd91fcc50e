"""The bank as functions of AWS Lambda: `worker.serverless.handler`, for every kind of event."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es import serverless
from cqrs_es.http import Action, Gateway
from worker import http
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request


def who(request: Request, action: Action) -> Mapping[str, str]:
    """Let in whom IAM has let in, as deploy/aws has it; else who shows a token of the bank's."""
    context = request.scope["aws.event"]["requestContext"]
    signed = context.get("authorizer", {}).get("iam")
    if signed is None:
        return http.who(request, action)
    return {"principal": signed["userArn"]}


handler = serverless.handler(app, gateway=Gateway(app, authorize=who))
