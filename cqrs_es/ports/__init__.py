"""Contracts of what the framework needs from outside: store, views, broker, clock."""
