"""Gateways that wait as short as they are told to, and that die at the worst moment."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from cqrs_es.http import Gateway, events, requests, serving
from tests.apps.web import app, who

if TYPE_CHECKING:
    from cqrs_es.messages import CommandMessage, Outcome

if "TEST_HASTY" in os.environ:
    for module, name in (
        (requests, "BODY_SECONDS"),
        (serving, "HEAD_SECONDS"),
        (serving, "WRITE_SECONDS"),
        (events, "WRITE_SECONDS"),
    ):
        setattr(module, name, float(os.environ["TEST_HASTY"]))


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
