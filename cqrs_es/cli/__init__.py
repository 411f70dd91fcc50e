"""The command line: each module has the verbs of one subject (docs/contract.md, Command line)."""
