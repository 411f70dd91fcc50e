"""Policies of an operator that act on our queues, and what they would cost.

No answer of AMQP shows a policy. The management API does: by default it is
10,000 above the port of AMQP, and open to users with the tag `management`.
"""

from __future__ import annotations

import base64
import http.client
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cqrs_es.brokers.amqp.address import Address
    from cqrs_es.brokers.amqp.topology import Names

PORTS_ABOVE: Final = 10_000
ANSWER_SECONDS: Final = 3.0
REALM: Final = "RabbitMQ Management"
COLUMNS: Final = "name,policy,operator_policy,effective_policy_definition"
# The lesser of a policy's value and ours is in force, so that ours can't protect us.
COSTS: Final[Mapping[str, str]] = {
    "message-ttl": "commands that wait longer are lost",
    "expires": "a queue that nobody consumes for so long is deleted with what is in it",
    "max-length": "senders are refused beyond it, and dead commands lost",
    "max-length-bytes": "senders are refused beyond it, and dead commands lost",
    "delivery-limit": "commands that were near a process's death so often are given up",
}


class PoliciesUnseen(errors.CqrsError):
    """The server does not say which policies act on our queues."""


@dataclass(frozen=True, slots=True)
class Acting:
    """What a policy does to some of our queues, of which there is one at least."""

    policies: str
    key: str
    value: int
    queues: list[str]

    def __str__(self) -> str:
        """Say what it costs, and what to do about it."""
        others = f" and {len(self.queues) - 1} more" if len(self.queues) > 1 else ""
        return (
            f"RabbitMQ's policy {self.policies} puts {self.key} {self.value} on"
            f" {self.queues[0]}{others}: {COSTS[self.key]}; narrow its pattern, or give these"
            " queues a policy of a higher priority without it"
        )


def find_acting(address: Address, names: Names) -> list[Acting]:
    """Ask the server, within seconds, in this thread; raises `PoliciesUnseen`."""
    rows = _ask(address)
    ours = [row for row in rows if str(row["name"]).startswith(f"{names.commands}.")]
    if not all("effective_policy_definition" in row for row in ours):
        message = "RabbitMQ has no figures of these queues yet; ask again in some seconds"
        raise PoliciesUnseen(message)
    return _grouped(ours)


def _grouped(rows: Iterable[Mapping[str, Any]]) -> list[Acting]:
    found: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        in_force: Mapping[str, int] = row["effective_policy_definition"] or {}  # [] for nothing
        named: list[str] = [row[kind] for kind in ("policy", "operator_policy") if row.get(kind)]
        for key in COSTS:
            if key in in_force:
                place = (" and ".join(named), key, in_force[key])
                found.setdefault(place, []).append(str(row["name"]))
    return [Acting(*place, sorted(queues)) for place, queues in found.items()]


def _ask(address: Address) -> list[dict[str, Any]]:
    where = f"{address.host}, port {address.port + PORTS_ABOVE},"
    path = f"/api/queues/{quote(address.virtual_host, safe='')}?columns={COLUMNS}"
    credentials = base64.b64encode(f"{address.user}:{address.password}".encode()).decode()
    try:
        connection = _connection(address)
        try:
            # The password is for RabbitMQ only, whoever else may listen there.
            status, challenge, _ = _get(connection, path, {})
            if status != http.HTTPStatus.UNAUTHORIZED or REALM not in challenge:
                message = f"at {where} is no management API of RabbitMQ"
                raise PoliciesUnseen(message)
            headers = {"Authorization": f"Basic {credentials}"}
            status, _, body = _get(connection, path, headers)
        finally:
            connection.close()
    except (OSError, OverflowError, http.client.HTTPException, ValueError) as exc:
        message = f"the management API at {where} does not answer ({exc})"
        raise PoliciesUnseen(message) from exc
    if status != http.HTTPStatus.OK:
        message = f"the user has no tag `management` (the API at {where} says {status})"
        raise PoliciesUnseen(message)
    rows: list[dict[str, Any]] = orjson.loads(body)
    return rows


def _connection(address: Address) -> http.client.HTTPConnection:
    port = address.port + PORTS_ABOVE
    if address.tls is None:
        return http.client.HTTPConnection(address.host, port, timeout=ANSWER_SECONDS)
    context = ssl.create_default_context(cafile=address.tls.get("ca_certs"))
    if "certfile" in address.tls:
        context.load_cert_chain(address.tls["certfile"], address.tls.get("keyfile"))
    return http.client.HTTPSConnection(address.host, port, timeout=ANSWER_SECONDS, context=context)


def _get(
    connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
) -> tuple[int, str, bytes]:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.getheader("WWW-Authenticate") or "", response.read()
