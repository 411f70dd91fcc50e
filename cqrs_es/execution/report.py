"""What an executor has done, in numbers; and one log line for each batch that says it."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import astuple

from cqrs_es.messages import Status
from cqrs_es.telemetry.lines import get_logger, reads_info
from cqrs_es.telemetry.metrics import NO_METER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from cqrs_es.execution.stages import Submission
    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.telemetry.metrics import Meter, Phase

_NAMES: Final = {status: status.value for status in Status}
_NOT_TIMED: Final = nullcontext()
log = get_logger("cqrs_es.execution")

WORRYING_CONFLICTS: Final = 100
"""In a row: two processes that decide for one aggregate do not miss each other so often."""

PHASES: Final[tuple[Phase, ...]] = ("lookup", "load", "decide", "append")


class Counts(msgspec.Struct):
    """What an executor has done since it was started."""

    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    duplicate: int = 0
    events: int = 0
    batches: int = 0
    conflicts: int = 0

    def count(self, name: str, events: int) -> None:
        """Count an answer: by its status, or as a duplicate."""
        setattr(self, name, getattr(self, name) + 1)
        self.events += events

    def since(self, before: Counts) -> Counts:
        """Return what was done since another count."""
        pairs = zip(astuple(self), astuple(before), strict=True)
        return Counts(*(now - then for now, then in pairs))


class Reporter:
    """Counts what is done for whoever asks, for the meter, and for a line per batch.

    A line has what was done since the last one: an append, and what was
    answered without. `…_seconds` is the time that a phase took. Reading is
    that of the batch that is prepared meanwhile; of handlers, which run side
    by side, it is the longest chain of one aggregate.
    """

    def __init__(self, monotonic: Callable[[], float], meter: Meter) -> None:
        self._monotonic = monotonic
        self._meter = meter
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.counts = Counts()
        self._reported = Counts()
        self._read = reads_info(log)

    def timing(self, phase: Phase) -> AbstractContextManager[None]:
        """Count a block's time as that of a phase, where anybody wants to know."""
        if self._meter is NO_METER and not self._read:
            return _NOT_TIMED
        return _Timing(phase, self._meter, self._monotonic, self._seconds)

    def answered(self, message: CommandMessage, outcome: Outcome) -> None:
        """Count an answer."""
        name = "duplicate" if outcome.duplicate else _NAMES[outcome.status]
        self.counts.count(name, 0 if outcome.duplicate else len(outcome.events))
        self._meter.command(message.aggregate_type, message.type, name)

    def refused(self, message: CommandMessage, outcome: Outcome) -> None:
        """Count the rejection of a command that an event or a timer has caused; say which."""
        self._meter.refused(message.aggregate_type)
        error = outcome.error
        log.info("refused", **ids_of(message), code=None if error is None else error.code)

    def conflict(self, first: Submission) -> None:
        """Count an aggregate whose commands are decided again; warn where that does not end."""
        self.counts.conflicts += 1
        self._meter.conflict()
        conflicts = first.conflicts + 1
        if conflicts % WORRYING_CONFLICTS == 0:
            log.warning("conflicts do not end", **ids_of(first.message), conflicts=conflicts)

    def committed(self, batch: Sequence[Sequence[Submission]]) -> None:
        """Count a batch, by aggregate, and report it."""
        self.counts.batches += 1
        self._meter.batch(sum([len(each) for each in batch]))
        self.report(batch)

    def report(self, batch: Sequence[Sequence[Submission]]) -> None:
        """Say what was done since the last report."""
        reported, self._reported = self._reported, copy.copy(self.counts)
        self._read = reads_info(log)
        if not self._read:
            return
        done = self.counts.since(reported)
        spent = self._seconds.copy()
        for phase in PHASES:
            self._seconds[phase] = 0.0
        seconds = {f"{phase}_seconds": round(each, 4) for phase, each in spent.items()}
        log.info(
            "batch done",
            **_ids(batch),
            accepted=done.accepted,
            rejected=done.rejected,
            failed=done.failed,
            duplicate=done.duplicate,
            events=done.events,
            conflicts=done.conflicts,
            aggregates=len(batch),
            **seconds,
        )


class _Timing:
    """A block that is timed."""

    __slots__ = ("_meter", "_monotonic", "_phase", "_seconds", "_started")

    def __init__(
        self,
        phase: Phase,
        meter: Meter,
        monotonic: Callable[[], float],
        seconds: dict[Phase, float],
    ) -> None:
        self._phase: Phase = phase
        self._meter = meter
        self._monotonic = monotonic
        self._seconds = seconds

    def __enter__(self) -> None:
        self._started = self._monotonic()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        spent, before = self._monotonic() - self._started, self._seconds[self._phase]
        longest = self._phase == "decide"
        self._seconds[self._phase] = max(before, spent) if longest else before + spent
        self._meter.took(self._phase, spent)


def _ids(batch: Sequence[Sequence[Submission]]) -> dict[str, str]:
    """Say which command it was, where it was one."""
    if len(batch) != 1 or len(batch[0]) != 1:
        return {}
    return ids_of(batch[0][0].message)


def ids_of(message: CommandMessage) -> dict[str, str]:
    """Return what a line about one command is found by."""
    ids = {
        "command_id": message.id,
        "command": message.type,
        "aggregate": str(message.key),
    }
    correlation_id = message.metadata.get("correlation_id")
    return ids if correlation_id is None else ids | {"correlation_id": correlation_id}
