"""What an operator sets: environment variables with the prefix `CQRS_ES_`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeAlias, cast, get_args
from urllib.parse import urlsplit

from cqrs_es import errors
from cqrs_es.types import MOST_PARTITIONS, NAME
from cqrs_es.wire import MAX_MESSAGE_BYTES

PREFIX: Final = "CQRS_ES_"
# Settings of the test suite and of tools, which share the prefix.
FOREIGN_PREFIXES: Final = ("CQRS_ES_TEST_",)
DEFAULT_PARTITIONS: Final = 16
LogFormat: TypeAlias = Literal["auto", "console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
# Up to the last @, so that no part of an unusual password is left.
_PASSWORD: Final = re.compile(r"(?<=://)([^/:@]*):.*@")
_ADDRESS: Final = re.compile(
    r"(?:(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):)?(?P<port>[0-9]{1,5})"
)
MOST_PORT: Final = 65_535
_EMBEDDED_SCHEMES: Final = {"sqlite", "memory"}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """The framework's settings; times in seconds unless the name says otherwise.

    `Settings(…)` is what it is given and defaults, `from_environment` what an operator sets.
    `partitions` and `service` are None when not set: the store's scheme and the
    application then decide.
    """

    app: str | None = None
    store_url: str | None = None
    broker_url: str = "memory://"
    service: str | None = None
    partitions: int | None = None
    batch_size: int = 500
    cache_bytes: int = 64 * 1024 * 1024
    handler_timeout: float = 30.0
    lease_seconds: float = 10.0
    outcome_retention_days: float = 30.0
    event_retention: int = 1_000_000
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_event_bytes: int = 1024 * 1024
    shutdown_timeout: float = 30.0
    health_port: str | None = None
    wait_for_views: bool | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    remote_urls: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """The brokers' URLs of other services, by the variables that `app.remote` names."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read and check the settings; raise `SettingsError` naming the variable.

        `CQRS_ES_<NAME>_FILE` reads a value from a file. Unknown names with the
        prefix are refused: a misspelt setting must not do nothing.
        """
        given = _given(os.environ if environment is None else environment)
        remote_urls = {
            _variable(name): _parsed_as(name, _url, text)
            for name, text in given.items()
            if name not in _PARSERS and name.endswith("_url")
        }
        for name in given:
            if name not in _PARSERS and _variable(name) not in remote_urls:
                raise errors.SettingsError(_no_setting(_variable(name)))
        own = {
            name: _parsed_as(name, _PARSERS[name], text)
            for name, text in given.items()
            if name in _PARSERS
        }
        return cls(**own, remote_urls=remote_urls)

    def check_remotes(self, variables: Collection[str]) -> None:
        """Raise `SettingsError` for a URL that is of no remote: a misspelt one must not do nothing.

        `variables` are those that remotes name.
        """
        for variable in self.remote_urls:
            if variable not in variables:
                raise errors.SettingsError(_no_setting(variable, variables))

    def __repr__(self) -> str:
        """Show what is set, passwords masked."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = (f"{name}={shown_setting(name, value)!r}" for name, value in given.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def embedded(self) -> bool:
        """Whether the store lives inside the process: SQLite or memory."""
        return urlsplit(self.store_url or "sqlite:").scheme in _EMBEDDED_SCHEMES

    @property
    def health_address(self) -> tuple[str, int] | None:
        """Where to serve probes, as host and port; None for nowhere."""
        return None if self.health_port is None else _split_address(self.health_port)

    def url_of_store(self, service: str) -> str:
        """Return the store's URL; raise `SettingsError` where one in the environment is ignored."""
        variables = {f"{PREFIX}STORE_URL", f"{PREFIX}STORE_URL_FILE"}
        if self.store_url is None and variables & os.environ.keys():
            raise errors.SettingsError(
                f"Settings(…) without store_url ignores {PREFIX}STORE_URL, which is set: give "
                "store_url, or use Settings.from_environment()"
            )
        return self.store_url or f"sqlite:///{service}.db"

    def partitions_or_default(self) -> int:
        """Return how many partitions `init` gives a new store: 16; SQLite and memory 1."""
        return self.partitions or (1 if self.embedded else DEFAULT_PARTITIONS)


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in an environment by field name, files read."""
    given: dict[str, str] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable.startswith(FOREIGN_PREFIXES):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name.endswith("_file"):
            name, text = name.removesuffix("_file"), _read(variable, value)
        else:
            text = value
        if name in given:
            message = f"{PREFIX}{name.upper()} is set twice, once by a file; unset one"
            raise errors.SettingsError(message)
        given[name] = text
    return given


def _read(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        message = f"{variable}: the file {path!r} can't be read: {exc}"
        raise errors.SettingsError(message) from exc


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _no_setting(variable: str, others: Collection[str] = ()) -> str:
    known = ", ".join([*map(_variable, sorted(_PARSERS)), *sorted(others)])
    return f"{variable} is no setting; there are {known}"


def _parsed_as(name: str, parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as exc:
        message = f"{_variable(name)}: {exc}"
        raise errors.SettingsError(message) from exc


def _text(text: str) -> str:
    if not text:
        message = "must not be empty; unset it for the default"
        raise ValueError(message)
    return text


def _url(text: str) -> str:
    """Check that a URL can be taken apart; what is wrong with it may be in its password."""
    _text(text)
    with contextlib.suppress(ValueError):
        urlsplit(text)
        return text
    message = "is no URL; percent-encode the special characters of its password"
    raise ValueError(message)


def _service(text: str) -> str:
    if not NAME.fullmatch(text):
        message = f"must match {NAME.pattern}, not {text!r}"
        raise ValueError(message)
    return text


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            message = f"must be a whole number from {least} to {most}, not {text!r}"
            raise ValueError(message)
        return int(text)

    return parse


def _number(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        valid = re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text)
        if not valid or not least <= float(text) <= most:
            message = f"must be a number from {least:g} to {most:g}, not {text!r}"
            raise ValueError(message)
        return float(text)

    return parse


def address(text: str) -> str:
    """Check `[HOST:]PORT`; return it, or raise `ValueError`."""
    _split_address(text)
    return text


def _split_address(text: str) -> tuple[str, int]:
    """Return host and port; without a host, all interfaces: probes come from elsewhere."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > MOST_PORT:
        message = f"must be PORT or HOST:PORT, 127.0.0.1:8000 say, not {text!r}"
        raise ValueError(message)
    return (match["host"] or "0.0.0.0").strip("[]"), int(match["port"])  # noqa: S104 - asked for


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            message = f"must be one of {', '.join(choices)}, not {text!r}"
            raise ValueError(message)
        return text.lower()

    return parse


def _yes_or_no(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        message = f"must be true or false, not {text!r}"
        raise ValueError(message)
    return text.lower() == "true"


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "app": _text,
    "store_url": _url,
    "broker_url": _url,
    "service": _service,
    "partitions": _whole(1, MOST_PARTITIONS),
    "batch_size": _whole(1, 10_000),
    "cache_bytes": _whole(0, 10**12),
    "handler_timeout": _number(0.01, 86_400),
    "lease_seconds": _number(1, 3600),
    "outcome_retention_days": _number(0.001, 36_500),
    "event_retention": _whole(1, 10**12),
    "max_message_bytes": _whole(1024, 64 * 1024 * 1024),
    "max_event_bytes": _whole(1024, 64 * 1024 * 1024),
    "shutdown_timeout": _number(0.1, 3600),
    "health_port": address,
    "wait_for_views": _yes_or_no,
    "log_level": _one_of(get_args(LogLevel)),
    "log_format": _one_of(get_args(LogFormat)),
}


def shown_setting(name: str, value: object) -> object:
    """Return a setting's value as it may be shown: a URL without its password."""
    if isinstance(value, Mapping):
        urls = cast("Mapping[str, str]", value)
        return {variable: masked(url) for variable, url in urls.items()}
    return masked(value) if name.endswith("_url") and isinstance(value, str) else value


def masked(url: str) -> str:
    """Return a URL fit for logs: its password and query replaced by stars."""
    address, question, _ = _PASSWORD.sub(r"\1:***@", url).partition("?")
    return f"{address}?***" if question else address
