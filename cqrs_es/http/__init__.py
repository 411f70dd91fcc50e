"""The HTTP gateway: commands in, outcomes, views and events out (extra `http`)."""

from cqrs_es import errors

try:
    import starlette as _starlette
except ModuleNotFoundError as exc:
    message = "cqrs_es.http needs starlette; run: pip install 'cqrs-es[http]'"
    raise errors.ConfigurationError(message) from exc
del _starlette

from cqrs_es.http.gateway import Gateway  # noqa: E402 - after the check
from cqrs_es.http.requests import Action, Denied, Unknown  # noqa: E402

__all__ = ["Action", "Denied", "Gateway", "Unknown"]
