"""What adapters of stores and brokers promise, and how one is found by the scheme of a URL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import msgspec

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class BuiltIn(msgspec.Struct, frozen=True):
    """An adapter of the framework's own: its module, and the extra that installs its driver."""

    module: str
    extra: str | None = None


def connector(kind: str, url: str, built_in: Mapping[str, BuiltIn]) -> Callable[..., Any]:
    """Return the function that makes the adapter for a URL; `kind` is "store" or "broker".

    Other schemes than those of `built_in` are looked for among the entry points of what is
    installed: the group `cqrs_es.stores` or `cqrs_es.brokers`, the scheme as their name.
    Raises `SettingsError` for a scheme that nobody has, `ConfigurationError` where a module
    is missing. Neither shows the URL, which may have a password.
    """
    scheme, separator, _ = url.partition("://")
    known = built_in.get(scheme) if separator else None
    try:
        if known is not None:
            connect: Callable[..., Any] = importlib.import_module(known.module).connect
            return connect
        return _installed(kind, scheme if separator else "", built_in)
    except ModuleNotFoundError as exc:
        what = f"cqrs-es[{known.extra}]" if known else f"what {scheme}:// needs"
        message = f"{exc.name} is not installed; run: pip install '{what}'"
        raise errors.ConfigurationError(message) from exc


def _installed(kind: str, scheme: str, built_in: Mapping[str, BuiltIn]) -> Callable[..., Any]:
    from importlib.metadata import entry_points  # noqa: PLC0415 - reads the disk

    found = entry_points(group=f"cqrs_es.{kind}s")
    for entry in found.select(name=scheme):
        connect: Callable[..., Any] = entry.load()
        return connect
    schemes = ", ".join(f"{name}://" for name in (*built_in, *sorted(found.names)))
    message = f"CQRS_ES_{kind.upper()}_URL must begin with one of {schemes}"
    raise errors.SettingsError(message)
