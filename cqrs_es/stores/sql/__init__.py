"""The SQL store, written once; what differs between databases is a `Dialect` and a `Database`."""
