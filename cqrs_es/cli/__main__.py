"""`python -m cqrs_es.cli` is `cqrs-es`."""

from cqrs_es.cli.main import main

if __name__ == "__main__":
    main()
