"""The broker on Redis Streams: Redis or Valkey, 7.0 or later, one server or one with replicas."""

from cqrs_es.brokers.redis.broker import RedisBroker, connect

__all__ = ["RedisBroker", "connect"]
