"""What the wheel asks for: every library that it imports, within ranges that hold."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import inspect
import re
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from collections.abc import Iterator

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
SOURCES = {path: path.read_text() for path in sorted((PROJECT / "cqrs_es").rglob("*.py"))}

# The private names of libraries that are used, each with the reason. Their libraries have an
# upper bound in pyproject.toml: before it is raised, the names are looked at again.
PRIVATE = {
    # aiomysql closes a connection without waiting for the bytes that say so; what the server has
    # said unasked lies where nobody looks before the next statement.
    ("aiomysql", "_writer"),
    ("aiomysql", "_reader"),
    # The same of asyncpg: a connection that the server has ended during a freeze.
    ("asyncpg", "_transport"),
    # The server's close of a channel: amqp opens it again, without its consumers, and raises
    # the reason in whatever waits on the connection.
    ("amqp", "_on_close"),
    # What a channel still handles while it closes: amqp warns of every delivery beyond that.
    ("amqp", "_ALLOWED_METHODS_WHEN_CLOSING"),
}


def declared() -> dict[str, str]:
    """Return what the wheel depends on, extras included, by name, with its range."""
    extras = PYPROJECT["optional-dependencies"]
    wanted = [*PYPROJECT["dependencies"]]
    wanted += [one for name in extras if name not in {"all", "dev"} for one in extras[name]]
    matches = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", one) for one in wanted]
    return {match[1].lower(): match[2] for match in matches if match}


def imported() -> Iterator[set[str]]:
    """Yield of each import of the framework the packages that may be meant by it."""
    owners = importlib.metadata.packages_distributions()
    for text in SOURCES.values():
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import(names=names):
                    modules = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module)):
                    modules = [module]
                case _:
                    modules = []
            for name in {module.partition(".")[0] for module in modules}:
                if name not in {*sys.stdlib_module_names, "cqrs_es"}:
                    yield {owner.lower().replace("_", "-") for owner in owners[name]}


def test_every_library_that_is_imported_is_declared() -> None:
    """Nothing is there only because something else asks for it."""
    assert not [owners for owners in imported() if owners.isdisjoint(declared())]


def test_libraries_whose_private_names_are_used_have_an_upper_bound() -> None:
    """A newer version may move what was never promised."""
    for library, _ in PRIVATE:
        assert "<" in declared()[library]


def test_private_names_of_libraries_are_used_where_it_is_said() -> None:
    """Each is in the list above, so that whoever raises a bound knows what to look at."""
    marked = [line for text in SOURCES.values() for line in text.splitlines() if "SLF001" in line]
    # The last three are Python's: two are listed in the modules' `__all__` or documentation, what a
    # stream holds is looked for below.
    own = ["scenario._log", "dialect._", "sys._current_frames", "asyncio._get_running_loop"]
    own.append("reader._buffer")
    foreign = [line for line in marked if not any(name in line for name in own)]
    names = {name for _, name in PRIVATE}
    assert foreign
    assert all(any(name in line for name in names) for line in foreign)


async def test_aiomysql_keeps_its_writer_where_we_look_for_it() -> None:
    """It has one while it is connected, and none before."""
    aiomysql = pytest.importorskip("aiomysql.connection")
    assert vars(aiomysql.Connection())["_writer"] is None
    assert vars(aiomysql.Connection())["_reader"] is None
    assert "_buffer" in vars(asyncio.StreamReader())
    assert "self._writer.write(" in inspect.getsource(aiomysql.Connection.ensure_closed)


def test_asyncpg_keeps_its_transport_where_we_look_for_it() -> None:
    asyncpg = pytest.importorskip("asyncpg.connection")
    assert "_transport" in asyncpg.Connection.__slots__


def test_amqp_closes_a_channel_by_the_method_that_we_replace() -> None:
    """It is what the server's method of that name is handled by."""
    amqp = pytest.importorskip("amqp")
    channel: Any = amqp.Channel
    assert list(inspect.signature(channel._on_close).parameters)[1:] == [
        "reply_code",
        "reply_text",
        "class_id",
        "method_id",
    ]
    handled = inspect.getsource(channel._setup_listeners)
    assert re.search(r"spec\.Channel\.Close:\s*self\._on_close", handled)
    closing = {amqp.spec.Channel.Close, amqp.spec.Channel.CloseOk}
    assert set(channel._ALLOWED_METHODS_WHEN_CLOSING) == closing
