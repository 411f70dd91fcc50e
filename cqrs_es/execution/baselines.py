"""What an aggregate was when it was last committed: the state that decisions start from."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.ports.store import LoadRequest, Snapshot

if TYPE_CHECKING:
    from cqrs_es.definitions import AggregateDefinition, AnyAggregate
    from cqrs_es.ports.store import LoadedAggregate
    from cqrs_es.types import AggregateKey


@dataclass(frozen=True, slots=True)
class Baseline:
    """An aggregate's encoded state after event `sequence`.

    `snapshot` is the number of its snapshot row, 0 for none; `mend_snapshot`
    says that the row can't be decoded and the next commit must replace it.
    """

    state: bytes
    sequence: int
    snapshot: int = 0
    mend_snapshot: bool = False


class BaselineCache:
    """The most recently used baselines. Written only after a commit.

    Never trusted: what is decided on a stale one conflicts when it is
    appended, is dropped from here and decided again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._baselines: OrderedDict[AggregateKey, Baseline] = OrderedDict()

    def get(self, key: AggregateKey) -> Baseline | None:
        """Return an aggregate's baseline if it is here."""
        baseline = self._baselines.get(key)
        if baseline is not None:
            self._baselines.move_to_end(key)
        return baseline

    def put(self, key: AggregateKey, baseline: Baseline) -> None:
        """Keep a baseline, dropping the one used longest ago if there are too many."""
        self._baselines[key] = baseline
        self._baselines.move_to_end(key)
        if len(self._baselines) > self._most:
            self._baselines.popitem(last=False)

    def drop(self, key: AggregateKey) -> None:
        """Forget an aggregate's baseline."""
        self._baselines.pop(key, None)


def load_request(definition: AggregateDefinition, key: AggregateKey) -> LoadRequest:
    """Say what to read of an aggregate to make its baseline."""
    return LoadRequest(key, snapshot=definition.source.reads_snapshots)


def baseline_from(definition: AggregateDefinition, loaded: LoadedAggregate) -> Baseline | None:
    """Fold what was loaded; None when its snapshot can't be used and all events are needed.

    Raises `UnknownEvent` and `UndecodableRow` as decoding does.
    """
    if loaded.snapshot is None:
        return _fold(definition, definition.cls(), 0, loaded, snapshot=0)
    try:
        state = definition.state.decode_exactly(loaded.snapshot.payload)
    except ValueError:
        return None
    snapshot = loaded.snapshot
    return _fold(definition, state, snapshot.last_sequence, loaded, snapshot=snapshot.number)


def mended_baseline(
    definition: AggregateDefinition, bad: Snapshot, loaded: LoadedAggregate
) -> Baseline:
    """Fold all events in place of a snapshot that can't be decoded."""
    whole = _fold(definition, definition.cls(), 0, loaded, snapshot=bad.number)
    return Baseline(whole.state, whole.sequence, bad.number, mend_snapshot=True)


def _fold(
    definition: AggregateDefinition,
    state: AnyAggregate,
    sequence: int,
    loaded: LoadedAggregate,
    *,
    snapshot: int,
) -> Baseline:
    for event in loaded.events:
        if event.sequence != sequence + 1:
            message = f"{event.key}: event {sequence + 1} is missing before {event.sequence}"
            raise errors.BrokenLog(message)
        for data in definition.decode(event):
            state.apply(data)
        sequence = event.sequence
    return Baseline(definition.state.encode(state), sequence, snapshot)
