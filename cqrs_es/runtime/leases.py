"""Keeping a process's fair share of a role's partitions leased, and running them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.execution.retry import backoff
from cqrs_es.ports.leases import Part, Standing
from cqrs_es.runtime.nudging import Reliance
from cqrs_es.runtime.waiting import unless
from cqrs_es.telemetry.lines import get_logger, put_on_lines
from cqrs_es.telemetry.metrics import NO_METER, Meter

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.leases import Lease, Leases, Member

log = get_logger("cqrs_es.runtime")

# When the next round comes, in parts of a lease. Where nudges tell who comes and leaves, and the
# store when a member that has died is gone, a round has only to renew, and looks at the members
# now and then. One that failed is made again soon: the store may be away for as long as is left
# of the safe part.
RENEW_PART: Final = 0.4
LOOK_PART: Final = 0.25
LOOK_ANYWAY_PART: Final = 2.0
AGAIN_PART: Final = 0.1
# Rounds that nudges ask for are this far apart.
APART_PART: Final = 0.05
# A lease is given up this part of its length after it was last renewed.
SAFE_PART_OF_LEASE: Final = 0.8
# Moments that are this close are one.
SAME_MOMENT_SECONDS: Final = 0.001
TOGETHER_SECONDS: Final = 0.02
# A member that has expired at one moment is gone a little later, however clocks are read.
GONE_SECONDS: Final = 0.01

# What no waiting ends: somebody has to mend the code, the view or the log.
_STUCK: Final = (
    errors.TooManyParked,
    errors.BrokenLog,
    errors.ViewFailed,
    errors.ViewLost,
    errors.ViewMisfit,
)

PartitionRunner: TypeAlias = "Callable[[Assignment], Awaitable[None]]"


def fair_share(members: Sequence[Member], owner: str, partitions: int) -> int:
    """Return how many partitions a member is to hold.

    Ranked by name, the first `partitions mod n` fit members hold one more than
    the rest. Unfit members hold none while there is a fit one.
    """
    fit = sorted(member.owner for member in members if member.fit)
    ranked = fit or sorted(member.owner for member in members)
    if owner not in ranked:
        return 0
    each, left_over = divmod(partitions, len(ranked))
    return each + (1 if ranked.index(owner) < left_over else 0)


class Assignment(msgspec.Struct, eq=False):
    """A partition to work on until `stopping` is set, by a lease; its task can be cancelled.

    `trouble` says why there is no progress. Whoever works on it takes that back,
    and notes how far it is: `position`, the last offset that a reader of the log
    is done with (None until it knows), or how many commands a worker has settled;
    `in_hand`, how many it has taken and not settled. `suspects` counts the due rows that
    a holder that died may have had in hand, None until somebody asks. `filling`: it
    fills a view anew.
    """

    lease: Lease
    stopping: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    trouble: str | None = None
    position: int | None = None
    in_hand: int = 0
    suspects: int | None = None
    filling: bool = False

    def reached(self, offset: int) -> None:
        """Note an offset as done with: progress."""
        self.position = offset
        self.went_well()

    def went_well(self) -> None:
        """Note progress, or that there is nothing to be done: the trouble is over."""
        self.trouble = None


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """Who takes part in which role, and how many partitions there are to be shared."""

    role: str
    owner: str
    partitions: int
    lease_seconds: float
    leased_as: str = ""
    """What the role is called in the store, where that is not its name."""


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """How a role stood at the last look, and when it was looked at and renewed."""

    part: Part
    standing: Standing
    looked_at: float
    gone_at: float
    renewed_at: float


class Rounds:
    """Makes one round for the store of those of a process's roles that come together.

    They do, since all of them wait for the same moments: see `until_next`. Where nudges are heard
    a round renews, or it looks at the members when they may have changed: when a nudge says so,
    when the first of the others would be gone, and now and then. Each is one request. Where they
    are not heard, or the store can't do it in one, all is done in each round.
    """

    def __init__(
        self,
        leases: Leases,
        clock: Clock,
        owner: str,
        lease_seconds: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make rounds; `changed` tells others that this process has come or given something up."""
        self._leases = leases
        self._clock = clock
        self._owner = owner
        self._seconds = lease_seconds
        self.changed = changed
        self._asked: list[tuple[Part, asyncio.Future[Standing]]] = []
        self._seen: dict[str, _Seen] = {}
        self._hinted_at = -math.inf
        self.hints: set[asyncio.Event] = set()
        """Set when a round is to be made at once: the roles', one each."""
        self.reliance = Reliance()

    def until_next(self, role: str) -> float:
        """Return how long it is until a role's next round."""
        now, seen = self._clock.monotonic(), self._seen.get(role)
        if seen is None:
            return self._renewal_after(now) - now
        return max(0.0, min(self._renewal_after(seen.renewed_at), self._look_at(seen)) - now)

    def renewed_at(self, role: str) -> float:
        """Return when the last renewal of a role was asked for."""
        return self._seen[role].renewed_at

    def _renewal_after(self, moment: float) -> float:
        """Return the next of the moments at which all roles renew."""
        every = self._seconds * (RENEW_PART if self._is_told else LOOK_PART)
        return every * (1 + (moment + SAME_MOMENT_SECONDS) // every)

    def _look_at(self, seen: _Seen) -> float:
        return min(seen.gone_at, seen.looked_at + self._seconds * LOOK_ANYWAY_PART)

    @property
    def _is_told(self) -> bool:
        """Whether it is known when to look, so that not every round has to."""
        known = all(seen.standing.expires_in is not None for seen in self._seen.values())
        return known and self.reliance.justified

    def hint(self) -> None:
        """Make a round now: members or leases have changed, or may have."""
        self._hinted_at = self._clock.monotonic()
        for hint in self.hints:
            hint.set()

    async def take_part(self, part: Part) -> Standing:
        """Take part in the round that is about to be made; who asks first makes it for all."""
        standing: asyncio.Future[Standing] = asyncio.get_running_loop().create_future()
        self._asked.append((part, standing))
        if len(self._asked) == 1:
            await self._make()
        return await standing

    async def _make(self) -> None:
        asked = self._asked
        try:
            try:
                await asyncio.sleep(0)  # the other roles wake at the same moment, or nearly so
                if len(asked) < len(self.hints):
                    await asyncio.sleep(TOGETHER_SECONDS)
            finally:
                self._asked = []
            standings = await self._standings([part for part, _ in asked])
        except BaseException as exc:
            cut_short = errors.StoreUnavailable("a lease round was cut short; the next will do")
            error = exc if isinstance(exc, errors.CqrsError) else cut_short
            for _, others in asked[1:]:
                if not others.done():
                    others.set_exception(error)
            raise
        for part, standing in asked:
            if not standing.done():
                standing.set_result(standings[part.role])

    async def _standings(self, parts: Sequence[Part]) -> Mapping[str, Standing]:
        now, told = self._clock.monotonic(), self._is_told
        seen = {part.role: self._seen.pop(part.role, None) for part in parts}
        standings = None
        if told and all(self._goes_on(part, seen[part.role]) for part in parts):
            known = {role: each for role, each in seen.items() if each is not None}
            standings = await self._gone_on(parts, known, now)
        if standings is None:
            standings = await self._leases.take_part(self._owner, parts, self._seconds)
            for part in parts:
                before, standing = seen[part.role], standings[part.role]
                self._seen[part.role] = self._looked(part, before, standing, now, now)
        return standings

    def _goes_on(self, part: Part, seen: _Seen | None) -> bool:
        """Tell whether the process takes part in a role as it did in the last round."""
        return seen is not None and seen.part.fit == part.fit and part.seconds == self._seconds

    async def _gone_on(
        self, parts: Sequence[Part], seen: Mapping[str, _Seen], now: float
    ) -> Mapping[str, Standing] | None:
        """Do what is due; return None where not all is as it was."""
        soon = now + SAME_MOMENT_SECONDS
        renewed_at = {role: each.renewed_at for role, each in seen.items()}
        if any(soon >= self._renewal_after(moment) for moment in renewed_at.values()):
            if not await self._leases.go_on(self._owner, parts, self._seconds):
                return None
            renewed_at = dict.fromkeys(seen, now)
        found = None
        if any(self._is_hinted(each) or soon >= self._look_at(each) for each in seen.values()):
            found = await self._leases.look(self._owner, parts)
            if found is None:
                return None
        for part in parts:
            before, at = seen[part.role], renewed_at[part.role]
            self._seen[part.role] = (
                replace(before, part=part, renewed_at=at)
                if found is None
                else self._looked(part, before, found[part.role], now, at)
            )
        return {
            part.role: replace(self._seen[part.role].standing, kept=part.held) for part in parts
        }

    def _is_hinted(self, seen: _Seen) -> bool:
        return seen.looked_at <= self._hinted_at

    def _looked(
        self, part: Part, before: _Seen | None, standing: Standing, now: float, renewed_at: float
    ) -> _Seen:
        """Note how a role stands; who has come without telling may not be the last to."""
        owners = {member.owner for member in standing.members}
        known = owners if before is None else {each.owner for each in before.standing.members}
        if owners - known and before is not None and not self._is_hinted(before):
            self.reliance.missed()
        expires_in = math.inf if standing.expires_in is None else standing.expires_in
        return _Seen(
            part=part,
            standing=standing,
            looked_at=now,
            gone_at=self._clock.monotonic() + expires_in + GONE_SECONDS,
            renewed_at=renewed_at,
        )


class LeaseKeeper:
    """A member of one role: holds its share of the partitions and runs each of them.

    `run_partition(assignment)` works until it is to stop, then settles what it
    has in hand and returns. It is cancelled when the lease is lost. When it
    raises, it is started again after a wait; `trouble` says why, until it notes
    progress. After `NeedsNewerCode` the member is unfit until its process is
    replaced. `stuck` is an error on some partition that somebody has to fix, not
    one that passes. What no partition can do without, `StoreUnusable`, ends the
    member. It has `joined` once it has announced itself to the others.
    """

    def __init__(
        self,
        leases: Leases,
        clock: Clock,
        run_partition: PartitionRunner,
        membership: Membership,
        meter: Meter = NO_METER,
        rounds: Rounds | None = None,
    ) -> None:
        self._leases = leases
        self._clock = clock
        self._run_partition = run_partition
        self._role, self._owner = membership.role, membership.owner
        self._leased_as = membership.leased_as or membership.role
        self._partitions = membership.partitions
        self._seconds = membership.lease_seconds
        self._meter = meter
        self._rounds = rounds or Rounds(leases, clock, self._owner, self._seconds)
        self._hint = asyncio.Event()
        self._announced: tuple[bool, float] | None = None
        self._lacking = False
        self._round_at = -math.inf
        self._running: dict[int, Assignment] = {}
        self._tasks = asyncio.TaskGroup()
        self.renewed_at = self._next_at = clock.monotonic()
        self._store_trouble: str | None = None
        self._draining = False
        self._stop: asyncio.Task[object] | None = None
        self._overdue: asyncio.Task[None] | None = None
        self.joined = False
        self.unfit: str | None = None
        self.stuck: errors.CqrsError | None = None

    @property
    def role(self) -> str:
        """The role that the member has."""
        return self._role

    @property
    def held(self) -> Collection[int]:
        """The partitions that this process works on."""
        return self._running.keys()

    @property
    def up_to_date(self) -> bool:
        """Whether the last round that was due is over."""
        return self._next_at > self._clock.monotonic()

    @property
    def assignments(self) -> Collection[Assignment]:
        """What this process works on, by partition."""
        return self._running.values()

    @property
    def trouble(self) -> str | None:
        """Why the member makes no progress somewhere; None when all is well."""
        works = (assignment.trouble for assignment in self._running.values())
        troubles = [self.unfit, self._store_trouble, *works]
        return next((reason for reason in troubles if reason), None)

    async def run(self, stopping: asyncio.Event) -> None:
        """Take part until `stopping` is set, then hand everything over and leave.

        Raises `StoreUnusable`, alone or in a group. A SQLite file that somebody
        keeps locked for longer than a lease is no server that will be back:
        `StoreLocked`.
        """
        async with self._tasks:
            self._stop = asyncio.create_task(stopping.wait())
            self._rounds.hints.add(self._hint)
            try:
                while not stopping.is_set():
                    await self._try_round()
                    await unless(stopping, self._next_round())
                await self._drain()
            finally:
                self._rounds.hints.discard(self._hint)
                self._stop.cancel()
                self._cancel_all()
        await self._leave()

    async def _drain(self) -> None:
        """Stop every partition; keep each one's lease until what it has in hand is settled.

        The member is no longer counted meanwhile, so that others take what it
        has released.
        """
        self._draining, self._lacking = True, False
        self._hint.set()
        works = [running.task for running in self._running.values() if running.task]
        for running in self._running.values():
            running.stopping.set()
        settled = asyncio.Event()
        settling = asyncio.gather(*works, return_exceptions=True)
        settling.add_done_callback(lambda _: settled.set())
        while not settled.is_set():
            await unless(settled, self._next_round())
            if self._running:
                await self._try_round()

    async def _next_round(self) -> None:
        """Wait until a round is due, or asked for."""
        now = self._clock.monotonic()
        seconds = self._rounds.until_next(self._leased_as)
        if self._lacking or self._store_trouble:
            seconds = min(seconds, self._seconds * AGAIN_PART)
        self._next_at = now + seconds
        await unless(self._hint, self._clock.sleep(seconds))
        if self._hint.is_set():
            soonest = self._round_at + self._seconds * APART_PART
            await self._clock.sleep(soonest - self._clock.monotonic())
            self._hint.clear()

    # --- A round -------------------------------------------------------------

    async def _try_round(self) -> None:
        if self._overdue is not None and not self._overdue.done():
            return  # two rounds at once would take the same partitions
        self._round_at = self._clock.monotonic()
        turn = self._overdue = asyncio.create_task(self._round())
        try:
            await self._in_time(turn)
        except errors.StoreUnusable:
            raise
        except errors.CqrsError as exc:
            self._store_trouble = exc.message
            log.warning("lease round failed", role=self._role, error=exc.message)
            if self._seconds_left <= 0:
                for running in list(self._running.values()):
                    self._lose(running)
                if isinstance(exc, errors.StoreLocked):
                    raise
        else:
            self.joined = True
            self._store_trouble = None

    @property
    def _seconds_left(self) -> float:
        """For how long what is held is safe, unless it is renewed."""
        since = self._clock.monotonic() - self.renewed_at
        return self._seconds * SAFE_PART_OF_LEASE - since

    async def _in_time(self, turn: asyncio.Task[None]) -> None:
        """Wait for a round to end, with partitions in hand only as long as they are safe.

        One that takes longer is cancelled and not waited for: a store that hangs
        in a commit holds on to whoever is cancelled.
        """
        try:
            while not turn.done():
                seconds = max(0.0, self._seconds_left) if self._running else None
                ends = {turn} if self._running or self._stop is None else {turn, self._stop}
                first = asyncio.FIRST_COMPLETED
                done, _ = await asyncio.wait(ends, timeout=seconds, return_when=first)
                late = self._running and self._seconds_left <= 0
                if (late or self._stop in done) and not turn.done():
                    turn.cancel()
                    turn.add_done_callback(_look_at)
                    message = (
                        f"the store did not answer within the {self._seconds:g} s of a lease;"
                        " look at its load and locks"
                    )
                    raise errors.StoreSlow(self._store_trouble or message)
        except asyncio.CancelledError:
            turn.cancel()
            await asyncio.wait({turn})
            raise
        turn.result()

    async def _round(self) -> None:
        seconds = 0.0 if self._draining else self._seconds
        leases = [running.lease for running in self._running.values()]
        part = Part(self._leased_as, self.unfit is None, seconds, leases)
        standing = await self._rounds.take_part(part)
        self._lose_all_but(standing.kept)
        self.renewed_at = self._rounds.renewed_at(self._leased_as)
        if self._announced != (part.fit, part.seconds):
            self._announced = part.fit, part.seconds
            self._rounds.changed()
        if not self._draining:
            await self._share_out(standing.members)

    async def _share_out(self, members: Sequence[Member]) -> None:
        share = fair_share(members, self._owner, self._partitions)
        if len(self._running) > share:
            self._hand_over(len(self._running) - share)
        elif len(self._running) < share:
            await self._take(share - len(self._running))
        self._lacking = len(self._running) < share

    def _lose_all_but(self, held: Collection[Lease]) -> None:
        kept = {lease.partition: lease.epoch for lease in held}
        for partition, running in list(self._running.items()):
            if kept.get(partition) != running.lease.epoch:
                log.warning("lease lost", role=self._role, partition=partition)
                self._lose(running)

    async def _take(self, most: int) -> None:
        taken = {lease.partition for lease in await self._leases.held(self._leased_as)}
        free = [number for number in range(self._partitions) if number not in taken]
        if not free:
            return
        leases = await self._leases.acquire(
            self._leased_as, self._owner, free[:most], self._seconds
        )
        for lease in leases:
            self._start(lease)

    def _hand_over(self, surplus: int) -> None:
        """Ask for the surplus to stop, the highest numbers first; each is released when done."""
        for partition in sorted(self._running)[-surplus:]:
            self._running[partition].stopping.set()

    # --- Partitions at work --------------------------------------------------

    def _start(self, lease: Lease) -> None:
        running = self._running[lease.partition] = Assignment(lease)
        running.task = self._tasks.create_task(self._work(running))
        log.info("partition taken", role=self._role, partition=lease.partition, epoch=lease.epoch)

    async def _work(self, running: Assignment) -> None:
        """Run a partition until it is to stop, then release it; its log lines say which it is."""
        put_on_lines(role=self._role, partition=running.lease.partition)
        attempt = 0
        while not running.stopping.is_set():
            try:
                await self._run_partition(running)
                running.went_well()
                attempt = 0
            except errors.LeaseLost:
                self._meter.lease_lost(self._role)
                break
            except errors.StoreUnusable:
                raise
            except Exception as exc:  # noqa: BLE001 - whatever it is, the others go on
                attempt = attempt + 1 if running.trouble else 1
                self._note(running, exc)
                await self._clock.sleep(backoff(attempt))
        await self._release(running)

    def _note(self, running: Assignment, exc: Exception) -> None:
        partition = running.lease.partition
        reason = exc.message if isinstance(exc, errors.CqrsError) else repr(exc)
        running.trouble = f"{self._role} on partition {partition}: {reason}"
        if isinstance(exc, errors.NeedsNewerCode):
            self.unfit = running.trouble
            self._hint.set()
        if isinstance(exc, _STUCK):
            self.stuck = exc
        expected = isinstance(exc, errors.Unavailable | errors.NeedsNewerCode | errors.Conflict)
        log.warning(
            "partition interrupted",
            role=self._role,
            partition=partition,
            error=reason,
            exc_info=None if expected else exc,
        )

    async def _release(self, running: Assignment) -> None:
        partition = running.lease.partition
        try:
            await self._leases.release(self._leased_as, self._owner, [partition])
        except errors.CqrsError as exc:
            log.warning("lease not released", role=self._role, error=exc.message)
        else:
            self._rounds.changed()
        self._forget(running)
        log.info("partition released", role=self._role, partition=partition)

    def _forget(self, running: Assignment) -> None:
        partition = running.lease.partition
        if self._running.get(partition) is running:
            del self._running[partition]

    def _lose(self, running: Assignment) -> None:
        self._meter.lease_lost(self._role)
        self._cancel(running)

    def _cancel(self, running: Assignment) -> None:
        running.stopping.set()  # an error on its way out must not make it start again
        if running.task is not None:
            running.task.cancel()
        self._forget(running)

    def _cancel_all(self) -> None:
        for running in list(self._running.values()):
            self._cancel(running)

    async def _leave(self) -> None:
        try:
            await self._leases.leave(self._leased_as, self._owner)
        except errors.CqrsError as exc:
            log.warning("membership not ended", role=self._role, error=exc.message)
        else:
            self._rounds.changed()


def _look_at(ended: asyncio.Task[None]) -> None:
    """Look at how a round ended, lest asyncio report that nobody did."""
    if not ended.cancelled():
        ended.exception()
