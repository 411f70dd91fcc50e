"""What an IBAN is [ISO 13616]: a country, two check digits, and the country's own number."""

from __future__ import annotations

import re
from typing import Final

_FORM: Final = re.compile(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}", re.ASCII)


def normalised_iban(iban: str) -> str:
    """Return an IBAN as it is stored: capitals without spaces; raise `ValueError` for no IBAN."""
    written = iban.replace(" ", "").upper()
    if not _FORM.fullmatch(written):
        message = "iban: must be a country, two digits and 11 to 30 letters and digits"
        raise ValueError(message)
    digits = "".join(str(int(letter, 36)) for letter in written[4:] + written[:4])
    if int(digits) % 97 != 1:
        message = "iban: its check digits are wrong; look for a digit that was mistyped"
        raise ValueError(message)
    return written
