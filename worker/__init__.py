"""The bank's write side: the application and the services it calls."""
