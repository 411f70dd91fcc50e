"""Every benchmark still works; what it measures is looked at by people."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from benchmarks import charts
from tests.bank_data import PROJECT
from tests.servers import installed

if TYPE_CHECKING:
    from pathlib import Path

NEEDS = {
    "one_at_a_time": ["mariadbd", "initdb"],
    "latency": ["mariadbd", "redis-server"],
    "queue": ["mariadbd", "redis-server"],
    "following": ["mariadbd", "redis-server"],
    "http": ["mariadbd", "redis-server"],
    "growth": ["mariadbd"],
}
OPTIONS = {
    "one_at_a_time": ["--together", "7"],
    "queue": ["--workers", "2"],
    "following": ["--subjects", "relay"],
}
# Who must be measured beside this framework.
BESIDE = {
    "one_at_a_time": {"eventsourcing"},
    "queue": {"2 workers", "celery", "asyncio"},
    "following": {"by driver", "publishing only"},
    "http": {"by hand"},
    "growth": {"empty", "10 events", "one aggregate"},
}
CRATES = {
    "one_at_a_time": {"mysql-es", "postgres-es"},
    "queue": {"mysql-es"},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NEEDS)
def test_a_benchmark_works(name: str, tmp_path: Path) -> None:
    """Each contender does its rounds, all with the same results, and the figures are written."""
    for program in NEEDS[name]:
        if program != "initdb":  # it is not on the path
            installed(program)
    found = tmp_path / "found.json"
    arguments = [f"benchmarks.{name}", "--quick", "--json", str(found), *OPTIONS.get(name, ())]
    subprocess.run([sys.executable, "-m", *arguments], cwd=PROJECT, check=True, timeout=240)
    measured = json.loads(found.read_text())
    assert measured["on"]["msgspec"]
    drawn = ET.fromstring(charts.chart(measured))  # noqa: S314 - our own
    texts = {element.text for element in drawn.iter()}
    if name == "latency":
        assert set(measured["milliseconds"]) | {"latency: outcome"} <= texts
        for it in measured["milliseconds"].values():
            assert it["idle"]
            assert all(it["p50"][what] and it["p99"][what] for what in ("outcome", "topic", "view"))
        return
    built = (PROJECT / "build/rust/release/bank").exists() and shutil.which("cargo")
    crates = CRATES.get(name, set[str]()) if built else set[str]()
    contenders = {who for found in measured["microseconds"].values() for who in found}
    assert contenders >= BESIDE[name] | crates
    assert contenders <= texts
    for figures in measured["microseconds"].values():
        assert all(rounds["wall"] and rounds["cpu"] for rounds in figures.values())
