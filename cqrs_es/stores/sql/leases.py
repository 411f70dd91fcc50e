"""Members and leases in SQL; time is what `Session.now` says, the same for everybody."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from string import Formatter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from cqrs_es import errors
from cqrs_es.ports.leases import Lease, Leases, Member, Part, Standing
from cqrs_es.stores.sql import checkpoints
from cqrs_es.stores.sql.dialect import marks, utc_moment
from cqrs_es.stores.sql.tables import LEASES, MEMBERS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cqrs_es.stores.sql.dialect import Parameter
    from cqrs_es.stores.sql.session import Database, Row, Session

_Filling: TypeAlias = "tuple[str, Sequence[Parameter]]"

_DELETE_MEMBER: Final = "DELETE FROM members WHERE role = ? AND owner = ?"
_DELETE_EXPIRED: Final = "DELETE FROM members WHERE role = ? AND expires_at < ?"
_LIVE: Final = """
    SELECT role, owner, fit, expires_at, {now} FROM members
    WHERE expires_at > {now} AND role IN {roles} ORDER BY role, owner"""
_OWNER: Final = "SELECT owner, epoch FROM leases WHERE role = ? AND log_partition = ?"
_RELEASE: Final = "UPDATE leases SET owner = NULL WHERE role = ? AND owner = ?"
_NOTHING: Final = "1 = 0"
_MEMBER_KEPT: Final = timedelta(hours=1)
"""How long an expired member's row stays, for whoever looks into what happened."""
AHEAD: Final = 30
"""What expires so many terms from now, and would be held as long, is from before the clock was
set back; processes whose `CQRS_ES_LEASE_SECONDS` differ are not that far apart."""


class SqlLeases(Leases):
    """The members and leases of an SQL database.

    A round waits for no connection behind the work that its leases protect: the slower the store,
    the sooner they would be lost, and all that is taken anew makes it slower.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ahead = database.ahead

    async def take_part(
        self, owner: str, parts: Sequence[Part], seconds: float
    ) -> dict[str, Standing]:
        """Announce, renew and read the members of several roles, each by one statement."""
        roles = [part.role for part in parts]

        async def work(session: Session) -> dict[str, Standing]:
            now, to_time = await session.now(), session.dialect.to_time
            rows: list[Sequence[Parameter]] = []
            for part in sorted(parts, key=lambda part: part.role):
                until = to_time(now + timedelta(seconds=part.seconds))
                rows.append((part.role, owner, int(part.fit), until))
            await session.write(session.dialect.upsert(MEMBERS), rows)
            term = timedelta(seconds=seconds)
            kept = await _extend(session, owner, parts, now + term)
            where = f"WHERE expires_at > ? AND role IN {marks(len(roles))} ORDER BY role, owner"
            live = await session.fetch(f"{MEMBERS.select} {where}", (to_time(now), *roles))
            members = _members(live)
            if any(member.expires_at > now + AHEAD * term for member in members):
                await _call_back(session, now, term)
            return {role: _standing(role, owner, kept, members, now) for role in roles}

        return await self._ahead.run(work)

    async def go_on(self, owner: str, parts: Sequence[Part], seconds: float) -> bool:
        """Announce and renew by one statement, which counts what it has renewed."""
        leases = [lease for part in parts for lease in part.held]
        roles = [part.role for part in parts]
        each = " OR ".join(["(leases.role = ? AND leases.log_partition = ?)"] * len(leases))
        values: dict[str, _Filling] = {
            "owner": ("?", [owner]),
            "roles": (marks(len(roles)), roles),
            "held": _keys(parts),
            "each": (each or _NOTHING, [x for it in leases for x in (it.role, it.partition)]),
            "term": ("?", [int(seconds * 1_000_000)]),
        }

        async def work(session: Session) -> bool:
            if session.dialect.go_on is None:
                return False
            sql, parameters = _filled(session.dialect.go_on, values)
            return await session.execute(sql, parameters) == len(parts) + len(leases)

        return await self._ahead.read(work)

    async def look(self, owner: str, parts: Sequence[Part]) -> Mapping[str, Standing] | None:
        """Read the members; None where some are from before the clock was set back."""
        roles = [part.role for part in parts]

        async def work(session: Session) -> Mapping[str, Standing] | None:
            if session.dialect.go_on is None:
                return None
            sql = _LIVE.format(now=session.dialect.now, roles=marks(len(roles)))
            rows = await session.fetch(sql, roles)
            if not rows:
                return None
            members, now = _members([row[:-1] for row in rows]), utc_moment(rows[0][-1])
            longest = AHEAD * max(part.seconds for part in parts)
            if any(each.expires_at > now + timedelta(seconds=longest) for each in members):
                return None
            return {
                part.role: _standing(part.role, owner, part.held, members, now) for part in parts
            }

        return await self._ahead.read(work)

    async def announce(self, role: str, owner: str, *, fit: bool, seconds: float) -> None:
        """Be a member of a role for so many seconds from now."""

        async def work(session: Session) -> None:
            now, to_time = await session.now(), session.dialect.to_time
            row = (role, owner, int(fit), to_time(now + timedelta(seconds=seconds)))
            await session.write(session.dialect.upsert(MEMBERS), [row])

        await self._database.run(work)

    async def leave(self, role: str, owner: str) -> None:
        """Stop being a member and release every lease held in the role."""

        async def work(session: Session) -> None:
            await session.execute(_DELETE_MEMBER, (role, owner))
            await session.execute(_RELEASE, (role, owner))

        await self._database.run(work)

    async def members(self, role: str | None = None) -> list[Member]:
        """Return the members that have not expired, by role and owner."""
        return _members(await self._live(MEMBERS.select, "owner", role))

    async def acquire(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Take those partitions that nobody else holds; return them."""

        async def work(session: Session) -> list[Lease]:
            now = await session.now()
            kept_since = session.dialect.to_time(now - _MEMBER_KEPT)
            await session.execute(_DELETE_EXPIRED, (role, kept_since))
            claims = await _lock(session, role, partitions)
            free = [p for p in sorted(partitions) if _is_free(claims.get(p), owner, now)]
            leases = [_taken(claims.get(p), role, p, owner) for p in free]
            await _insert(session, [x for x in leases if x.partition not in claims], now, seconds)
            await _update(session, [x for x in leases if x.partition in claims], now, seconds)
            return leases

        return await self._database.run(work)

    async def renew(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Extend leases; return those still held. One that expired but has no new owner counts."""

        async def work(session: Session) -> list[Lease]:
            claims = await _lock(session, role, partitions)
            kept = [
                Lease(role, partition, owner, claim.epoch)
                for partition, claim in claims.items()
                if claim.owner == owner
            ]
            await _update(session, kept, await session.now(), seconds)
            return kept

        return await self._database.run(work)

    async def release(self, role: str, owner: str, partitions: Collection[int]) -> None:
        """Give leases up, keeping their epochs; those not held are no error."""
        if not partitions:
            return
        sql = f"{_RELEASE} AND log_partition IN {marks(len(partitions))}"
        await self._database.run(lambda session: session.execute(sql, (role, owner, *partitions)))

    async def held(self, role: str | None = None) -> list[Lease]:
        """Return the leases that have not expired, by role and partition."""
        return [
            Lease(of, partition, owner, epoch)
            for of, partition, owner, epoch, _ in await self._live(
                LEASES.select, "log_partition", role
            )
            if owner is not None
        ]

    async def advance_mark(self, lease: Lease, mark: str, expected: int, to: int) -> None:
        """Move a checkpoint that belongs to a role, fenced by the lease's owner and epoch."""

        async def work(session: Session) -> None:
            rows = await session.fetch(_OWNER, (lease.role, lease.partition), lock=True)
            if [tuple(row) for row in rows] != [(lease.owner, lease.epoch)]:
                raise errors.LeaseLost
            await checkpoints.advance(session, mark, lease.partition, expected, to)

        await self._database.run(work)

    async def _live(self, select: str, then_by: str, role: str | None) -> list[Row]:
        """Read the rows that have not expired, of one role or of all."""

        async def work(session: Session) -> list[Row]:
            now = session.dialect.to_time(await session.now())
            order = f"ORDER BY role, {then_by}"
            if role is None:
                return await session.fetch(f"{select} WHERE expires_at > ? {order}", (now,))
            sql = f"{select} WHERE expires_at > ? AND role = ? {order}"
            return await session.fetch(sql, (now, role))

        return await self._database.read(work)


async def _call_back(session: Session, now: datetime, term: timedelta) -> None:
    """Have what was set by a clock that has been set back expire after one term."""
    moments = [session.dialect.to_time(now + term), session.dialect.to_time(now + AHEAD * term)]
    for table in ("leases", "members"):
        sql = f"UPDATE {table} SET expires_at = ? WHERE expires_at > ?"  # noqa: S608 - two names
        await session.execute(sql, moments)


class _Claim(NamedTuple):
    owner: str | None
    epoch: int
    expires_at: datetime


async def _lock(session: Session, role: str, partitions: Collection[int]) -> dict[int, _Claim]:
    """Lock the rows there are, ascending; one inserted meanwhile is a duplicate key later."""
    if not partitions:
        return {}
    where = f"WHERE role = ? AND log_partition IN {marks(len(partitions))} ORDER BY log_partition"
    parameters: list[Parameter] = [role, *sorted(partitions)]
    rows = await session.fetch(f"{LEASES.select} {where}", parameters, lock=True)
    return {
        partition: _Claim(owner, epoch, utc_moment(expires_at))
        for _, partition, owner, epoch, expires_at in rows
    }


def _members(rows: Sequence[Row]) -> list[Member]:
    return [
        Member(role, owner, bool(fit), utc_moment(expires_at))
        for role, owner, fit, expires_at in rows
    ]


async def _extend(
    session: Session, owner: str, parts: Sequence[Part], until: datetime
) -> list[Lease]:
    """Extend the leases of several roles; return those that are still the owner's."""
    if not any(part.held for part in parts):
        return []
    those, keys = _keys(parts)
    where = f"WHERE owner = ? AND ({those})"
    await session.execute(
        f"UPDATE leases SET expires_at = ? {where}",  # noqa: S608 - placeholders only
        (session.dialect.to_time(until), owner, *keys),
    )
    rows = await session.fetch(f"{LEASES.select} {where}", (owner, *keys))
    return [Lease(role, partition, by, epoch) for role, partition, by, epoch, _ in rows]


def _keys(parts: Sequence[Part]) -> _Filling:
    """Return the condition that a row is of one of the leases held."""
    held = [(part.role, sorted(lease.partition for lease in part.held)) for part in parts]
    those = " OR ".join(
        f"leases.role = ? AND leases.log_partition IN {marks(len(numbers))}"
        for _, numbers in held
        if numbers
    )
    values: list[Parameter] = []
    for role, numbers in held:
        values += (role, *numbers) if numbers else ()
    return those or _NOTHING, values


def _filled(template: str, values: Mapping[str, _Filling]) -> _Filling:
    """Fill in what a statement has in braces; return it with its parameters in order."""
    sql = ""
    parameters: list[Parameter] = []
    for text, name, _, _ in Formatter().parse(template):
        sql += text
        if name is not None:
            sql += values[name][0]
            parameters += values[name][1]
    return sql, parameters


def _standing(
    role: str, owner: str, kept: Collection[Lease], members: Sequence[Member], now: datetime
) -> Standing:
    """Return how a role stands, of what was found of several."""
    own = [member for member in members if member.role == role]
    others = [member.expires_at for member in own if member.owner != owner]
    seconds = (min(others) - now).total_seconds() if others else math.inf
    return Standing([lease for lease in kept if lease.role == role], own, seconds)


def _is_free(claim: _Claim | None, owner: str, now: datetime) -> bool:
    return claim is None or claim.owner in {None, owner} or claim.expires_at <= now


def _taken(claim: _Claim | None, role: str, partition: int, owner: str) -> Lease:
    """Return the lease with its epoch: the old one only where the owner stays the same."""
    if claim is None:
        return Lease(role, partition, owner, 1)
    inherited = claim.owner not in {None, owner}
    return Lease(role, partition, owner, claim.epoch + (claim.owner != owner), inherited)


async def _insert(session: Session, leases: Sequence[Lease], now: datetime, seconds: float) -> None:
    expires_at = session.dialect.to_time(now + timedelta(seconds=seconds))
    rows = [(x.role, x.partition, x.owner, x.epoch, expires_at) for x in leases]
    await session.write(session.dialect.insert(LEASES), rows)


async def _update(session: Session, leases: Sequence[Lease], now: datetime, seconds: float) -> None:
    expires_at = session.dialect.to_time(now + timedelta(seconds=seconds))
    rows = [(x.role, x.partition, x.owner, x.epoch, expires_at) for x in leases]
    await session.write(session.dialect.upsert(LEASES), rows)
