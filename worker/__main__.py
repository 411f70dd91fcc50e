"""`python -m worker`: the bank's command worker, any number of copies."""

from __future__ import annotations

import sys

from cqrs_es.cli.entry import main

if __name__ == "__main__":
    main(["--app", "worker.app:app", "worker", *sys.argv[1:]])
