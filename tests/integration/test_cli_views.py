"""`rebuild` and `parked` as an operator uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.command_line import EXAMPLE
from tests.terminal import on_a_terminal, without_escapes

if TYPE_CHECKING:
    from tests.command_line import Here

FRAGILE = ("--app", "tests.apps.fragile:app")


def views(here: Here, *app: str) -> dict[str, tuple[int, int | None]]:
    """Return each view's live generation, and the one that is being built."""
    status: Any = here.done(*app, "status", "--json").json
    return {view["view"]: (view["generation"], view["building"]) for view in status["views"]}


# --- rebuild -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["account_query", "bank_totals"])
def test_rebuild(bank: Here, name: str) -> None:
    """The next generation is live and holds what the old one held, which stays."""
    before = bank.done("view", name, "--json").out
    result = bank.done("rebuild", name, "--json")
    assert result.json == {"view": name, "live": 2}
    assert views(bank)[name] == (2, None)
    assert bank.done("view", name, "--json").out == before
    assert bank.done("rebuild", name, "--switch-to", "1").out == f"view  {name}\nlive  1\n"
    assert bank.done("view", name, "--json").out == before


def test_rebuild_tells_how_far_it_is(bank: Here) -> None:
    """On stderr, as a log line: share, rate and time left."""
    lines = [orjson.loads(line) for line in bank.done("rebuild", "bank_totals").err.splitlines()]
    last = [line for line in lines if line["event"] == "rebuilding"][-1]
    assert (last["view"], last["generation"]) == ("bank_totals", 2)
    assert (last["events"], last["of"], last["percent"], last["seconds_left"]) == (26, 26, 100, 0)
    assert last["events_per_second"] > 0


def test_rebuild_on_a_terminal(bank: Here, sqlite_url: str) -> None:
    """A bar with the same; stdout gets the result only."""
    del bank  # it has filled the log
    shown = without_escapes(on_a_terminal("rebuild", "bank_totals", CQRS_ES_STORE_URL=sqlite_url))
    assert "100%" in shown
    assert "26 of 26 events" in shown
    assert "/s, 0:00:00 left" in shown
    assert shown.endswith("view  bank_totals\nlive  2\n")


def test_drop_and_abort(bank: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is live stays; what was left behind can be dropped, what was begun given up."""
    refused = bank("rebuild", "account_query", "--drop", "1")
    assert refused.code == 2
    assert "generation 1 of account_query is live" in refused.complaint
    bank.done("rebuild", "account_query")
    assert bank.done("rebuild", "account_query", "--drop", "1", "--json").json == {
        "view": "account_query", "dropped": 1
    }  # fmt: skip
    gone = bank("rebuild", "account_query", "--switch-to", "1")
    assert gone.code == 1
    assert "account_query has no generation 1; live is 2" in gone.complaint
    nothing = bank("rebuild", "account_query", "--abort")
    assert nothing.code == 1
    assert "no rebuild of account_query is under way" in nothing.complaint

    bank.done(*FRAGILE, "run", "--until-idle")
    monkeypatch.setenv("BROKEN", "ada")
    assert bank(*FRAGILE, "rebuild", "fragile").code == 1
    assert views(bank, *FRAGILE)["fragile"] == (1, 2)
    assert bank.done(*FRAGILE, "rebuild", "fragile", "--abort", "--json").json == {
        "view": "fragile", "dropped": 2
    }  # fmt: skip
    assert views(bank, *FRAGILE)["fragile"] == (1, None)


def test_removing_what_the_code_has_no_more(bank: Here) -> None:
    """A view of other code is named with its tables; one's own is refused."""
    bank.done(*FRAGILE, "run", "--until-idle")
    assert bank.done("rebuild", "fragile", "--remove", "--json").json == {
        "view": "fragile", "removed": ["fragile__1"]
    }  # fmt: skip
    assert bank("rebuild", "fragile", "--remove").code == 1
    refused = bank("rebuild", "account_query", "--remove")
    assert refused.code == 2
    assert "take it out before you remove its tables" in refused.complaint


def test_rebuild_of_a_view_that_fails(bank: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event is named with its reason, and what readers see is as it was."""
    bank.done(*FRAGILE, "run", "--until-idle")
    before = bank.done(*FRAGILE, "view", "fragile", "--json").out
    monkeypatch.setenv("BROKEN", "ada")
    result = bank(*FRAGILE, "rebuild", "fragile")
    assert result.code == 1
    assert "account/ada/3" in result.complaint
    assert "LookupError: no such column; fix the view" in result.complaint
    assert bank.done(*FRAGILE, "view", "fragile", "--json").out == before
    assert bank.done(*FRAGILE, "parked", "list").out.splitlines()[1:] == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("nothing",), 1),
        (("account_query", "--drop", "7"), 1),
        (("account_query", "--drop", "0"), 2),
        (("account_query", "--abort", "--drop", "1"), 2),
        (("account_query", "--switch-to", "1", "--drop", "1"), 2),
        (("nothing", "--remove"), 1),
        (("nothing", "--remove", "--abort"), 2),
        (("events", "--remove"), 2),
    ],
)
def test_rebuild_of_what_is_not_there(bank: Here, arguments: tuple[str, ...], code: int) -> None:
    """Unknown views and generations are not found; of the options one at a time."""
    result = bank("rebuild", *arguments)
    assert (result.code, result.out) == (code, "")


# --- parked ------------------------------------------------------------------


@pytest.fixture
def parked(here: Here, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Park two of the example's accounts."""
    monkeypatch.setenv("BROKEN", "ada chloe")
    here.done(*FRAGILE, "run", "--commands", str(EXAMPLE), "--until-idle")
    return here


def test_parked_for_people(parked: Here) -> None:
    """By the name that `parked retry` takes, with the reason; the status counts them."""
    lines = parked.done(*FRAGILE, "parked", "list").out.splitlines()
    assert lines[0].split() == ["view", "aggregate", "from", "sequence", "attempts", "reason"]
    assert lines[1].split(maxsplit=4) == [
        "fragile", "account/ada", "3", "1", "LookupError: no such column"
    ]  # fmt: skip
    status = parked.done(*FRAGILE, "status").out.splitlines()
    assert status[1].split() == ["fragile", "1", "0", "2"]
    assert status[2].split() == ["bank_totals", "1", "0", "0"]
    strict = parked(*FRAGILE, "run", "--until-idle", "--strict")
    assert (strict.code, "parked aggregates: 2" in strict.complaint) == (1, True)


def test_retry_of_what_still_fails(parked: Here) -> None:
    """It stays parked, one attempt more: exit code 1."""
    result = parked(*FRAGILE, "parked", "retry", "fragile", "--json")
    assert result.code == 1
    assert [line["parked"] for line in result.lines] == [True, True]
    found = parked.done(*FRAGILE, "parked", "list", "--json").lines
    assert [(p["projector"], p["generation"], p["attempts"]) for p in found] == [
        ("fragile", 1, 2)
    ] * 2


def test_retry_of_what_is_mended(parked: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fixed account catches up by itself; in the end the view is that of a sound bank."""
    monkeypatch.setenv("BROKEN", "chloe")
    one = parked(*FRAGILE, "parked", "retry", "fragile", "--aggregate", "account", "ada")
    assert (one.code, one.out) == (0, "account/ada has caught up\n")
    assert parked(*FRAGILE, "parked", "retry", "fragile").out == "account/chloe failed again\n"
    monkeypatch.delenv("BROKEN")
    parked.done(*FRAGILE, "parked", "retry", "fragile")
    rows = parked.done(*FRAGILE, "view", "fragile", "--json").lines
    parked.done("run", "--until-idle")  # the bank's own views, from the same log
    sound = parked.done("view", "account_query", "--json").lines
    assert [row["payload"] for row in rows] == [row["payload"] for row in sound]
    assert parked.done(*FRAGILE, "parked", "list", "--json").lines == []


def test_retry_of_what_is_not_parked(parked: Here) -> None:
    """It is not found: exit code 1."""
    result = parked(*FRAGILE, "parked", "retry", "fragile", "--aggregate", "account", "ben")
    assert result.code == 1
    assert "account/ben is not parked for fragile" in result.complaint
