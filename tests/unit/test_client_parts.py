"""What the client is made of: putting events in order, keeping a place in the log."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.client import FileCursor, Position
from cqrs_es.client.following import Gap, Ordering
from cqrs_es.messages import StoredEvent
from cqrs_es.types import AggregateKey, utc_now

if TYPE_CHECKING:
    from pathlib import Path


def event(offset: int, partition: int = 0) -> StoredEvent:
    return StoredEvent(
        key=AggregateKey("account", "A1"),
        sequence=offset,
        event_type="Happened",
        event_version="1.0",
        payload=b"{}",
        metadata=b"{}",
        partition=partition,
        offset=offset,
        command_id=None,
        recorded_at=utc_now(),
    )


def offered(order: Ordering, *offsets: int) -> list[int]:
    return [ready.offset for ready in order.offer(map(event, offsets))]


# --- Ordering ----------------------------------------------------------------


def test_what_is_in_order_passes() -> None:
    order = Ordering({0: 3})
    assert offered(order, 4, 5) == [4, 5]
    assert order.reached == {0: 5}
    assert order.gaps() == []


def test_what_came_before_is_dropped() -> None:
    assert offered(Ordering({0: 3}), 2, 3, 4, 4, 3, 5) == [4, 5]


def test_what_lies_beyond_a_gap_waits() -> None:
    order = Ordering({0: 0, 1: 0})
    assert offered(order, 1, 4, 5) == [1]
    assert order.gaps() == [Gap(0, 2, 3)]
    assert order.held == 2
    assert offered(order, 2) == [2]
    assert order.gaps() == [Gap(0, 3, 3)]
    assert offered(order, 3) == [3, 4, 5]
    assert order.gaps() == []


def test_other_partitions_do_not_wait() -> None:
    order = Ordering({0: 0, 1: 0})
    order.offer([event(9)])
    assert [ready.partition for ready in order.offer([event(1, partition=1)])] == [1]


def test_what_is_held_can_be_forgotten() -> None:
    order = Ordering({0: 0})
    assert offered(order, 3) == []
    order.forget_held()
    assert order.gaps() == []
    assert offered(order, 1, 2) == [1, 2]


def test_an_unknown_beginning_is_the_first_that_comes() -> None:
    order = Ordering({0: None})
    assert offered(order, 17, 18) == [17, 18]
    assert offered(order, 16, 20) == []
    assert order.gaps() == [Gap(0, 19, 19)]


@given(st.integers(0, 2**32))
def test_any_order_becomes_the_right_one(seed: int) -> None:
    """However events are shuffled and repeated, each comes out once, in order."""
    arriving = [*range(1, 30), *range(5, 20)]
    random.Random(seed).shuffle(arriving)
    assert offered(Ordering({0: 0}), *arriving) == list(range(1, 30))


# --- Cursors -----------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


async def test_a_file_keeps_a_position(tmp_path: Path) -> None:
    """What one process saved, the next loads; before the first there is nothing."""
    path = tmp_path / "cursor.json"
    position = Position("5f0c0000-0000-4000-8000-000000000001", {0: 17, 11: 2**60})
    assert await FileCursor(path).load() is None
    await FileCursor(path).save(Position("other", {}))
    await FileCursor(path).save(position)
    assert await FileCursor(path).load() == position
    assert names_in(tmp_path) == ["cursor.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"offsets": {}}', b'{"log_epoch": "e", "offs'])
async def test_a_file_that_is_no_cursor(tmp_path: Path, content: bytes) -> None:
    """It is not taken for a new one: everything would come again."""
    path = tmp_path / "cursor.json"
    path.write_bytes(content)
    with pytest.raises(errors.ConfigurationError, match="fix it, or delete it to begin anew"):
        await FileCursor(path).load()
    assert path.read_bytes() == content


async def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    """The subscriber is told, rather than going on without a place."""
    with pytest.raises(errors.ConfigurationError, match="can't be written"):
        await FileCursor(tmp_path / "no such folder" / "cursor.json").save(Position("e", {}))
