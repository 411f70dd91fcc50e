"""Pages of the documentation as programs: every block runs, and prints what the page says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.command_line import environment

TIMEOUT_SECONDS = 100.0
ANYTHING = "…"
END = "\N{SYMBOL FOR RECORD SEPARATOR}"
_FILE = re.compile(r"# ([\w/]+\.py)(?:, continued)?\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of code on the page, and what the page says that it prints.

    One that begins with a file's name is added to that file; others are run.
    """

    language: str
    code: str
    prints: str | None

    @property
    def script(self) -> str:
        """The block as part of a shell script, followed by a mark in the output."""
        return f"{self._do()}echo '{END}'\n"

    def _do(self) -> str:
        if self.language == "sh":
            return self.code
        document = f"<<'END_OF_BLOCK'\n{self.code}END_OF_BLOCK\n"
        file = _FILE.match(self.code)
        if file is None:
            return f"python - {document}"
        path = Path(file[1])
        return f"mkdir -p {path.parent}\ncat >> {path} {document}"

    def check(self, printed: str) -> None:
        """Compare what was printed with what the page says, where it says anything."""
        if self.prints is None:
            return
        expected = ".*".join(map(re.escape, self.prints.split(ANYTHING)))
        fits = re.fullmatch(expected, printed, re.DOTALL if self.prints[0] == ANYTHING else 0)
        assert fits, f"after\n{self.code}\nthere was\n{printed}"


def file_of(code: str, otherwise: Path) -> Path:
    """Return the file that a block of code is added to, in the folder of the other one."""
    named = _FILE.match(code)
    path = otherwise.parent / named[1] if named else otherwise
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def blocks(page: str) -> list[Block]:
    """Find the pieces of code on a page, each with the text block that follows it."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    followers = [*found[1:], ("", "")]
    return [
        Block(language, code, follower[1] if follower[0] == "text" else None)
        for (language, code), follower in zip(found, followers, strict=True)
        if language in {"sh", "python"}
    ]


def run(script: str, folder: Path, app: str = "worker.app:app") -> str:
    """Run a shell script in a folder, with what it starts in the background ended after it."""
    path, log = folder / "stdout", folder / "stderr"
    with path.open("wb") as out, log.open("wb") as err:
        shell = subprocess.Popen(
            ["/bin/bash", "-euc", script],
            cwd=folder,
            env=_on_the_path(environment({"CQRS_ES_APP": app})),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = shell.wait(TIMEOUT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    assert code == 0, f"{path.read_text()}\n{log.read_text()}"
    return path.read_text()


def _on_the_path(variables: dict[str, str]) -> dict[str, str]:
    """Have `python` and `cqrs-es` be those of this test run."""
    return {**variables, "PATH": f"{Path(sys.executable).parent}:{variables['PATH']}"}


def check(page: str, folder: Path) -> None:
    """Run a page's blocks, one after another, and compare what each prints."""
    every = blocks(page)
    printed = run("".join(block.script for block in every), folder).split(f"{END}\n")
    assert len(printed) == len(every) + 1
    for block, output in zip(every, printed, strict=False):
        block.check(output)
