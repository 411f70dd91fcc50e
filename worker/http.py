"""The bank's gateway: who may ask it over HTTP. `cqrs-es serve` serves it."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from cqrs_es.http import Action, Denied, Gateway, Unknown
from worker.app import app, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request


def who(request: Request, action: Action) -> Mapping[str, str]:
    """Let in who shows a token that the bank has given out; readers may send no commands."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    shown = hashlib.sha256(token.strip().encode()).digest()
    for known, name in settings.http_tokens.items():
        if scheme.lower() == "bearer" and hmac.compare_digest(
            shown, hashlib.sha256(known.encode()).digest()
        ):
            if action.kind == "command" and name.startswith("reader"):
                raise Denied("readers send no commands")
            return {"principal": name}
    raise Unknown


# Without tokens it serves this machine alone, and everybody there.
gateway = Gateway(app, authorize=who if settings.http_tokens else None, via=settings.http_via)
