"""Live events, as server-sent events: one reader of the log for all who follow it.

    Tail ──reads each page once──▶ its last events ──▶ streams that are near the end
    store ──pages of their own───────────────────────▶ streams that are behind it

A stream has no queue: it knows its place in each partition and takes what
follows, from the tail where that still has it. So a client that reads slowly
costs a position and one page, and one that does not read at all is dropped.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec
import orjson
from starlette.responses import Response

from cqrs_es import errors
from cqrs_es.cloudevents import to_cloudevent
from cqrs_es.execution.retry import Retry
from cqrs_es.http.problems import bad_request
from cqrs_es.ports.broker import Nudge
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from cqrs_es.messages import StoredEvent
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.http")

PING_SECONDS: Final = 15.0
WRITE_SECONDS: Final = 30.0
EPOCH_SECONDS: Final = 2.0
PAGE: Final = 100
PIECE_BYTES: Final = 64 * 1024
# What the tail keeps for streams that are a little behind, of each partition.
KEPT_EVENTS: Final = 256
KEPT_BYTES: Final = 1024 * 1024
_POSITION: Final = re.compile(r"([0-9A-Za-z-]{1,64});((?:[0-9]{1,9}:[0-9]{1,18},?)*)")


class Written(msgspec.Struct, frozen=True):
    """An event of the log as it is sent."""

    offset: int
    type: str
    body: bytes


class Tail:
    """Follows the log while anybody follows the tail."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._source = f"/{process.service}"
        self._kept: dict[int, deque[Written]] = {}
        self._sizes: dict[int, int] = {}
        self._moved = asyncio.Event()
        self._joining = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._followers = 0
        self.epoch = ""
        self.heads: dict[int, int] = {}
        self.ended = False

    def end(self) -> None:
        """Let every stream end."""
        self.ended = True
        self._notify()

    async def close(self) -> None:
        """Follow no more."""
        self.end()
        if self._following is not None:
            await cancelled(self._following)

    def _notify(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    # --- For streams ---------------------------------------------------------

    async def joined(self) -> None:
        """Begin to follow for one more stream; read where the log ends now."""
        self._followers += 1
        async with self._joining:
            if self._following is None:
                await self._restart()
                self._following = asyncio.create_task(self._follow())

    async def left(self) -> None:
        """Follow for one stream less."""
        self._followers -= 1
        if not self._followers and self._following is not None:
            following, self._following = self._following, None
            await cancelled(following)

    async def wait(self, positions: Mapping[int, int], epoch: str) -> None:
        """Wait until there is something beyond the positions, or the log is another."""

        def moved() -> bool:
            heads = self.heads
            behind = any(heads.get(each, 0) > offset for each, offset in positions.items())
            return self.ended or self.epoch != epoch or behind

        while not moved():
            await self._moved.wait()

    async def after(self, partition: int, offset: int) -> Sequence[Written]:
        """Return a page of what follows a place, by a read of its own where that is long ago."""
        kept = self._kept.get(partition)
        if kept and kept[0].offset <= offset + 1:
            start = offset + 1 - kept[0].offset
            return [kept[index] for index in range(start, min(start + PAGE, len(kept)))]
        epoch = self.epoch
        found = await self._process.storage.events.read_log(partition, offset, PAGE)
        return [self._written(event, epoch) for event in found]

    # --- Following -----------------------------------------------------------

    async def _restart(self) -> None:
        info = await self._process.storage.info()
        heads = dict(await self._process.storage.events.heads())
        self._kept.clear()
        self._sizes.clear()
        self.epoch, self.heads = info.log_epoch, heads
        self._notify()

    async def _follow(self) -> None:
        retry = Retry(log, "events not followed", bears=Exception)  # streams wait for it
        while True:
            async with retry:
                await self._follow_epoch()
                await self._restart()

    async def _follow_epoch(self) -> None:
        """Follow until the log is another one."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._follow_partition(each)) for each in self.heads]
            tasks.append(group.create_task(self._process.watcher.run()))
            tasks.append(group.create_task(self._process.nudger.hear(Nudge.EVENTS)))
            while True:
                info = await self._process.info.get(EPOCH_SECONDS)
                if info.log_epoch != self.epoch:
                    break
                await asyncio.sleep(EPOCH_SECONDS)
            for task in tasks:
                task.cancel()

    async def _follow_partition(self, partition: int) -> None:
        watcher, events = self._process.watcher, self._process.storage.events
        while True:
            offset = self.heads[partition]
            await watcher.wait_beyond(partition, offset)
            found = await events.read_log(partition, offset, KEPT_EVENTS)
            self._keep(partition, [self._written(event, self.epoch) for event in found])
            self._notify()

    def _keep(self, partition: int, written: Sequence[Written]) -> None:
        kept = self._kept.setdefault(partition, deque())
        kept.extend(written)
        size = self._sizes.get(partition, 0) + sum(len(each.body) for each in written)
        while kept and (len(kept) > KEPT_EVENTS or size > KEPT_BYTES):
            size -= len(kept.popleft().body)
        self._sizes[partition] = size
        if written:
            self.heads[partition] = written[-1].offset

    def _written(self, event: StoredEvent, epoch: str) -> Written:
        return Written(event.offset, event.event_type, to_cloudevent(event, self._source, epoch))


# --- One stream -------------------------------------------------------------------


async def stream_of(request: Request, tail: Tail, process: Process) -> Response:
    """Make the stream that a request asks for; raise a problem."""
    query, epoch = request.query_params, request.headers.get("Last-Event-ID")
    types = frozenset(filter(None, query.get("types", "").split(",")))
    partitions = _partitions(query.get("partition"), process.partitions)
    begin = query.get("from", "end")
    if begin not in {"start", "end"}:
        raise bad_request("invalid_query", "from must be start or end")
    try:
        await tail.joined()
        stream = EventStream(tail, types)
        if epoch is None:
            heads = tail.heads if begin == "end" else {}
            stream.positions = {each: heads.get(each, 0) for each in partitions}
        else:
            await stream.resume(epoch, partitions, process)
    except BaseException:
        await tail.left()
        raise
    return stream


def _partitions(text: str | None, count: int) -> Sequence[int]:
    if text is None:
        return range(count)
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= count:
        raise bad_request("invalid_query", f"partition must be a number from 0 to {count - 1}")
    return [int(text)]


class EventStream(Response):
    """Sends events until its client leaves, or the gateway does."""

    media_type = "text/event-stream"

    def __init__(self, tail: Tail, types: frozenset[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._tail = tail
        self._types = types
        self._epoch = tail.epoch
        self._other = False
        self.positions: dict[int, int] = {}

    async def resume(self, text: str, partitions: Sequence[int], process: Process) -> None:
        """Begin behind the event that a client had last; partitions it does not name, at 0."""
        found = _POSITION.fullmatch(text)
        if found is None:
            detail = "Last-Event-ID must be one of this stream's, EPOCH;PARTITION:OFFSET,…"
            raise bad_request("invalid_header", detail)
        places = (place.split(":") for place in found[2].split(",") if place)
        given = {int(partition): int(offset) for partition, offset in places}
        self._other = found[1] != self._epoch
        if self._other:
            given = {}
        elif any(offset > self._tail.heads.get(each, 0) for each, offset in given.items()):
            heads = await process.storage.events.heads()
            if any(offset > heads.get(each, 0) for each, offset in given.items()):
                detail = "Last-Event-ID is beyond the end of the log"
                raise bad_request("invalid_header", detail)
        self.positions = {each: given.get(each, 0) for each in partitions}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until something ends it."""
        sending = asyncio.create_task(self._send_all(scope, send))
        leaving = asyncio.create_task(_until_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(leaving)
            await cancelled(sending)
            await self._tail.left()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": HTTPStatus.OK.value}
        await send({**start, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            async for frames in self._frames():
                async with asyncio.timeout(WRITE_SECONDS):
                    await send({"type": "http.response.body", "body": frames, "more_body": True})
            async with asyncio.timeout(WRITE_SECONDS):
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.info("stream dropped", reason="the client does not read")
            abort = scope.get("state", {}).get("abort")
            if abort is not None:  # else the server keeps what it could not send
                abort()

    async def _frames(self) -> AsyncIterator[bytes]:
        yield (b"retry: 1000\n" if not self._other else self._epoch_frame()) + self._place()
        retry = Retry(log, "events unreadable", bears=errors.CqrsError)
        while not self._tail.ended:
            if self._tail.epoch != self._epoch:
                self._epoch = self._tail.epoch
                self.positions = dict.fromkeys(self.positions, 0)
                yield self._epoch_frame() + self._place()
            pages: list[tuple[int, Sequence[Written]]] = []
            async with retry:
                pages = await self._pages()
            for partition, page in pages:
                for frames in self._framed(partition, page):
                    yield frames
            if not pages:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        await self._tail.wait(self.positions, self._epoch)
                except TimeoutError:
                    yield b": ping\n" + self._place()

    async def _pages(self) -> list[tuple[int, Sequence[Written]]]:
        """Take what follows, a page at most: of the partition that has waited longest."""
        for partition, offset in list(self.positions.items()):
            if self._tail.heads.get(partition, 0) > offset:
                page = await self._tail.after(partition, offset)
                self.positions[partition] = self.positions.pop(partition)
                return [(partition, page)] if page else []
        return []

    def _framed(self, partition: int, page: Sequence[Written]) -> Iterator[bytes]:
        """Write a page, in pieces that are not large."""
        frames = bytearray()
        for event in page:
            self.positions[partition] = event.offset
            if not self._types or event.type in self._types:
                frames += b"data: " + event.body + b"\n" + self._place()
            if len(frames) > PIECE_BYTES:
                yield bytes(frames)
                frames.clear()
        if frames:
            yield bytes(frames)

    def _place(self) -> bytes:
        """Say how far the stream is, and end what is sent with it; places at 0 are left out."""
        places = (f"{each}:{at}" for each, at in sorted(self.positions.items()) if at)
        return f"id: {self._epoch};{','.join(places)}\n\n".encode()

    def _epoch_frame(self) -> bytes:
        return b"event: epoch\ndata: " + orjson.dumps({"logepoch": self._epoch}) + b"\n"


async def _until_left(receive: Receive) -> None:
    with suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
