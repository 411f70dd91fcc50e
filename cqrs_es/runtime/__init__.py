"""Processes: the loops that move commands and events, and who runs which partition."""
