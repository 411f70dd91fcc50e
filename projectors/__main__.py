"""`python -m projectors [--only NAME]`: the bank's projectors, any number of copies."""

from __future__ import annotations

import sys

from cqrs_es.cli.entry import main

if __name__ == "__main__":
    main(["--app", "worker.app:app", "projector", *sys.argv[1:]])
