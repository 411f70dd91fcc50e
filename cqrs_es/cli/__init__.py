"""The command line: each module has the verbs of one subject (CONTRACT §6)."""
