"""An application as functions of AWS Lambda: nothing runs unless invoked (extra `serverless`)."""

from cqrs_es import errors

try:
    import aiobotocore as _aiobotocore
    import starlette as _starlette
except ModuleNotFoundError as exc:
    message = f"cqrs_es.serverless needs {exc.name}; run: pip install 'cqrs-es[serverless]'"
    raise errors.ConfigurationError(message) from exc
del _aiobotocore, _starlette

from cqrs_es.serverless.handling import Handler, handler  # noqa: E402 - after the check

__all__ = ["Handler", "handler"]
