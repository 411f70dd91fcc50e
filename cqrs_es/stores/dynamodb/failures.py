"""What botocore and the network raise, as errors of ours, by the service's error codes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from botocore import exceptions as botocore_errors

from cqrs_es import errors
from cqrs_es.aws import MISCONFIGURED, REFUSALS

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence


class ConditionFailed(errors.StoreError):
    """An item is not as it was when it was read; read again.

    `failed` has the places, in a transaction's actions, of those that stood in the way.
    """

    def __init__(self, failed: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.failed = tuple(failed)


class Contended(errors.RolledBack):
    """Another transaction is at work on the same items; nothing was written, try again."""


_CONTENDED: Final = {
    "TransactionConflict",
    "TransactionConflictException",
    "TransactionInProgressException",
    "ThrottlingError",
    "ProvisionedThroughputExceeded",
}
_UNAVAILABLE: Final = {
    "InternalServerError",
    "LimitExceededException",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "ThrottlingException",
}
_TOO_LARGE: Final = ("item size", "size limit", "maximum size", "exceeded the maximum", "4 mb")
_SERVER_FAULT: Final = 500


@contextmanager
def mapped_errors() -> Generator[None]:
    """Turn what the client and the network raise into errors of ours."""
    try:
        yield
    except botocore_errors.ClientError as exc:
        raise _error_for(exc) from exc
    except MISCONFIGURED as exc:
        reason = str(exc).rstrip(".")
        message = f"DynamoDB can't be asked: {reason}; check CQRS_ES_STORE_URL and AWS's settings"
        raise errors.SettingsError(message) from exc
    except botocore_errors.BotoCoreError as exc:
        raise errors.StoreUnavailable from exc
    except OSError as exc:  # TimeoutError, the deadline's, is one
        raise errors.StoreUnavailable from exc


def foreign(table: str) -> errors.ForeignTable:
    """Return the error for a table that was not made as ours are."""
    message = f"the table {table} belongs to another program: use another prefix"
    return errors.ForeignTable(f"{message} in CQRS_ES_STORE_URL")


def _error_for(exc: botocore_errors.ClientError) -> errors.CqrsError:
    response: Mapping[str, Any] = exc.response
    code: str = response["Error"].get("Code", "")
    text: str = response["Error"].get("Message", "")
    if code == "TransactionCanceledException":
        return _cancelled(response.get("CancellationReasons", []), text)
    if code == "ConditionalCheckFailedException":
        return ConditionFailed()
    if code in _CONTENDED:
        return Contended()
    if code in REFUSALS:
        where = "check AWS's settings: environment, profile or role"
        return errors.SettingsError(f"DynamoDB refused: {REFUSALS[code]} ({code}); {where}")
    if code == "ResourceNotFoundException":
        return errors.StoreNotInitialised()
    if code in _UNAVAILABLE or _status(response) >= _SERVER_FAULT:
        return errors.StoreUnavailable()
    return _refused(code, text)


def _cancelled(reasons: Sequence[Mapping[str, Any]], text: str) -> errors.CqrsError:
    """Tell why a transaction was cancelled: each of its actions has a reason, or `None`."""
    codes = [reason.get("Code", "None") for reason in reasons]
    failed = [place for place, code in enumerate(codes) if code == "ConditionalCheckFailed"]
    if failed:
        return ConditionFailed(failed)
    if any(code in _CONTENDED for code in codes):
        return Contended()
    for reason in reasons:
        if reason.get("Code", "None") != "None":
            return _refused(str(reason["Code"]), str(reason.get("Message", text)))
    return _refused("TransactionCanceledException", text)


def _refused(code: str, text: str) -> errors.CqrsError:
    if any(words in text.lower() for words in _TOO_LARGE):
        return errors.TooLarge(f"DynamoDB can't take it: {text}")
    return errors.StoreError(f"DynamoDB refused the request: ({code}) {text}")


def _status(response: Mapping[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
