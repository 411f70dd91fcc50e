"""Asking a process how it is, as an orchestrator or Prometheus does."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import Any

import orjson

from tests.measured import Samples, parsed

SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A process's health port."""

    port: int

    def get(self, path: str, seconds: float = SECONDS, method: str = "GET") -> tuple[int, bytes]:
        """Return status and body; raises `OSError` where nobody answers in time."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def listening(self) -> bool:
        """Tell whether anybody answers."""
        try:
            self.get("/live")
        except OSError:
            return False
        return True

    @property
    def live(self) -> bool:
        """Whether /live says 200."""
        return self.get("/live")[0] == 200

    @property
    def reasons(self) -> list[str]:
        """Why the process is not ready; the status goes with it."""
        status, body = self.get("/ready")
        found: dict[str, Any] = orjson.loads(body)
        assert found["ready"] == (status == 200) == (not found["reasons"])
        assert status in {200, 503}
        reasons: list[str] = found["reasons"]
        return reasons

    def unready_for(self, words: str) -> bool:
        """Tell whether one of the reasons has these words."""
        return any(words in reason for reason in self.reasons)

    @property
    def samples(self) -> Samples:
        """What /metrics shows."""
        status, body = self.get("/metrics")
        assert status == 200
        return parsed(body.decode())
