"""Clients of AWS's services, for the adapters that need one: alike in time-outs and retries."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import exceptions as botocore_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 10.0
CALL_SECONDS: Final = 30.0
"""For a request with the client's own retries, which are for throttling and lost connections."""
CALL_TRIES: Final = 3
CONNECTIONS: Final = 50

REFUSALS: Final[Mapping[str, str]] = {
    "AccessDenied": "the credentials do not allow this",
    "AccessDeniedException": "the credentials do not allow this",
    "AuthorizationError": "the credentials do not allow this",
    "ExpiredToken": "the credentials have expired",
    "ExpiredTokenException": "the credentials have expired",
    "IncompleteSignature": "the credentials are incomplete",
    "InvalidClientTokenId": "the credentials are not known",
    "InvalidSecurity": "the credentials are not known",
    "InvalidSignatureException": "the secret key is wrong",
    "MissingAuthenticationTokenException": "there are no credentials",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "UnrecognizedClientException": "the credentials are not known",
}
"""What is wrong with settings, by the error code with which a service says so."""
MISCONFIGURED: Final = (
    botocore_errors.NoCredentialsError,
    botocore_errors.PartialCredentialsError,
    botocore_errors.CredentialRetrievalError,
    botocore_errors.TokenRetrievalError,
    botocore_errors.ProfileNotFound,
    botocore_errors.InvalidRegionError,
    botocore_errors.NoRegionError,
    ValueError,  # no endpoint at all
)
"""What botocore raises before it asks anybody."""

_REGION: Final = re.compile(r"[a-z0-9-]{1,40}")
_ENDPOINT: Final = re.compile(r"https?://[^\s/?#@]+/?")


class Place(NamedTuple):
    """Where things of a service are, what their names begin with, and who answers if not AWS."""

    region: str
    prefix: str
    endpoint: str | None


def place_of(url: str, prefix: re.Pattern[str]) -> Place:
    """Read `scheme://region/prefix?endpoint=…`; raise `ValueError` for any other URL."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    place = Place(parts.netloc, parts.path.removeprefix("/"), options.pop("endpoint", None))
    fits = _REGION.fullmatch(place.region) and prefix.fullmatch(place.prefix) and not options
    if not fits or (place.endpoint is not None and not _ENDPOINT.fullmatch(place.endpoint)):
        raise ValueError(url)
    return place


def client_for(service: str, region: str, endpoint: str | None) -> Any:
    """Make a client, as a context manager; credentials come from where AWS programs look."""
    session: Any = AioSession()
    session.register_component("data_loader", _service_models())
    config = AioConfig(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": CALL_TRIES},
    )
    return session.create_client(service, region_name=region, endpoint_url=endpoint, config=config)


@functools.cache
def _service_models() -> Any:
    """Read the descriptions of AWS's services once: that takes a quarter of a second."""
    session: Any = AioSession()
    return session.get_component("data_loader")
