"""Loggers of the framework: structlog is imported when the first line is made.

It takes as long to import as half of the framework, with rich, where that is installed. What
becomes of the lines is for `logs.py` to say.
"""

from __future__ import annotations

import logging
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from structlog.typing import FilteringBoundLogger


def get_logger(name: str) -> FilteringBoundLogger:
    """Return the logger of a name, as `structlog.get_logger` does."""
    return cast("FilteringBoundLogger", _Logger(name))


class _Logger:
    """What structlog makes of a name, once somebody asks something of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _made(self) -> object:
        import structlog  # noqa: PLC0415 - see above

        return structlog.get_logger(self._name)

    def __getattr__(self, what: str) -> Any:
        return getattr(self._made, what)


def put_on_lines(**ids: object) -> None:
    """Have all lines of this task say these ids."""
    import structlog  # noqa: PLC0415 - see above

    structlog.contextvars.bind_contextvars(**ids)


def reads_info(log: FilteringBoundLogger) -> bool:
    """Tell whether lines of information are kept: making one for nobody takes its time too.

    It is asked for each batch, so a logger is put together once for each configuration.
    """
    import structlog  # noqa: PLC0415 - see above

    config, named = structlog.get_config(), cast("Hashable", log)
    bound = _bound(named, config["wrapper_class"], config["logger_factory"])
    enabled: Callable[[FilteringBoundLogger, int], bool] | None = getattr(
        type(bound), "is_enabled_for", None
    )
    if enabled is not None and not enabled(bound, logging.INFO):
        return False
    beneath: object = getattr(bound, "_logger", None)
    return not isinstance(beneath, logging.Logger) or beneath.isEnabledFor(logging.INFO)


@lru_cache(maxsize=16)
def _bound(named: Hashable, *_configured: object) -> FilteringBoundLogger:
    return cast("FilteringBoundLogger", named).bind()
