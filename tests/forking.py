"""Processes forked from one that has imported what they need.

They start in a moment, also by the dozen and where others are at work, so that there can be a
kill every second.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING

from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.process import BaseProcess
    from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("cqrs_es.cli.main", "cqrs_es.service", "tests.transfers", "tests.apps.users"),
        *(f"cqrs_es.stores.{store}.database" for store in ("mysql", "postgres", "sqlite")),
        "cqrs_es.stores.dynamodb.storage",
        *("cqrs_es.brokers.redis.broker", "cqrs_es.brokers.amqp.broker"),
    ]
)


def fork(
    call: Callable[[list[str]], object],
    *arguments: object,
    environment: Mapping[str, str],
    output: Path,
) -> BaseProcess:
    """Start a process that makes a call and writes to a file; it ends with this one."""
    made = _context.Process(
        target=_run,
        args=(call, [str(each) for each in arguments], dict(environment), str(output)),
        daemon=True,
    )
    made.start()
    return made


def _run(
    call: Callable[[list[str]], object],
    arguments: list[str],
    environment: Mapping[str, str],
    output: str,
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(PROJECT)
    os.environ.update(environment)
    call(arguments)
