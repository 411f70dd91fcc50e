"""The sample that authors are shown works as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "typing" / "design_sample.py"


def test_the_sample_runs() -> None:
    """Its application is complete, and the scenario at its end passes."""
    made = runpy.run_path(str(SAMPLE))
    made["app"].registry.check()
    assert list(made["app"].registry.aggregates) == ["account"]
    assert list(made["app"].registry.projections) == ["ledger"]
