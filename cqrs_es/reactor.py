"""What authors subclass so that events cause commands: reactors and process managers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, TypeAlias, TypeVar

from cqrs_es import errors
from cqrs_es.aggregate import Handled, Stateful
from cqrs_es.intents import Elapsed, Send
from cqrs_es.projector import check_view_name

if TYPE_CHECKING:
    from cqrs_es.messages import Envelope

I = TypeVar("I")  # noqa: E741 - inputs
E = TypeVar("E")

Since: TypeAlias = Literal["now", "start"]
Reacted: TypeAlias = AsyncIterator[Send] | Iterable[Send] | Awaitable[Iterable[Send] | None] | None

# A role's and a checkpoint's name hold it and some more in 64 characters.
MAX_NAME_CHARACTERS: Final = 50


class Reactor(ABC, Generic[E]):
    """Sends commands because of events; it has no memory of its own.

    Subclass as `class Welcome(Reactor[AccountOpened], name="welcome")`. It sees events from
    the moment it is first deployed, or all there ever were with `since="start"`; no event is
    ever reacted to again because of a rebuild.
    """

    name: ClassVar[str]
    since: ClassVar[Since] = "now"

    def __init_subclass__(cls, *, name: str | None = None, since: Since = "now") -> None:
        super().__init_subclass__()
        cls.since = _checked(since)
        if name is not None:
            cls.name = check_view_name(name)

    @abstractmethod
    def react(self, event: Envelope[E], services: Any) -> Reacted:
        """Yield what to `send`, or return a list of it; a plain or an async function or generator.

        What it sends is sent once. It may itself run more than once for one event, so calls
        to other systems must be safe to repeat: the id in the context that the services are
        made from is the event's.
        """


@dataclass(frozen=True, slots=True)
class Refused:
    """A command that a process manager has sent was rejected: by which rule, and why."""

    command: object
    code: str
    message: str


Input: TypeAlias = I | Elapsed | Refused


class ProcessManager(Stateful[E], Generic[I, E]):
    """A process over several aggregates: their events tell it how far it is, and it sends commands.

    Subclass as `class Transfer(ProcessManager[Inputs, OwnEvents], type="transfer")` and make it a
    dataclass whose fields all have defaults. Its inputs are events of other aggregates, its
    own timers (`Elapsed`) and `Refused`. What its commands cause comes back to the instance
    that sent them. An instance always exists, in its first state.
    """

    since: ClassVar[Since] = "now"

    def __init_subclass__(cls, *, type: str | None = None, since: Since = "now") -> None:  # noqa: A002
        super().__init_subclass__(type=type)
        cls.since = _checked(since)
        if type is not None and len(type) > MAX_NAME_CHARACTERS:
            most = MAX_NAME_CHARACTERS
            message = f"a process manager's type has at most {most} characters, not {len(type)}"
            raise errors.DefinitionError(message)

    @classmethod
    def process_id(cls, event: Envelope[Any]) -> str | None:
        """Say which instance an event is for that none of this type has caused; None for none."""
        del event
        return None

    @property
    def closed(self) -> bool:
        """Whether the process is over: further inputs are then dropped and counted."""
        return False

    @abstractmethod
    def handle(self, given: Input[I]) -> Handled[E]:
        """Take an input: yield own events, `send`, `later`, `cancel`, as an aggregate does.

        What raises is tried again, and in the end waits for an operator, with all later
        inputs of the instance behind it.
        """


def reactor_role(name: str) -> str:
    """Return the role of a reactor, which is also the name that its checkpoints go by."""
    return f"reactor:{name}"


def _checked(since: Since) -> Since:
    if since not in {"now", "start"}:
        message = f'since={since!r}: "now" or "start"'
        raise errors.DefinitionError(message)
    return since
