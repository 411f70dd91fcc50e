"""`schema check`: against a file, against git, and against what is stored."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command_line import Here, Result

OLD, NEW = "tests.apps.people:old", "tests.apps.people:new"


@pytest.fixture
def committed(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository that has the old description, in a folder; be in it."""
    here.done("--app", OLD, "schema", "export", str(tmp_path / "api"), "--only", "schemas.json")
    monkeypatch.chdir(tmp_path)
    git = shutil.which("git")
    assert git is not None
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    for words in (("init", "--quiet"), ("add", "api"), (*author, "commit", "--quiet", "-m", "x")):
        subprocess.run([git, *words], cwd=tmp_path, check=True)
    return tmp_path / "api" / "schemas.json"


def verdicts(result: Result) -> set[tuple[str, str, str]]:
    return {(line["verdict"], line["audience"], line["type"]) for line in result.lines}


def test_a_file_is_compared(here: Here, committed: Path) -> None:
    """Upcasters keep older senders; without the new code's ones everything else is a break."""
    assert here.done("--app", NEW, "schema", "check", "--against", str(committed)).out == ""
    newer = committed.with_name("newer.json")
    here.done("--app", NEW, "schema", "export", str(committed.parent), "--only", "schemas.json")
    committed.rename(newer)
    result = here("--app", OLD, "schema", "check", "--against", str(newer), "--json")
    assert result.code == 1
    assert ("break", "senders", "command person.Register") in verdicts(result)
    assert all(line["remedy"] for line in result.lines)
    table = here("--app", OLD, "schema", "check", "--against", str(newer))
    assert "known up to 1.0.0" in table.out
    for_others = ("--for", "stored,subscribers")
    here.done("--app", OLD, "schema", "check", "--against", str(newer), *for_others)


def test_git_has_the_older_one(here: Here, committed: Path) -> None:
    """By any name of a commit, wherever the file is; what is in the folder now does not count."""
    committed.write_text("{}")
    check = ("--app", NEW, "schema", "check", "--against", "HEAD")
    here.done(*check, "--path", "api/schemas.json")
    refused = here(*check)
    assert refused.code == 2
    assert "HEAD has no schemas.json" in refused.complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--against", "nowhere"], "no such commit"),
        (["--against", "--output=x"], "no such commit"),
        (["--against", "api/schemas.json", "--for", "readers"], "a list of stored"),
        ([], "nothing to check"),
    ],
)
def test_what_can_not_be_checked_is_refused(
    here: Here, committed: Path, arguments: list[str], complaint: str
) -> None:
    """With exit code 2, which is no break."""
    result = here("--app", NEW, "schema", "check", *arguments)
    assert result.code == 2
    assert complaint in result.complaint
    assert committed.exists()


def test_a_file_that_is_none_is_refused(here: Here, tmp_path: Path) -> None:
    """Whatever it is instead."""
    for content in (b"", b"[]", b'{"format": 1}', b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        result = here("schema", "check", "--against", str(tmp_path / "x.json"))
        assert result.code == 2, content
        assert "schema export" in result.complaint


def test_what_is_stored_is_read(bank: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that the code has not got are a break, whatever was committed."""
    bank.done("schema", "check", "--store")
    monkeypatch.setenv("CQRS_ES_SERVICE", "bank")
    result = bank("--app", NEW, "schema", "check", "--store", "--json")
    assert result.code == 1
    assert ("break", "stored", "event AccountOpened 1.0 of account") in verdicts(result)
    bank.done("--app", NEW, "schema", "check", "--store", "--for", "senders")


def test_the_bank_breaks_nobody(here: Here) -> None:
    """Its committed description is the one that its code has."""
    assert here.done("schema", "check", "--against", "schemas.json", "--json").out == ""
