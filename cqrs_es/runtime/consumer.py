"""The command worker: from the queue to the executor, and the answers back.

A message that was received is in hand until it is settled:

    received ─▶ in the executor ─▶ answered ─▶ settled: the outcome is committed
        │              └─────────▶ handed back: no outcome; it stays in the queue
        ├────▶ stored, as a scheduled command ─▶ settled
        └────▶ buried, among the dead letters ─▶ settled

Nothing else settles a message. What is in hand when the process dies, or was
handed back, is delivered again, in order, once the intake is closed; what was
committed already is then answered from the store. `redelivery` says how.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from cqrs_es import errors, wire
from cqrs_es.execution.retry import Retry
from cqrs_es.messages import is_reused
from cqrs_es.ports.broker import Nudge, OutgoingReply
from cqrs_es.ports.dead_letters import RECEIVED_AT, DeadLetter
from cqrs_es.ports.store import IMMEDIATELY, ScheduledCommand
from cqrs_es.runtime.due import NOTHING_DUE, DueIntake, keep_recurring, overdue
from cqrs_es.runtime.redelivery import Gate, Redelivered, Redelivery
from cqrs_es.runtime.roles import WORKER, Role
from cqrs_es.runtime.waiting import unless
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import Reading
from cqrs_es.types import partition_of

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Iterator, Mapping

    from cqrs_es.execution.stages import Answer
    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.broker import CommandIntake, Delivery
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.worker")

# So many batches of one partition in hand at most: what is prepared while others are committed.
BATCHES_IN_HAND: Final = 4
# Bytes of messages in hand in the whole process. A message takes several times its size while
# it is decided, and the manifests allow a worker 512 MiB.
MOST_BYTES_IN_HAND: Final = 36 * 1024 * 1024
# After so long without an error an intake is as good as one that had something to do.
CALM_SECONDS: Final = 1.0
# A stop finishes what is in hand for so long, and then only what is begun: what is handed back
# takes its successor longer.
DRAIN_SECONDS: Final = 1.0
PRUNE_CHUNK: Final = 1000
PRUNE_EVERY_SECONDS: Final = 60.0
RECUR_EVERY_SECONDS: Final = 60.0
IMPORTED_AT_ONCE: Final = 100


class CommandWorker(Role):
    """Consumes partitions of the command queue into the process's executor."""

    name = WORKER
    hears = frozenset({Nudge.DUE})

    def __init__(self, process: Process) -> None:
        self._process = process
        self._depths: Mapping[int, int] = {}
        self.gate = Gate(process)
        self.room = Room(MOST_BYTES_IN_HAND)
        self.dead = 0
        """How many messages no outcome was possible for."""
        self._telling: set[asyncio.Task[None]] = set()
        # Partitions of which attempts may have stayed recorded that nobody has died of.
        self._unclear: set[int] = set()

    async def run_partition(self, assignment: Assignment) -> None:
        """Consume a partition until stopped, then settle what is in hand."""
        process, lease = self._process, assignment.lease
        assignment.in_hand = 0
        queue = await process.broker.open_intake(lease.partition, lease.owner)
        with process.timetable.taking(lease.partition) as due:
            batch = process.settings.batch_size
            most = BATCHES_IN_HAND * batch
            if lease.partition in self._unclear:
                assignment.suspects = most
            events, timetable = process.storage.events, process.timetable
            intakes = [queue, DueIntake(events, timetable, due, assignment, batch, most)]
            consumers = [Consumer(self, process, intake, assignment) for intake in intakes]
            try:
                await self._consume(consumers, assignment)
            except* errors.CqrsError as several:
                raise errors.innermost(several) from None
            finally:
                # It may be cancelled twice, by whoever stops and by what that makes fail.
                self._unclear.add(lease.partition)
                clear = True
                for consumer in consumers:
                    consumer.abandon()
                    clear &= await asyncio.shield(consumer.redelivery.take_back())
                if clear and not assignment.suspects:
                    self._unclear.discard(lease.partition)
                await queue.close()

    async def watch(self) -> None:
        """Look when scheduled commands are due."""
        await self._process.timetable.run()

    def backlog(self, assignment: Assignment) -> int:
        """Return how many commands are taken, or were in the queue at the last look."""
        return max(assignment.in_hand, self._depths.get(assignment.lease.partition, 0))

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask for the depths of the queues, and the number of dead letters."""
        self._depths = {}
        if not held:
            return []
        depths = await self._process.broker.queue_depth()
        self._depths = {number: depth for number, depth in depths.items() if number in held}
        figures = [
            Reading(metrics.QUEUE_COMMANDS, depth, (str(number),))
            for number, depth in self._depths.items()
        ]
        late = await overdue(self._process.storage.events, held)
        for number in held:
            figure = late.get(number, NOTHING_DUE)
            figures += [
                Reading(metrics.SCHEDULED_DUE, figure.rows, (str(number),)),
                Reading(metrics.SCHEDULED_OVERDUE_SECONDS, figure.seconds, (str(number),)),
            ]
        if 0 in held:
            letters = await self._process.storage.dead_letters.count()
            figures.append(Reading(metrics.DEAD_LETTERS, letters))
        return figures

    async def _consume(self, consumers: Sequence[Consumer], assignment: Assignment) -> None:
        with self.room.shared():
            async with asyncio.TaskGroup() as group:
                settling = [consumer.settle_forever() for consumer in consumers]
                beside = [
                    group.create_task(work) for work in (*settling, *self._chores(assignment))
                ]
                async with asyncio.TaskGroup() as taking:
                    for consumer in consumers:
                        taking.create_task(consumer.take_until(assignment.stopping))
                for task in beside:
                    task.cancel()

    def _chores(self, assignment: Assignment) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what is done beside; the holder of partition 0 does what belongs to none."""
        yield self._note_calm(assignment)
        yield self._recur_forever(assignment.lease.partition)
        if assignment.lease.partition == 0:
            yield self._prune_forever()
            yield self._import_forever(assignment.lease.owner)

    async def _note_calm(self, assignment: Assignment) -> None:
        """Note that all is well after a while: in an empty queue nothing else shows it."""
        if assignment.trouble is not None:
            await self._process.clock.sleep(CALM_SECONDS)
            assignment.went_well()

    async def _recur_forever(self, partition: int) -> None:
        """See to it that a partition's recurring commands are scheduled; errors are only logged."""
        process = self._process
        wanted = [
            definition
            for place, definition in process.registry.recurring.items()
            if partition_of(*place[:2], process.partitions) == partition
        ]
        while wanted:
            try:
                for definition in wanted:
                    await keep_recurring(process, definition)
            except errors.CqrsError as exc:
                log.warning("recurring commands not scheduled", error=exc.message)
            await process.clock.sleep(RECUR_EVERY_SECONDS)

    async def _prune_forever(self) -> None:
        """Forget outcomes that have been kept for long enough (G2); errors are only logged."""
        while True:
            if await self.try_prune() < PRUNE_CHUNK:
                await self._process.clock.sleep(PRUNE_EVERY_SECONDS)

    async def try_prune(self) -> int:
        """Forget some outcomes that have been kept for long enough; return how many."""
        process = self._process
        before = process.clock.now() - timedelta(days=process.settings.outcome_retention_days)
        try:
            return await process.storage.events.prune_outcomes(before, PRUNE_CHUNK)
        except errors.CqrsError as exc:
            log.warning("outcomes not pruned", error=exc.message)
            return 0

    # --- Answers -------------------------------------------------------------

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Tell senders what became of their commands; that the broker is away is only logged."""
        if not replies:
            return
        try:
            with self._process.meter.phase("reply"):
                await self._process.broker.reply(replies)
        except errors.BrokerUnavailable as exc:
            log.warning("replies lost", replies=len(replies), error=exc.message)

    def reply_late(self, replies: Sequence[OutgoingReply]) -> None:
        """Do so beside everything else: nobody waits for it."""
        if replies:
            telling = asyncio.create_task(self.reply(replies))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    # --- Messages that no outcome is possible for ----------------------------

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Put a message among the dead letters.

        Where the id that it bears has a letter already, of a command that
        failed perhaps, that one stays, and this one goes by its content.
        """
        letter = self._letter(delivery, reason)
        outage, letters = self._process.outage(), self._process.storage.dead_letters
        known = await outage.wait_out(lambda: letters.get(letter.id))
        if known is not None and known.body_hash != letter.body_hash:
            letter = replace(letter, id=letter.body_hash[:32])
        await outage.wait_out(lambda: letters.add(letter))
        self.dead += 1
        self._process.meter.dead_message()
        log.warning("message buried", dead_letter=letter.id, reason=reason)

    def _letter(self, delivery: Delivery, reason: str) -> DeadLetter:
        return DeadLetter.of(
            delivery.body,
            reason=reason,
            source="commands",
            seen_at=self._process.clock.now(),
            limit=self._process.settings.max_message_bytes,
            command_id=wire.command_id_of(delivery.body),
            headers=_with_received_at(delivery),
        )

    async def _import_forever(self, consumer: str) -> None:
        """Add what the broker itself gave up, for ever; return where brokers don't do that.

        A broker that fails here does not keep the partition from being worked on.
        """
        retry = Retry(
            log,
            "dead letters not imported",
            bears=errors.BrokerUnavailable,
            clock=self._process.clock,
        )
        while True:
            async with retry:
                intake = await self._process.broker.open_dead_intake(consumer)
                if intake is None:
                    return
                retry.over()
                await self._import_from(intake)

    async def _import_from(self, intake: CommandIntake) -> None:
        try:
            while True:
                for delivery in await intake.receive(IMPORTED_AT_ONCE):
                    await self.bury(
                        delivery, delivery.headers.get("reason", "the broker gave it up")
                    )
                    await intake.settle([delivery])
        finally:
            await intake.close()


class Room:
    """How many bytes of messages a process may have in hand, shared by its partitions.

    A third is for whoever comes first. Another is divided evenly, so that one
    partition whose commands wait keeps no other one waiting. The last is for
    what is read at once, which is divided evenly too: all of them may read at
    the same time. A partition may always have one message, however large.
    """

    def __init__(self, most: int) -> None:
        self._third = most // 3
        self._partitions = 0
        self._bytes = 0
        self.changed = asyncio.Condition()

    @contextmanager
    def shared(self) -> Generator[None]:
        """Be one of the partitions that share the room."""
        self._partitions += 1
        try:
            yield
        finally:
            self._partitions -= 1

    @property
    def share(self) -> int:
        """What a partition may have, and may read at once, whatever others have."""
        return max(1, self._third // self._partitions)

    def allows(self, in_hand: int) -> bool:
        """Whether a partition that has so many bytes in hand may read more."""
        return in_hand < self.share or self._bytes < self._third

    def add(self, size: int) -> None:
        """Note a message in hand, or with a negative size that it no longer is."""
        self._bytes += size


class _Held(msgspec.Struct, eq=False):
    """A delivery in hand; `answer` is None for one that was buried, or stored for later.

    Once it is answered there is its `outcome`, or its `trouble`: why it got none, unless its row
    is gone.
    """

    delivery: Delivery
    message: CommandMessage | None = None
    answer: Answer | None = None
    outcome: Outcome | None = None
    trouble: BaseException | None = None

    def note_answer(self) -> None:
        """Look at what the answer is."""
        if self.answer is None:
            return
        if self.answer.cancelled():
            self.trouble = errors.Withdrawn()
        elif exc := self.answer.exception():
            self.trouble = None if isinstance(exc, errors.ScheduleGone) else exc
        else:
            self.outcome = self.answer.result()

    @property
    def reply(self) -> OutgoingReply | None:
        """What its sender is to be told, where it wants to know."""
        if self.message is None or self.message.reply_to is None or self.outcome is None:
            return None
        outcome = wire.encode_outcome(self.outcome)
        return OutgoingReply(self.message.reply_to, self.outcome.command_id, outcome)


class Consumer:
    """One partition: what is in hand, and how it came and goes."""

    def __init__(
        self, worker: CommandWorker, process: Process, intake: CommandIntake, assignment: Assignment
    ) -> None:
        self._worker, self._room, self._gate = worker, worker.room, worker.gate
        self._process = process
        self._intake = intake
        self._assignment = assignment
        self._in_hand = 0
        self._most = BATCHES_IN_HAND * process.settings.batch_size
        self._bytes = 0
        self._answers: set[Answer] = set()
        self._abandoned = False
        self._done: list[_Held] = []
        self._something_done = asyncio.Event()
        self.redelivery = Redelivery(process, self._gate, self._submit_again)

    # --- From the queue to the executor --------------------------------------

    async def take_until(self, stopping: asyncio.Event) -> None:
        """Receive and submit until told to stop; then wait until nothing is in hand."""
        await unless(stopping, self._take_forever())
        await self.drain()

    async def _take_forever(self) -> None:
        """Receive and submit, in order, never more than the bounds at once."""
        while True:
            async with self._room.changed:
                await self._room.changed.wait_for(self._has_room)
            most = self._most - self._in_hand
            received = await self._intake.receive(most, self._room.share)
            if any(b'"schedule"' in delivery.body for delivery in received):
                received = await self._put_off(received)
            for redelivered, some in itertools.groupby(received, lambda it: it.redelivered):
                if redelivered:
                    await self._take_again(some)
                else:
                    await self._take(some)

    def _has_room(self) -> bool:
        return self._in_hand < self._most and self._room.allows(self._bytes)

    async def _take(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            message = await self._parsed(delivery)
            if message is not None:
                self._note_arrival(delivery, message)
                await self._gate.wait_open()
                _ = self._submit(delivery, message)

    def _note_arrival(self, delivery: Delivery, message: CommandMessage) -> None:
        row, meter = delivery.scheduled, self._process.meter
        if row is None:
            meter.delivered(delivery.queued_at, message.sent_at)
        elif row.moment > IMMEDIATELY:
            meter.fired(row.late.total_seconds())

    async def _take_again(self, deliveries: Iterable[Delivery]) -> None:
        read = [(delivery, await self._parsed(delivery)) for delivery in deliveries]
        await self.redelivery.take([(each, message) for each, message in read if message])

    async def _put_off(self, received: Iterable[Delivery]) -> list[Delivery]:
        """Store the commands that are for later, and settle their messages; return the others."""
        others: list[Delivery] = []
        rows: list[tuple[Delivery, ScheduledCommand]] = []
        process = self._process
        for delivery in received:
            try:
                limit = process.settings.max_message_bytes
                found = wire.parse_schedule(delivery.body, process.clock.now(), limit)
            except errors.InvalidMessage as exc:
                await self._bury(delivery, exc.message)
                continue
            if found is None or delivery.scheduled is not None:
                others.append(delivery)
            else:
                row = ScheduledCommand.of(found.message, found.due, process.partitions)
                rows.append((delivery, row))
        await self._store(rows)
        return others

    async def _store(self, rows: Sequence[tuple[Delivery, ScheduledCommand]]) -> None:
        """Store commands for later; those that the store can't take become dead letters."""
        events, outage = self._process.storage.events, self._process.outage()
        try:
            await outage.wait_out(lambda: events.schedule([row for _, row in rows]))
        except errors.StoreUnusable:
            raise
        except errors.StoreError as exc:
            if len(rows) == 1:
                await self._bury(rows[0][0], exc.message)
            else:
                for each in rows:
                    await self._store([each])
        else:
            for delivery, _ in rows:
                self._settle_as_it_is(delivery)
            self._process.nudger.scheduled({row.partition for _, row in rows})

    async def _parsed(self, delivery: Delivery) -> CommandMessage | None:
        """Read a message; one that is invalid becomes a dead letter."""
        try:
            most, trusted = self._process.settings.max_message_bytes, delivery.scheduled is not None
            return wire.parse_command(delivery.body, most, trusted=trusted)
        except errors.InvalidMessage as exc:
            await self._bury(delivery, exc.message)
            return None

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        await self._worker.bury(delivery, reason)
        if delivery.scheduled is not None:
            await self._process.storage.events.unschedule([delivery.scheduled.command_id])
        self._settle_as_it_is(delivery)

    def _settle_as_it_is(self, delivery: Delivery) -> None:
        """Have a message settled that nothing is to be decided of."""
        held = _Held(delivery)
        self._hold(held)
        self._note_done(held)

    def _submit_again(self, it: Redelivered, attempts: int, condemned: str | None) -> Answer:
        return self._submit(it.delivery, it.message, attempts, condemned)

    def _submit(
        self,
        delivery: Delivery,
        message: CommandMessage,
        attempts: int = 0,
        condemned: str | None = None,
    ) -> Answer:
        span = self._process.tracing.processing(message, self._assignment.lease.partition)
        answer = self._process.executor.submit(
            message,
            attempts=attempts,
            condemned=condemned,
            scheduled=delivery.scheduled,
            untrusted=delivery.scheduled is None,
            received_at=delivery.received_at,
            span=span,
        )
        held = _Held(delivery, message, answer)
        self._hold(held)
        self._answers.add(answer)
        answer.add_done_callback(lambda _: self._note_done(held))
        return answer

    # --- From the executor back to the queue ---------------------------------

    async def settle_forever(self) -> None:
        """Settle whatever is answered by the time the last settlement is done.

        Raises what kept a command from an outcome: it stays in the queue. That
        a stopping process hands commands back is no such thing.
        """
        while True:
            done = await self._take_done()
            settled = [held for held in done if held.trouble is None]
            try:
                if settled:
                    await self._settle(settled)
                for held in done:
                    self._raise_trouble(held)
            except BaseException:
                self._done[:0] = done  # `abandon` sees to them
                raise
            await self._let_go(done)

    async def _settle(self, settled: Sequence[_Held]) -> None:
        await self._end_attempts(settled)
        await self._worker.reply([reply for held in settled if (reply := held.reply) is not None])
        with self._process.meter.phase("settle"):
            await self._intake.settle([held.delivery for held in settled])
        self._assignment.reached((self._assignment.position or 0) + len(settled))

    def _raise_trouble(self, held: _Held) -> None:
        trouble = held.trouble
        if isinstance(trouble, errors.Withdrawn) and self._assignment.stopping.is_set():
            return
        if trouble is not None:
            raise trouble

    async def _end_attempts(self, settled: Sequence[_Held]) -> None:
        outcomes = [held.outcome for held in settled if held.outcome is not None]
        await self.redelivery.settle(
            decided=[it.command_id for it in outcomes if _is_new(it)],
            answered=[it.command_id for it in outcomes if not _is_new(it)],
        )

    # --- What is in hand -----------------------------------------------------

    def _hold(self, held: _Held) -> None:
        self._count(1)
        self._count_bytes(len(held.delivery.body))

    def _count(self, more: int) -> None:
        self._in_hand += more
        self._assignment.in_hand += more

    def _count_bytes(self, size: int) -> None:
        self._bytes += size
        self._room.add(size)

    def _note_done(self, held: _Held) -> None:
        held.note_answer()
        if held.answer is not None:
            self._answers.discard(held.answer)
        if held.trouble is not None and not isinstance(held.trouble, errors.Withdrawn):
            # It stays in the queue: what comes after it must not be decided before it.
            self._withdraw()
        self._done.append(held)
        self._something_done.set()
        if self._abandoned:
            self._answer_the_due()

    async def _take_done(self) -> list[_Held]:
        await self._something_done.wait()
        self._something_done.clear()
        done, self._done = self._done, []
        return done

    async def _let_go(self, done: Sequence[_Held]) -> None:
        async with self._room.changed:
            self._count(-len(done))
            self._count_bytes(-sum(len(held.delivery.body) for held in done))
            self._room.changed.notify_all()

    async def drain(self) -> None:
        """Wait until nothing is in hand; what takes long and is not begun is handed back."""
        seconds = min(DRAIN_SECONDS, self._process.settings.shutdown_timeout / 4)
        async with asyncio.TaskGroup() as group:
            limit = group.create_task(self._withdraw_every(seconds))
            async with self._room.changed:
                await self._room.changed.wait_for(lambda: self._in_hand == 0)
            limit.cancel()

    async def _withdraw_every(self, seconds: float) -> None:
        """Withdraw again and again: what waits for a retry is not begun either."""
        while True:
            await self._process.clock.sleep(seconds)
            self._withdraw()

    def _withdraw(self) -> None:
        """Take back from the executor what is not begun."""
        if self._answers:
            self._process.executor.withdraw(self._answers)

    def abandon(self) -> None:
        """Leave what is in hand to whoever consumes the partition next.

        A message is delivered again, and answered then. The row of a scheduled command
        is gone once that is decided, so the answer has to be given here, now or
        when it is decided.
        """
        self._withdraw()
        self._count_bytes(-self._bytes)
        self._abandoned = True
        self._answer_the_due()

    def _answer_the_due(self) -> None:
        done, self._done = self._done, []
        due = [held for held in done if held.delivery.scheduled is not None]
        self._worker.reply_late([reply for held in due if (reply := held.reply) is not None])


def _with_received_at(delivery: Delivery) -> Mapping[str, str]:
    received_at = delivery.received_at
    if received_at is None:
        return delivery.headers
    return {**delivery.headers, RECEIVED_AT: received_at.isoformat()}


def _is_new(outcome: Outcome) -> bool:
    """Whether an outcome was committed for the command that got it, attempts deleted with it."""
    return not (outcome.duplicate or is_reused(outcome))
