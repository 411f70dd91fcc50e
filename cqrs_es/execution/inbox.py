"""The commands that an executor holds, and who waits for their outcomes.

A command's way; an aggregate's commands go it together, in the order in which
they were submitted, and its next ones wait until they are released:

    add ─▶ waiting ─take─▶ being decided ─put─▶ decided ─take_decided─▶ being appended ─▶ answered
              ▲                                                               │
              └───────────────── release: decide these again ─────────────────┘

A command whose id is held already does not go this way: it is given the
outcome of the first, as a duplicate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from msgspec import structs

from cqrs_es import errors
from cqrs_es.execution.policy import MAX_APPEND_BYTES
from cqrs_es.execution.report import ids_of
from cqrs_es.messages import Outcome, Status, id_reused, is_reused
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cqrs_es.execution.report import Reporter
    from cqrs_es.execution.stages import Answer, Decided, Submission
    from cqrs_es.ports.store import StoredOutcome
    from cqrs_es.types import AggregateKey

log = get_logger("cqrs_es.execution")


class Inbox:
    """Holds commands from their submission to their answer."""

    def __init__(
        self, batch_size: int, reporter: Reporter, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        """`on_ready` is called whenever something can be taken that could not before."""
        self._batch_size = batch_size
        self._reporter = reporter
        self._on_ready = on_ready
        # Who waits for each command's outcome; the first is the one that is decided.
        self._askers: dict[str, list[Submission]] = {}
        self._begun: set[Answer] = set()
        self._waiting: dict[AggregateKey, deque[Submission]] = {}
        self._ready: deque[AggregateKey] = deque()
        self._busy: set[AggregateKey] = set()
        self._decided: list[Decided] = []
        self._decided_commands = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Count the different commands that are not answered yet."""
        return len(self._askers)

    async def wait_idle(self) -> None:
        """Wait until every command is answered."""
        await self._idle.wait()

    def holds(self, submission: Submission) -> bool:
        """Tell whether a command is here to be decided: not answered, and no follower."""
        askers = self._askers.get(submission.message.id)
        return askers is not None and askers[0].answer is submission.answer

    # --- Waiting, by aggregate -----------------------------------------------

    def add(self, submission: Submission) -> None:
        """Take a command in, at the end of its aggregate's line."""
        askers = self._askers.get(submission.message.id)
        if askers is not None:
            askers.append(submission)
            return
        self._askers[submission.message.id] = [submission]
        self._idle.clear()
        key = submission.message.key
        line = self._waiting.get(key)
        if line is None:
            line = self._waiting[key] = deque()
            if key not in self._busy:
                self._become_ready(key)
        line.append(submission)

    def take(self) -> list[tuple[Submission, ...]]:
        """Return what is to be decided: nothing while there is no room for what is decided.

        It is at most a batch, by aggregate, first come first served. Those
        aggregates are busy from then on, until they are released.
        """
        taken: list[tuple[Submission, ...]] = []
        left = self._batch_size if self._has_room else 0
        while left > 0 and self._ready:
            key = self._ready.popleft()
            if key in self._waiting and key not in self._busy:
                self._busy.add(key)
                taken.append(self._take_line(key, left))
                left -= len(taken[-1])
        return taken

    @property
    def is_ready(self) -> bool:
        """Whether there may be something to take."""
        return bool(self._ready)

    @property
    def _has_room(self) -> bool:
        return self._decided_commands < self._batch_size

    def _take_line(self, key: AggregateKey, limit: int) -> tuple[Submission, ...]:
        line = self._waiting[key]
        most = 1 if line[0].alone else limit
        if len(line) <= most:
            return tuple(self._waiting.pop(key))
        return tuple([line.popleft() for _ in range(most)])

    def release(self, key: AggregateKey, again: Sequence[Submission] = ()) -> None:
        """Let an aggregate's next commands be taken, first those that are decided again."""
        self._busy.discard(key)
        line = self._waiting.get(key)
        if line is None and not again:
            return
        before = [structs.replace(each, again=True) for each in again if self.holds(each)]
        for each in before:
            self._begun.discard(each.answer)
            self._askers[each.message.id][0] = each
        if before:
            if line is None:
                line = self._waiting[key] = deque()
            line.extendleft(reversed(before))
        if line:
            self._become_ready(key)

    def _become_ready(self, key: AggregateKey) -> None:
        self._ready.append(key)
        self._on_ready()

    # --- Decided -------------------------------------------------------------

    def begin(self, submission: Submission) -> bool:
        """Note that a command's handler is about to run; False where it was withdrawn."""
        if not self.holds(submission):
            return False
        self._begun.add(submission.answer)
        return True

    def put(self, decided: Decided) -> None:
        """Add what is decided."""
        self._decided.append(decided)
        self._decided_commands += len(decided.submissions)

    def take_decided(self) -> list[Decided]:
        """Return what goes into one append: of what is decided, at least one."""
        if not self._decided:
            return []
        fits = 1 if len(self._decided) == 1 else self._how_many_fit()
        taken, self._decided = self._decided[:fits], self._decided[fits:]
        self._decided_commands -= sum([len(each.submissions) for each in taken])
        if self._ready and self._has_room:
            self._on_ready()
        return taken

    def _how_many_fit(self) -> int:
        commands = size = 0
        for index, each in enumerate(self._decided):
            commands += len(each.submissions)
            size += each.size
            if index and (commands > self._batch_size or size > MAX_APPEND_BYTES):
                return index
        return len(self._decided)

    # --- Answered ------------------------------------------------------------

    def answer(self, submission: Submission, outcome: Outcome) -> None:
        """Give a command its outcome, and those that follow it theirs.

        Where the id was another command's, the followers are decided after all:
        theirs may be the content that it belongs to.
        """
        first, *followers = self._forget(submission)
        self._resolve(first, outcome)
        if is_reused(outcome):
            for follower in followers:
                self.add(follower)
            return
        for follower in followers:
            if follower.content_hash == submission.content_hash:
                self._resolve(follower, replace(outcome, duplicate=True))
            else:
                self._resolve(follower, id_reused(follower.message))

    def fail(self, submission: Submission, exc: Exception) -> None:
        """Hand an error that is not the command's own to whoever waits, unless it is answered."""
        if not self.holds(submission):
            return
        for asker in self._forget(submission):
            if not asker.answer.done():
                asker.answer.set_exception(exc)

    def withdraw(self, answers: Collection[Answer]) -> None:
        """Hand commands back that are not begun: their answers raise `Withdrawn`."""
        unwanted = set(answers)
        for askers in list(self._askers.values()):
            if askers[0].answer not in self._begun and all(a.answer in unwanted for a in askers):
                self.fail(askers[0], errors.Withdrawn())
        for key, line in list(self._waiting.items()):
            left = deque(each for each in line if self.holds(each))
            if left:
                self._waiting[key] = left
            else:
                del self._waiting[key]

    def cancel_all(self) -> None:
        """Cancel what is not answered."""
        for askers in self._askers.values():
            for asker in askers:
                asker.answer.cancel()

    def _resolve(self, submission: Submission, outcome: Outcome) -> None:
        self._reporter.answered(submission.message, outcome)
        if not submission.answer.done():
            submission.answer.set_result(outcome)

    def _forget(self, submission: Submission) -> list[Submission]:
        self._begun.discard(submission.answer)
        askers = self._askers.pop(submission.message.id)
        if not self._askers:
            self._idle.set()
        return askers


# --- Outcomes that are not decided ------------------------------------------


def known_outcome(submission: Submission, stored: StoredOutcome | None) -> Outcome | None:
    """Answer a command by what is stored under its id; None when it is to be decided.

    What is found is a duplicate's, unless it was committed by our own append
    whose answer was lost.
    """
    if stored is None:
        return None
    if stored.content_hash != submission.content_hash:
        if submission.scheduled is not None:
            # Its row goes, and nobody waits for this answer.
            log.error("command id reused: not decided", **ids_of(submission.message))
        return id_reused(submission.message)
    if submission.retrying and stored.outcome.status is Status.FAILED:
        return None
    return replace(stored.outcome, duplicate=not submission.uncertain)
