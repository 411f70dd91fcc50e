"""What authors subclass to fold events into rows that queries read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from cqrs_es.projector import check_view_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.messages import Envelope

E = TypeVar("E")


class View(ABC, Generic[E]):
    """One row of a read model, kept as JSON by the framework.

    Subclass as `class Ledger(View[Event], name="ledger")` and make it a
    dataclass whose fields all have defaults: those are a row's first state.
    Its rows are made anew when its fields change; when only what they mean
    does, say so: `name="ledger", version="2"`.
    """

    view_name: ClassVar[str]
    view_version: ClassVar[str] = ""
    _deleted = False

    def __init_subclass__(cls, *, name: str | None = None, version: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            cls.view_name = check_view_name(name)
        if version is not None:
            cls.view_version = version

    @classmethod
    def view_id(cls, event: Envelope[E]) -> str | Iterable[str] | None:
        """Say which row or rows an event belongs to: by default its aggregate's own."""
        return event.aggregate_id

    @abstractmethod
    def update(self, event: Envelope[E]) -> None:
        """Fold an event into the row; called once for each event and row, in order."""

    @property
    def deleted(self) -> bool:
        """Whether `update` has asked for the row to be deleted."""
        return self._deleted

    def delete(self) -> None:
        """Delete the row, to be called from `update`; a later event starts it afresh."""
        self._deleted = True
