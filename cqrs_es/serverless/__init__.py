"""An application as functions of AWS Lambda: nothing runs unless invoked (extra `serverless`)."""

import sys

from cqrs_es import errors
from cqrs_es.serverless.collecting import uncollected

with uncollected():
    if "structlog" not in sys.modules and "rich" not in sys.modules:
        # It would load rich, for tracebacks on a terminal: a quarter of what a cold start imports.
        sys.modules["rich"] = None  # type: ignore[assignment]
        import structlog as _structlog

        del sys.modules["rich"], _structlog

    try:
        import aiobotocore as _aiobotocore
        import starlette as _starlette
    except ModuleNotFoundError as exc:
        message = f"cqrs_es.serverless needs {exc.name}; run: pip install 'cqrs-es[serverless]'"
        raise errors.ConfigurationError(message) from exc
    del _aiobotocore, _starlette

    from cqrs_es.serverless.handling import Handler, handler

__all__ = ["Handler", "handler"]
