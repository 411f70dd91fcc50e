"""The broker on RabbitMQ, 3.10 or later: quorum queues for commands, a topic exchange for events.

    broker ─┬─ consuming connection ── bridge (a thread) ─┬─ a channel for each intake
            │                                             ├─ a channel for each feed
            │                                             └─ a channel for each inbox
            └─ publishing connection ─ bridge (a thread) ─── channels with confirms: commands,
                                                             events, replies

A connection that dies takes what was opened on it with it; the next call makes a new one.
"""

from cqrs_es.brokers.amqp.broker import AmqpBroker, connect

__all__ = ["AmqpBroker", "connect"]
