"""`python -m cqrs_es.cli`: the command line, where `cqrs-es` is not on the path."""

from __future__ import annotations

from cqrs_es.cli.entry import main

if __name__ == "__main__":
    main()
