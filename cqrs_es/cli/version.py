"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Return the version, as `pip` knows it; `unknown` in a tree that is not installed."""
    try:
        return metadata.version("cqrs-es")
    except metadata.PackageNotFoundError:
        return "unknown"
