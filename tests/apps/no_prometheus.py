"""The command line where prometheus-client is not installed."""

from __future__ import annotations

import sys

sys.modules["prometheus_client"] = None  # type: ignore[assignment]  # an import of it then fails

from cqrs_es.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
