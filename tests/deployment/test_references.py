"""What code, tests and documentation cite exists; the contract's page says what the code does."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING

import pytest
import typer.main

from cqrs_es.cli.main import cli
from cqrs_es.settings import Settings
from cqrs_es.stores.sql.tables import FRAMEWORK
from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCS = PROJECT / "docs"
CONTRACT = (DOCS / "contract.md").read_text()
ACCEPTANCE = (DOCS / "acceptance.md").read_text()
PAGES = [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = (
    "cqrs_es",
    "domain",
    "worker",
    "projectors",
    "config",
    "deploy",
    "examples",
    "tests",
    "benchmarks",
)
SOURCES = [path for folder in FOLDERS for path in sorted((PROJECT / folder).rglob("*.py"))]
TESTS = [path for path in SOURCES if path.is_relative_to(PROJECT / "tests")]

CASE = re.compile(r"\b[ABCD][1-9]\d?\b")
CASE_IN_NAME = re.compile(r"(?<=_)[abcd][1-9]\d?(?=_|$)")
PROMISE = re.compile(r"\bG[1-9]\d?\b")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md(?:, (?P<heading>[A-Z][a-z]+(?: [a-z]+)*))?")
LINK = re.compile(r"\]\((?P<page>[^)#\s:]*)(?:#(?P<anchor>[^)\s]+))?\)")


def headings(page: Path) -> set[str]:
    """Return a page's headings; what is in a block of code is none."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^#+ (.+)$", prose, re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Return what links within a page may name, as GitHub makes it from its headings."""
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings(page)}


@cache
def documented_tests() -> list[tuple[str, str]]:
    """Return the name and the docstring of every test."""
    return [
        (node.name, ast.get_docstring(node) or "")
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]


def cited_cases() -> set[str]:
    """Return the acceptance cases that tests have in their names or docstrings."""
    return {
        case
        for name, docstring in documented_tests()
        for case in (*CASE.findall(docstring), *map(str.upper, CASE_IN_NAME.findall(name)))
    }


def known_cases() -> set[str]:
    return set(re.findall(r"^\| ([ABCD]\d+) \|", ACCEPTANCE, re.MULTILINE))


def test_every_acceptance_case_has_a_test() -> None:
    """Its number is in the test's name or docstring; and there is no other number."""
    assert cited_cases() == known_cases()


def test_every_promise_that_is_cited_is_made() -> None:
    """G and a number: the page on promises has a section for each."""
    made = {name.split()[0] for name in headings(DOCS / "promises.md")}
    cited = {found for path in (*SOURCES, *PAGES) for found in PROMISE.findall(path.read_text())}
    assert cited <= made


def test_every_page_that_code_cites_exists() -> None:
    """With the heading, where one is named; nothing outside of the repository is cited."""
    for path in SOURCES:
        text = path.read_text()
        for found in PAGE.finditer(text):
            page = PROJECT / found[0].partition(",")[0]
            assert page.exists(), f"{path}: {found[0]}"
            assert found["heading"] in {None, *headings(page)}, f"{path}: {found[0]}"
        assert not re.search(r"(?:DESIGN|CONTRACT|ACCEPTANCE) \S*\d|§ ?\d", text), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading of it where one is named."""
    for link in LINK.finditer(page.read_text()):
        target = page.parent / link["page"] if link["page"] else page
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target), link[0]


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md", "docs/promises.md"])
def test_every_source_file_that_a_page_names_exists(name: str) -> None:
    """Its path is below the repository or the framework; `*` and `<name>` stand for one folder."""
    paths = r"`((?:[\w*<>-]+/)+|(?:[\w*<>-]+/)*[\w*-]+\.py)`"
    for found in re.findall(paths, (PROJECT / name).read_text()):
        pattern = re.sub(r"<\w+>", "*", found)
        assert any(any(root.glob(pattern)) for root in (PROJECT, PROJECT / "cqrs_es")), found


# --- The contract's page -----------------------------------------------------


def rows_below(heading: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables below a heading."""
    section = CONTRACT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_contract_has_every_table() -> None:
    """With its columns in order, and its key."""
    told = {names[0]: row for row in rows_below("Tables") if (names := names_in(row[0]))}
    assert set(told) == {table.name for table in FRAMEWORK}
    for table in FRAMEWORK:
        _, columns, key = told[table.name]
        assert tuple(names_in(columns)) == table.columns
        assert tuple(names_in(key)) == table.key


def test_the_contract_has_every_setting_with_its_default() -> None:
    """A setting without a value has a rule, which is told in words; so have remotes' URLs."""
    told = {names[0]: row[1] for row in rows_below("Settings") if (names := names_in(row[0]))}
    own = [field for field in fields(Settings) if field.name != "remote_urls"]
    assert set(told) == {field.name.upper() for field in own}
    for field in own:
        if field.default is not None:
            default = str(field.default).removesuffix(".0")
            default = default.lower() if isinstance(field.default, bool) else default
            assert told[field.name.upper()].strip("`") == default


def test_the_contract_has_every_verb() -> None:
    """Those of groups by both words."""
    told = {
        " ".join(word for word in name.split()[:2] if word.islower())
        for row in rows_below("Command line")
        for name in names_in(row[0])
    }
    group = typer.main.get_command(cli)
    assert told == set(_verbs(group))


def _verbs(group: object) -> Iterator[str]:
    for name, command in getattr(group, "commands", {}).items():
        within = list(_verbs(command))
        yield from (f"{name} {verb}" for verb in within) if within else [name]
