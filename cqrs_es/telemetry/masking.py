"""Removing what must not be printed: passwords, and control characters of terminals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, cast

# In a URL, all up to the last @: no part of an unusual password is left.
_CREDENTIALS: Final = re.compile(r"(?<=://)([^\s/:@]*):\S*@")
_IN_QUERY: Final = re.compile(r"(?i)([?&][^=&\s]*(?:pass|pw|secret|token|key)[^=&\s]*=)[^&\s'\"]*")
_MOST_IN_JSON: Final = 2**63


def mask_credentials(text: str) -> str:
    """Replace the passwords of the URLs in a text by stars."""
    if "://" not in text:
        return text
    return _IN_QUERY.sub(r"\1***", _CREDENTIALS.sub(r"\1:***@", text))


def masked_value(value: Any) -> Any:
    """Mask every text within a value; what is no JSON is shown by its repr."""
    match value:
        case str():
            return mask_credentials(value)
        case None | bool() | float():
            return value
        case int() if -_MOST_IN_JSON <= value < _MOST_IN_JSON:
            return value
        case Mapping():
            items = cast("Mapping[object, object]", value).items()
            return {str(name): masked_value(item) for name, item in items}
        case list() | tuple() | set() | frozenset():
            return [masked_value(item) for item in cast("list[Any]", value)]
        case _:
            return mask_credentials(repr(value))


def printable(text: str) -> str:
    r"""Replace control characters of terminals, such as an escape, by their codes: `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
