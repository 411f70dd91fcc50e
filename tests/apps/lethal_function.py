"""Commands that end their process, as a function; it waits for less before it tries one again."""

from __future__ import annotations

from cqrs_es import serverless
from cqrs_es.runtime import redelivery
from tests.apps.lethal import app

redelivery.WAIT_SECONDS = 0.01  # type: ignore[misc] # for this process
handler = serverless.handler(app)
