"""Users with an e-mail address that no other has; as a program, many who want the same ones.

python -m tests.apps.users register PREFIX COUNT ADDRESS   registers COUNT users at once
python -m tests.apps.users change PREFIX SEED              changes addresses until it is killed
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import orjson

from cqrs_es import Aggregate, command, errors, event
from cqrs_es.application import Application
from cqrs_es.types import new_command_id

if TYPE_CHECKING:
    from cqrs_es.messages import Outcome
    from cqrs_es.opened import OpenApplication

ADDRESSES = tuple(f"{name}@x.org" for name in ("ada", "bob", "cid", "dan", "eve"))
USERS = 4


@command
class Register:
    email: str


@command
class Leave:
    pass


@event
class Registered:
    email: str


@event
class Left:
    pass


@dataclass
class User(Aggregate[Register | Leave, Registered | Left, None], type="user"):
    email: str | None = None

    def handle(
        self,
        command: Register | Leave,
        services: None,  # noqa: ARG002
    ) -> Iterator[Registered | Left]:
        match command:
            case Register(email):
                yield Registered(email)
            case Leave():
                yield Left()

    def apply(self, event: Registered | Left) -> None:
        self.email = event.email if isinstance(event, Registered) else None

    def keys(self) -> Mapping[str, str]:
        return {"email": self.email.casefold()} if self.email else {}


app = Application("users")
app.aggregate(User)


async def register(prefix: str, users: int, email: str) -> None:
    """Register users with one address at once; print how many outcomes of each kind there are."""
    outcomes: list[Outcome] = []
    while not outcomes:
        with suppress(errors.StoreUnavailable):  # so many open it at once
            async with app.open() as opened:
                outcomes = await asyncio.gather(
                    *(answered(opened, f"{prefix}-{n}", Register(email)) for n in range(users))
                )
    kinds = Counter(o.error.code if o.error else o.status.value for o in outcomes)
    sys.stdout.write(orjson.dumps(kinds).decode())


async def answered(opened: OpenApplication, user: str, command: Register) -> Outcome:
    """Execute a command, again while so many want one SQLite file that its lock is not had."""
    command_id = new_command_id()
    while True:
        try:
            return await opened.execute(User, user, command, command_id=command_id)
        except errors.StoreUnavailable:
            continue


async def change(prefix: str, seed: str) -> None:
    """Have a few users take each other's addresses, for ever."""
    chosen = random.Random(seed)
    async with app.open() as opened:
        for number in count():
            user = f"{prefix}-{chosen.randrange(USERS)}"
            email = chosen.choice((*ADDRESSES, None))
            await opened.execute(User, user, Register(email) if email else Leave())
            if number == 0:
                sys.stdout.write("changing\n")
                sys.stdout.flush()


def main(arguments: list[str]) -> None:
    verb, prefix, *rest = arguments
    if verb == "register":
        asyncio.run(register(prefix, int(rest[0]), rest[1]))
    else:
        asyncio.run(change(prefix, rest[0]))
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
