"""Contenders that are not of this project's environment: made when they are first needed.

Where the means are missing, a sentence says so, and the contender is left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.measuring import PROJECT

HERE: Final = Path(__file__).parent
ENVIRONMENT: Final = PROJECT / ".venv/celery"


def celery_python() -> Path | None:
    """Return the Python of an environment with Celery, as `requirements.txt` pins it."""
    python, pins = ENVIRONMENT / "bin/python", HERE / "by_queue/requirements.txt"
    uv = [sys.executable, "-m", "uv"]
    made = _run(
        [*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, ENVIRONMENT],
        [*uv, "pip", "install", "--quiet", "--python", python, "--requirement", pins],
    )
    return python if made else None


def crates(*, quick: bool) -> Path | None:
    """Return the program of `rust/`, made by cargo as its lock file has it.

    That takes minutes: who has none and is `quick` does without.
    """
    target = PROJECT / "build/rust"
    program = target / "release/bank"
    if quick and not program.exists():
        return None
    build: list[str | Path] = ["cargo", "build", "--quiet", "--release", "--locked"]
    where: list[str | Path] = ["--target-dir", target, "--manifest-path", HERE / "rust/Cargo.toml"]
    return program if _run([*build, *where]) else None


def _run(*commands: list[str | Path]) -> bool:
    for command in commands:
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            print(f"A contender is left out, since there is no {command[0]}.")
            return False
        if done.returncode != 0:
            print(f"A contender is left out, since this failed: {command}\n{done.stderr}")
            return False
    return True
