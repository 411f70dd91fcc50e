"""A process killed at each instant that matters, with the whole bank under load; judged at the end.

`make crashes` hits every instant many times (`CQRS_ES_TEST_CRASHES`) on every pair of servers,
`make test` once on one pair.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.apps.dying_bank import INSTANTS
from tests.faults.test_chaos import chaos
from tests.history.checker import assert_promises_held
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.faults.test_chaos import Chaos

log = logging.getLogger(__name__)

CRASHES = int(os.environ.get("CQRS_ES_TEST_CRASHES", "0"))
ROLES = ("worker", "relay", "projector", "rebuild")
VIEWS = ("account_query", "bank_totals")
PATIENCE_SECONDS = 100.0  # within which a process has come to its instant

pytestmark = pytest.mark.timeout(CRASHES * 240 + 600)


class Dying:
    """Processes of one role, one after another, each of which dies at an instant.

    The next one is started once others have answered what the last one may have had in hand: a
    command that two processes die of alone fails, since nobody can tell that it is innocent (G9).
    """

    def __init__(self, made: Chaos, role: str, instants: list[str], rng: random.Random) -> None:
        self._bank, self._role, self._rng = made.bank, role, rng
        self._senders = made.senders
        self._in_hand: list[set[str]] = [set() for _ in made.senders]
        self._left = instants
        self._process: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self._instant = ""
        self.hits: Counter[str] = Counter()

    def ended(self) -> bool:
        """Look after the one that lives; tell whether all have died."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                waited = time.monotonic() - self._since
                assert waited < PATIENCE_SECONDS, f"nobody comes to {self._instant!r}"
                return False
            assert code == -signal.SIGKILL, self._bank.log_of(self._process)[-3000:]
            self.hits[self._instant] += 1
            self._process = None
            self._in_hand = [sender.unanswered() for sender in self._senders]
        for sender, ids in zip(self._senders, self._in_hand, strict=True):
            if ids & sender.unanswered():
                return False
        if self._left:
            self._instant, self._since = self._left.pop(), time.monotonic()
            self._process = self._start(self._instant)
        return self._process is None

    def _start(self, instant: str) -> subprocess.Popen[bytes]:
        number = 1 if self._role == "rebuild" else self._rng.randint(1, 4)
        dies_at = {"DIES_AT": f"{instant} {number}"}
        dying = replace(
            self._bank, app="tests.apps.dying_bank:app", settings=self._bank.settings | dies_at
        )
        return dying.start(*self._arguments())

    def _arguments(self) -> tuple[str, ...]:
        if self._role == "rebuild":
            return ("rebuild", self._rng.choice(VIEWS))
        return (self._role,)


def crash(store: str, broker: str, folder: Path, times: int) -> None:
    """Hit every instant so many times, in an order of a seed's, and judge the history."""
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s on %s and %s", seed, store, broker)
    rng = random.Random(seed)
    with chaos(store, broker, folder, seed, copies=1) as made:
        dying: list[Dying] = []
        for role in ROLES:
            instants = [name for name, (of, *_) in INSTANTS.items() if of == role] * times
            rng.shuffle(instants)
            dying.append(Dying(made, role, instants, rng))
        until(
            lambda: sum(not each.ended() for each in dying) == 0,  # looks after each of them
            "not all have died",
            within_seconds=PATIENCE_SECONDS * times * 6,
        )
        hits = sum((each.hits for each in dying), Counter[str]())
        log.warning("hit %s", dict(hits))
        assert hits == dict.fromkeys(INSTANTS, times)
        for view in VIEWS:
            made.bank.call("rebuild", view)
        drained = made.drain()
        history = made.recorded()
        log.warning(
            "%s commands, %s events; drained in %.1f s",
            len(history.outcomes),
            len(history.events),
            drained,
        )
        assert_promises_held(history)
        codes = made.all_stop()
        assert codes == [0] * len(codes)


def test_each_instant_once(tmp_path: Path) -> None:
    """Killed where it hurts most, a process breaks no promise."""
    crash("mysql", "redis", tmp_path, 1)


@pytest.mark.skipif(not CRASHES, reason="make crashes runs it: it takes minutes")
@pytest.mark.parametrize("broker", ["redis", "amqp"])
@pytest.mark.parametrize("store", ["mysql", "postgres"])
def test_each_instant_often(store: str, broker: str, tmp_path: Path) -> None:
    """As once, on every pair of servers."""
    crash(store, broker, tmp_path, CRASHES)
