"""What the Dockerfile makes, made without Docker: its own commands, in folders that stand for `/`.

A stage lives in one folder, always the same one, so that paths inside what is
installed stay right; a finished stage is moved aside. What the base image has
comes from this machine: a shell, its tools, and Python.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING

from tests.bank_data import PROJECT
from tests.servers import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

BUILD_SECONDS = 280.0
SYSTEM_PYTHON = Path("/usr/bin/python3")


@dataclass(slots=True)
class Image:
    """A root folder, and how a container of it is started."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict[str, str])
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list[str])
    health_check: list[str] = field(default_factory=list[str])

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        output: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program as a container would: this environment and user, and no others."""
        user, group = map(int, self.user.split(":")) if os.geteuid() == 0 else (None, None)
        with (output or Path(os.devnull)).open("ab") as sink:
            return subprocess.Popen(
                list(command),
                cwd=self.inside(self.folder),
                env=self.environment | dict(environment),
                user=user,
                group=group,
                extra_groups=None if user is None else [],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=sink,
            )

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a program to its end; return its exit code and what it printed."""
        process = self.start(command, environment)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed.decode()

    def inside(self, path: str) -> Path:
        """Return where a path of the image is on this machine."""
        return self.root / path.lstrip("/")


class Builder:
    """Builds the image of a Dockerfile in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stages: dict[str, Path] = {}
        self._variables: dict[str, str] = {}  # ARG: known while the stage is built
        self._image = Image(folder / "stage")
        self._name = ""

    def build(self) -> Image:
        """Follow every instruction."""
        for instruction, rest in _instructions((PROJECT / "Dockerfile").read_text()):
            getattr(self, f"_{instruction.lower()}")(rest)
        return self._image

    # --- Instructions --------------------------------------------------------

    def _from(self, rest: str) -> None:
        if self._name:
            self._stages[self._name] = self._folder / self._name
            self._image.root.rename(self._stages[self._name])
        self._name = rest.split()[2] if " AS " in rest else "final"
        self._variables = {}
        self._image = Image(self._image.root)
        python = self._image.inside("/usr/local/bin/python")
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {_python()} "$@"\n')
        python.chmod(0o755)
        self._image.environment["PATH"] = f"{python.parent}:/usr/bin:/bin"

    def _workdir(self, rest: str) -> None:
        self._image.folder = rest
        self._image.inside(rest).mkdir(parents=True, exist_ok=True)

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._variables[name] = default

    def _env(self, rest: str) -> None:
        for setting in shlex.split(rest):
            name, _, value = setting.partition("=")
            replaced = Template(self._translated(value)).safe_substitute(self._image.environment)
            self._image.environment[name] = replaced

    def _copy(self, rest: str) -> None:
        words = rest.split()
        origin: Path = PROJECT
        kept: Callable[[Path], bool] = in_context
        if words[0].startswith("--from="):
            origin, kept = self._stages[words.pop(0).removeprefix("--from=")], _everything
        *sources, target = words
        destination = self._image.inside(str(PurePosixPath(self._image.folder, target)))
        for source in sources:
            _copy_tree(origin, origin / source.lstrip("/"), destination, kept)

    def _run(self, rest: str) -> None:
        subprocess.run(
            ["/bin/sh", "-c", self._translated(rest)],
            cwd=self._image.inside(self._image.folder),
            env=_of_pip() | self._image.environment | self._variables,
            check=True,
            timeout=BUILD_SECONDS,
        )

    def _user(self, rest: str) -> None:
        self._image.user = rest

    def _entrypoint(self, rest: str) -> None:
        self._image.entrypoint = json.loads(rest)

    def _healthcheck(self, rest: str) -> None:
        self._image.health_check = json.loads(rest.partition("CMD ")[2])

    def _label(self, rest: str) -> None:
        """Nothing that a process can see."""

    _expose = _cmd = _label

    def _translated(self, text: str) -> str:
        return text.replace("/opt/", f"{self._image.root}/opt/")


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            yield instruction, rest.strip()


# --- Files -------------------------------------------------------------------


def _copy_tree(origin: Path, source: Path, destination: Path, kept: Callable[[Path], bool]) -> None:
    """Copy a file, or what is in a folder, into another folder."""
    inside = source if source.is_dir() else source.parent
    paths = source.rglob("*") if source.is_dir() else [source]
    files = [path for path in paths if _is_file(path) and kept(path.relative_to(origin))]
    assert files, f"COPY {source}: nothing of it is in the build's context"
    for path in files:
        target = destination / path.relative_to(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _everything(_: Path) -> bool:
    return True


def in_context(path: Path) -> bool:
    """Say whether .dockerignore lets a file through."""
    return not _ignored(path)


def _ignored(path: Path) -> bool:
    """Say whether .dockerignore leaves a file out: the last rule that fits decides."""
    ignored = False
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        rule = line.removeprefix("!")
        if line and not line.startswith("#") and _fits(path, rule):
            ignored = not line.startswith("!")
    return ignored


def _fits(path: Path, rule: str) -> bool:
    candidates = [path, *path.parents][:-1]
    if rule.startswith("**/"):
        return any(fnmatch(one.name, rule[3:]) for one in candidates)
    return any(
        len(one.parts) == rule.count("/") + 1 and fnmatch(str(one), rule) for one in candidates
    )


# --- This machine ------------------------------------------------------------


def _python() -> Path:
    """Return a Python that the image's user can run too: one in root's home is none."""
    own = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}").resolve()
    open_to_all = all(parent.stat().st_mode & 0o005 == 0o005 for parent in own.parents)
    if open_to_all or os.geteuid() != 0:
        return own
    if SYSTEM_PYTHON.exists():
        return SYSTEM_PYTHON
    return unavailable(f"{own} can't be run by other users, and there is no {SYSTEM_PYTHON}")


def _of_pip() -> dict[str, str]:
    """Return what tells pip where packages come from on this machine."""
    names = [name for name in os.environ if name.startswith("PIP_") or name.endswith("_proxy")]
    return {"HOME": str(Path.home())} | {name: os.environ[name] for name in names}
