"""Gateways that wait a second only, and that die at the worst moment."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from cqrs_es.http import Gateway, requests, serving
from tests.apps.web import app, who

if TYPE_CHECKING:
    from cqrs_es.messages import CommandMessage, Outcome

if os.environ.get("TEST_HASTY"):
    for module, name in ((requests, "BODY_SECONDS"), (serving, "HEAD_SECONDS")):
        setattr(module, name, 1.0)


class Dying(Gateway):
    """Is killed when a command is committed, before anybody is told."""

    async def outcome_of(
        self, message: CommandMessage, seconds: float = requests.WAIT_SECONDS
    ) -> Outcome | None:
        """Have it decided, and die."""
        outcome = await super().outcome_of(message, seconds)
        if outcome is not None and outcome.accepted:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome


gateway = Gateway(app, authorize=who)
dying = Dying(app, authorize=who)
