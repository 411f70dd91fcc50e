"""Members and leases in DynamoDB, which has no clock that a request could ask.

So nobody compares clocks. Every renewal changes the item's `renewals`, and a
lease has expired when an observer has seen it unchanged for its length by a
clock of its own. Who comes new sees a dead process's lease as held for that
long; nobody ever sees a renewed one as free.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from cqrs_es import errors
from cqrs_es.ports.leases import Lease, Leases, Member, Part, Standing
from cqrs_es.stores.dynamodb import items, places
from cqrs_es.stores.dynamodb.actions import check, condition, delete, found_key, put, update
from cqrs_es.stores.dynamodb.failures import ConditionFailed, Contended
from cqrs_es.stores.dynamodb.table import MAX_TRIES, pause, side_by_side

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cqrs_es.ports.clock import Clock
    from cqrs_es.stores.dynamodb.actions import Action, Condition, Key, Value
    from cqrs_es.stores.dynamodb.table import Table

_MEMBER_KEPT: Final = timedelta(hours=1)
"""How long an expired member's item stays: longer than any two clocks are apart."""


class DynamoLeases(Leases):
    """The members and leases of a table."""

    def __init__(self, table: Table, clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self._watch = _Watch(clock)

    async def take_part(
        self, owner: str, parts: Sequence[Part], seconds: float
    ) -> dict[str, Standing]:
        """Do it for all roles side by side.

        Each takes several requests, one upon the other. Where a table is slow because there is
        much to do, those of all roles in a row would take longer than a lease.
        """

        async def take(part: Part) -> dict[str, Standing]:
            return await super(DynamoLeases, self).take_part(owner, [part], seconds)

        standings: dict[str, Standing] = {}
        for of_role in await side_by_side(take, parts):
            standings |= of_role
        return standings

    # --- Members -------------------------------------------------------------

    async def announce(self, role: str, owner: str, *, fit: bool, seconds: float) -> None:
        """Be a member of a role for so many seconds from now."""
        await self._delete_forgotten(role)
        expires_at = self._clock.now() + timedelta(seconds=seconds)
        change = condition(
            "SET #role = :role, #owner = :owner, #fit = :fit, #term = :term, #expires_at = :at"
            " ADD #renewals :one",
            role=role,
            owner=owner,
            fit=int(fit),
            term=_term(seconds),
            at=items.moment_text(expires_at),
            one=1,
        )
        await self._table.write(update(places.member_key(role, owner), change))

    async def _delete_forgotten(self, role: str) -> None:
        """Delete the items of members that expired long ago by their own clocks and by ours."""
        long_ago = items.moment_text(self._clock.now() - _MEMBER_KEPT)
        members = await self._found(places.MEMBERS, role)
        gone = [fields for fields in members if fields["expires_at"] < long_ago]
        await self._table.delete_many(found_key(fields) for fields in gone)

    async def leave(self, role: str, owner: str) -> None:
        """Stop being a member and release every lease held in the role."""
        await self._table.write(delete(places.member_key(role, owner)))
        leases = await self._found(places.LEASES, role)
        await self.release(
            role, owner, [x["log_partition"] for x in leases if x.get("owner") == owner]
        )

    async def members(self, role: str | None = None) -> list[Member]:
        """Return the members that have not expired, by role and owner.

        Leases are looked at as well: who is no member any more has then been
        watched for as long on its leases, which are free at once.
        """
        await self.held(role)
        found = [x for x in await self._found(places.MEMBERS, role) if not self._watch.expired(x)]
        members = [
            Member(x["role"], x["owner"], bool(x["fit"]), items.moment_of(x["expires_at"]))
            for x in found
        ]
        return sorted(members, key=lambda member: (member.role, member.owner))

    # --- Leases --------------------------------------------------------------

    async def acquire(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Take those partitions that nobody else holds; return them."""
        keys = {partition: places.lease_key(role, partition) for partition in sorted(partitions)}
        found = await self._table.get_many(keys.values())

        async def take(partition: int) -> Lease | None:
            known = found.get(keys[partition])
            if known is not None and not self._is_free(known, owner):
                return None
            lease = _taken(known, role, partition, owner)
            return lease if await self._wrote(_taking(lease, known, seconds)) else None

        return [lease for lease in await side_by_side(take, keys) if lease is not None]

    def _is_free(self, lease: Mapping[str, Any], owner: str) -> bool:
        return lease.get("owner") in {None, owner} or self._watch.expired(lease)

    async def _wrote(self, action: Action) -> bool:
        try:
            await self._table.write(action)
        except ConditionFailed:
            return False
        return True

    async def renew(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Extend leases; return those still held. One that expired but has no new owner counts."""
        change = condition("SET #term = :term ADD #renewals :one", term=_term(seconds), one=1)
        only_if = condition("#owner = :owner", owner=owner)

        async def extend(partition: int) -> Lease | None:
            action = update(places.lease_key(role, partition), change, only_if)
            try:
                renewed = await self._table.write(action, "ALL_NEW")
            except ConditionFailed:
                return None
            return Lease(role, partition, owner, renewed["epoch"])

        renewed = await side_by_side(extend, sorted(partitions))
        return [lease for lease in renewed if lease is not None]

    async def release(self, role: str, owner: str, partitions: Collection[int]) -> None:
        """Give leases up, keeping their epochs; those not held are no error."""
        change = condition("REMOVE #owner ADD #renewals :one", one=1)
        only_if = condition("#owner = :owner", owner=owner)

        async def give_up(partition: int) -> None:
            await self._wrote(update(places.lease_key(role, partition), change, only_if))

        await side_by_side(give_up, sorted(partitions))

    async def held(self, role: str | None = None) -> list[Lease]:
        """Return the leases that have not expired, by role and partition."""
        leases = [
            Lease(x["role"], x["log_partition"], x["owner"], x["epoch"])
            for x in await self._found(places.LEASES, role)
            if "owner" in x and not self._watch.expired(x)
        ]
        return sorted(leases, key=lambda lease: (lease.role, lease.partition))

    async def _found(self, pk: str, role: str | None) -> list[dict[str, Any]]:
        where = places.all_of(pk) if role is None else places.beginning(pk, f"{role}/")
        return await self._table.query(where)

    # --- Marks ---------------------------------------------------------------

    async def advance_mark(self, lease: Lease, mark: str, expected: int, to: int) -> None:
        """Move a checkpoint that belongs to a role, fenced by the lease's owner and epoch."""
        key = places.checkpoint_key(mark, lease.partition)
        fields = {"log_partition": lease.partition, "log_offset": to}
        actions = [
            check(places.lease_key(lease.role, lease.partition), _is_owned(lease)),
            put(key, fields, places.is_at(expected)),
        ]
        for tries in range(1, MAX_TRIES):
            try:
                return await self._move(actions, mark, expected)
            except Contended:  # the lease is being renewed
                await pause(tries)
        return await self._move(actions, mark, expected)

    async def _move(self, actions: Sequence[Action], mark: str, expected: int) -> None:
        try:
            await self._table.transact(actions)
        except ConditionFailed as exc:
            if 0 in exc.failed:
                raise errors.LeaseLost from exc
            message = f"the mark {mark} is not at {expected}: read it again"
            raise errors.Conflict(message, expected=expected) from exc


class _Watch:
    """Since when, by this process's clock, each item has been seen as it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[Key, tuple[object, float]] = {}

    def expired(self, item: Mapping[str, Any]) -> bool:
        """Whether an item just read has been the same for its whole term."""
        if not item["term"]:
            return True
        key, state = found_key(item), (item["renewals"], item.get("owner"))
        now = self._clock.monotonic()
        known, since = self._seen.get(key, (None, now))
        if known != state:
            self._seen[key] = (state, now)
            return False
        return bool(now - since >= item["term"] / 1000)


def _term(seconds: float) -> int:
    """Return a term in whole milliseconds."""
    return int(seconds * 1000)


def _taken(known: Mapping[str, Any] | None, role: str, partition: int, owner: str) -> Lease:
    """Return the lease with its epoch: the old one only where the owner stays the same."""
    if known is None:
        return Lease(role, partition, owner, 1)
    before = known.get("owner")
    inherited = before not in {None, owner}
    return Lease(role, partition, owner, known["epoch"] + (before != owner), inherited)


def _taking(lease: Lease, known: Mapping[str, Any] | None, seconds: float) -> Action:
    """Write a lease over the one that was read, if that is still what there is."""
    renewals = 0 if known is None else int(known["renewals"])
    fields: dict[str, Value] = {
        "role": lease.role,
        "log_partition": lease.partition,
        "owner": lease.owner,
        "epoch": lease.epoch,
        "term": _term(seconds),
        "renewals": renewals + 1,
    }
    only_if = condition("attribute_not_exists(#pk)")
    if known is not None:
        only_if = condition("#renewals = :was", was=renewals)
    return put(places.lease_key(lease.role, lease.partition), fields, only_if)


def _is_owned(lease: Lease) -> Condition:
    text = "#owner = :owner AND #epoch = :epoch"
    return condition(text, owner=lease.owner, epoch=lease.epoch)
