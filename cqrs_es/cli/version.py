"""The version of the installed distribution."""

from __future__ import annotations


def version() -> str:
    """Return the version, as `pip` knows it; `unknown` in a tree that is not installed."""
    from importlib import metadata  # a sixth of what --help takes

    try:
        return metadata.version("cqrs-es")
    except metadata.PackageNotFoundError:
        return "unknown"
