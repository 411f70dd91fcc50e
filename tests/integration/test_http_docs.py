"""The page about HTTP runs as it stands, on a port of its own."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from tests.bank_data import PROJECT
from tests.pages import check

if TYPE_CHECKING:
    from pathlib import Path

PAGE = PROJECT / "docs" / "http.md"


def test_the_page_prints_what_it_says(tmp_path: Path) -> None:
    """Every command up to the first module of a shop's own."""
    page, _, _ = PAGE.read_text().partition("## Who may do what")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check(page.replace("8000", str(port)), tmp_path)
