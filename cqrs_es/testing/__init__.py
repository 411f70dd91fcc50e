"""Test kits for authors: `Scenario` for an aggregate's rules, `TestApp` for the whole."""

from cqrs_es.testing.app import TestApp
from cqrs_es.testing.clock import FakeClock
from cqrs_es.testing.decision import Decision
from cqrs_es.testing.scenario import ReactorScenario, Scenario

__all__ = ["Decision", "FakeClock", "ReactorScenario", "Scenario", "TestApp"]
