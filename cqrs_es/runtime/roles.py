"""The roles that a process can have: what partitions are leased for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import Collection

    from cqrs_es.registry import Registry

WORKER: Final = "worker"
RELAY: Final = "relay"


def projector_role(name: str) -> str:
    """Return the role of the projector of a view."""
    return f"projector:{name}"


def known_roles(registry: Registry) -> frozenset[str]:
    """Return every role that a process of an application can have."""
    projectors = (projector_role(name) for name in registry.projections)
    return frozenset({WORKER, RELAY, *projectors})


def check_roles(roles: Collection[str], registry: Registry) -> None:
    """Raise `ConfigurationError` for a role that an application does not have."""
    known = known_roles(registry)
    for role in roles:
        if role not in known:
            message = f"there is no role {role!r}; there are {', '.join(sorted(known))}"
            raise errors.ConfigurationError(message)
