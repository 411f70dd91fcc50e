"""What to do about an error of RabbitMQ: its messages say what happened, seldom what to do."""

from __future__ import annotations

from typing import Final

from amqp.exceptions import (
    AccessRefused,
    NotAllowed,
    NotFound,
    PreconditionFailed,
    ResourceLocked,
)

_ANYTHING_ELSE: Final = "check CQRS_ES_BROKER_URL and the server, then try again"
_GRANT: Final = "give the user that permission: config/rabbitmq-grant has what each role needs"
_VHOST: Final = "create the virtual host (rabbitmqctl add_vhost), or give the user access to it"
_REDECLARE: Final = "another program declared it: delete it when it is empty, then `cqrs-es init`"
_TIMED_OUT: Final = "it is delivered again; is consumer_timeout in rabbitmq.conf too short?"
_TOO_LARGE: Final = "raise max_message_size in rabbitmq.conf, or send less"
# By the error and what is in its text, the first that fits.
_REMEDIES: Final = (
    (NotFound, "", "run `cqrs-es init`, which declares what is missing"),
    (AccessRefused, "Login", "check user and password in CQRS_ES_BROKER_URL"),
    (AccessRefused, "", _GRANT),
    (NotAllowed, "vhost", _VHOST),
    (ResourceLocked, "", "another connection has it for itself: end that program"),
    (PreconditionFailed, "inequivalent", _REDECLARE),
    (PreconditionFailed, "timed out", _TIMED_OUT),
    (PreconditionFailed, "larger than", _TOO_LARGE),
)


def remedy_for(cause: BaseException | None) -> str:
    """Say what to do about an error of the driver."""
    for kind, words, remedy in _REMEDIES:
        if isinstance(cause, kind) and words in str(cause):
            return remedy
    return _ANYTHING_ELSE


def refused_login(cause: BaseException | None) -> bool:
    """Tell a wrong password or virtual host from a limit, or a server that is away."""
    if isinstance(cause, AccessRefused):
        return "Login" in str(cause)
    return isinstance(cause, NotAllowed) and "vhost" in str(cause) and "limit" not in str(cause)
