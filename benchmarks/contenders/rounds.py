"""What a contender's process does: a round for each line that it reads, and its figures as JSON.

Only the standard library, and nothing of this project: a contender may be of another commit.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Command: TypeAlias = dict[str, Any]
"""A command message of the bank, as `docs/contract.md` has it."""
Round: TypeAlias = Callable[[Sequence[Command]], Awaitable[int]]
"""Executes commands one after the other; returns how many were accepted."""


async def serve(run: Round) -> None:
    """Read the path of a file with commands, execute them, write what it cost; until the end."""
    gc.freeze()  # a service's process does the same
    while path := sys.stdin.readline().strip():
        commands = json.loads(Path(path).read_text())
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        accepted = await run(commands)
        spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps(spent | {"accepted": accepted}), flush=True)
