"""The guide's code runs as it stands and prints what the page says."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from typing import TYPE_CHECKING

from tests import pages
from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from pathlib import Path

PAGE = PROJECT / "docs" / "guide.md"
MOST_LINES_OF_A_TRANSFER = 60
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def test_the_guide_prints_what_it_says(tmp_path: Path) -> None:
    """From the first class to processes: every block, one after another, in one folder."""
    pages.check(PAGE.read_text(), tmp_path)


def test_the_guides_code_is_typed(tmp_path: Path) -> None:
    """Who copies it into a strictly typed project has nothing to add."""
    code = [block.code for block in pages.blocks(PAGE.read_text()) if block.language == "python"]
    for number, block in enumerate(code):
        with pages.file_of(block, tmp_path / f"block_{number}.py").open("a") as file:
            file.write(block)
    strictly = ("--strict", "--explicit-package-bases", "--cache-dir", str(tmp_path / "cache"))
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *strictly, "."],
        cwd=tmp_path,
        capture_output=True,
        timeout=pages.TIMEOUT_SECONDS,
        check=False,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_a_transfer_a_deadline_and_a_unique_value_are_a_page_of_code() -> None:
    """The domain of the chapter on processes, in lines that are no import, comment or blank."""
    code = [block.code for block in pages.blocks(PAGE.read_text())]
    domain = [each for each in code if each.startswith("# transfers/")]
    assert [each.partition("\n")[0] for each in domain] == [
        "# transfers/accounts.py",
        "# transfers/process.py",
    ]
    assert sum(map(lines_of_code, domain)) <= MOST_LINES_OF_A_TRANSFER


def lines_of_code(code: str) -> int:
    """Count the lines on which there is code, but for imports."""
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    imports = [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return len(found - {n for each in imports for n in _lines(each)})


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def test_its_table_of_contents_leads_to_its_chapters() -> None:
    """Every link is to a heading, in their order."""
    text = PAGE.read_text()
    links = re.findall(r"^\d+\. \[(.+)\]\(#(.+)\)$", text, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name, _ in links] == headings
    assert [anchor for _, anchor in links] == [
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
    ]
