"""The README's tour runs as it stands and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from pathlib import Path


def fenced(language: str) -> list[str]:
    text = (PROJECT / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_tour_prints_what_it_says(tmp_path: Path) -> None:
    """The code blocks of the tour, one after another, print the text block."""
    script = tmp_path / "tour.py"
    script.write_text("\n".join(fenced("python")))
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == fenced("text")[0]


def test_every_file_it_names_is_there() -> None:
    """Paths in the README lead somewhere."""
    text = (PROJECT / "README.md").read_text()
    named = set(re.findall(r"`((?:cqrs_es|domain|worker|projectors|docs|examples)/[\w/.]*)`", text))
    assert named
    assert [path for path in sorted(named) if not (PROJECT / path).exists()] == []
