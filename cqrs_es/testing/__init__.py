"""Test kits for authors: see `Scenario`."""

from cqrs_es.testing.decision import Decision
from cqrs_es.testing.scenario import Scenario

__all__ = ["Decision", "Scenario"]
