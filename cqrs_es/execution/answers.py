"""Who waits for which outcome: one answer for all that ask with the same command id (DESIGN G2)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cqrs_es.execution.work import id_reused
from cqrs_es.messages import Outcome, Status

if TYPE_CHECKING:
    from cqrs_es.execution.report import Reporter
    from cqrs_es.execution.work import Job
    from cqrs_es.ports.store import StoredOutcome


class Answers:
    """The commands in hand: each is decided once, and those with its id follow it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._leaders: dict[str, Job] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._leaders)

    async def wait_idle(self) -> None:
        """Wait until every command is answered."""
        await self._idle.wait()

    def admit(self, job: Job) -> bool:
        """Take a job in; False where it only follows one with its id and is not to be decided."""
        leader = self._leaders.get(job.message.id)
        if leader is not None:
            leader.followers.append(job)
            return False
        self._leaders[job.message.id] = job
        self._idle.clear()
        return True

    def give(self, job: Job, outcome: Outcome) -> list[Job]:
        """Give a job its outcome, and those that follow it theirs.

        Returns the followers that are to be decided after all: where the id was
        another command's, theirs may be the content that it belongs to.
        """
        self._forget(job)
        self._resolve(job, outcome)
        if outcome.error is not None and outcome.error.code == "id_reused":
            return job.followers
        for follower in job.followers:
            if follower.content_hash == job.content_hash:
                self._resolve(follower, replace(outcome, duplicate=True))
            else:
                self._resolve(follower, id_reused(follower.message))
        return []

    def fail(self, job: Job, exc: Exception) -> None:
        """Hand an error that is not the command's own to whoever asked, unless it is answered."""
        if self._leaders.get(job.message.id) is not job:
            return
        self._forget(job)
        for asker in [job, *job.followers]:
            if not asker.answer.done():
                asker.answer.set_exception(exc)

    def cancel_all(self) -> None:
        """Cancel what is not answered."""
        for job in self._leaders.values():
            for asker in [job, *job.followers]:
                asker.answer.cancel()

    def _resolve(self, job: Job, outcome: Outcome) -> None:
        self._reporter.answered(job.message, outcome)
        if not job.answer.done():
            job.answer.set_result(outcome)

    def _forget(self, job: Job) -> None:
        self._leaders.pop(job.message.id, None)
        if not self._leaders:
            self._idle.set()


def known_outcome(job: Job, stored: StoredOutcome | None) -> Outcome | None:
    """Answer a job by what is stored under its id; None when it is to be decided.

    What is found is a duplicate's, unless it is our own late news.
    """
    if stored is None:
        return None
    if stored.content_hash != job.content_hash:
        return id_reused(job.message)
    if job.retrying and stored.outcome.status is Status.FAILED:
        return None
    return replace(stored.outcome, duplicate=not job.uncertain)
