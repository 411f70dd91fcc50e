"""What other services use: sending commands, asking for outcomes, following events."""

from cqrs_es.client.asynchronous import Client
from cqrs_es.client.subscription import Cursor, Event, FileCursor, Position, Subscription
from cqrs_es.client.synchronous import SyncClient, SyncSubscription
from cqrs_es.commands import new_command

__all__ = [
    "Client",
    "Cursor",
    "Event",
    "FileCursor",
    "Position",
    "Subscription",
    "SyncClient",
    "SyncSubscription",
    "new_command",
]
