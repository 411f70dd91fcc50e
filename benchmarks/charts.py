"""A chart of what was measured: `python -m benchmarks.charts FOUND.json CHART.svg [SETTING …]`.

For each setting two groups of bars, by the wall's clock and of CPU: the median of a contender's
rounds, and a line from the least to the most. Groups have scales of their own.
"""

from __future__ import annotations

import json
import statistics
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measuring import OURS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LEFT: Final = 120  # where bars begin: names are before it
WIDTH: Final = 210  # of the longest line
GROUP: Final = 390  # from one group of bars to the next
ROW: Final = 22
COLOURS: Final = {"wall": "#4878a8", "cpu": "#c8803c"}
CLOCKS: Final = {"wall": "by the wall's clock", "cpu": "of CPU"}


def chart(found: Mapping[str, Any], settings: Sequence[str] = ()) -> str:
    """Return the SVG of a benchmark's JSON, of some of its settings or all."""
    chosen = {name: found["microseconds"][name] for name in settings or found["microseconds"]}
    parts: list[str] = []
    top = 0
    for setting, contenders in chosen.items():
        for column, clock in enumerate(CLOCKS):
            title = f"{found['question']}: {setting}, µs a command {CLOCKS[clock]}"
            parts.append(_text(column * GROUP + 8, top + 18, title, "bold"))
            rounds = {name: it[clock] for name, it in contenders.items()}
            parts += _bars(rounds, column * GROUP, top + 28, COLOURS[clock])
        top += 42 + ROW * len(contenders)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * GROUP}" height="{top}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _bars(rounds: Mapping[str, Sequence[float]], left: int, top: int, colour: str) -> Iterator[str]:
    most = max(max(each) for each in rounds.values()) or 1.0
    for place, (name, each) in enumerate(sorted(rounds.items(), key=_ours_first)):
        y, middle = top + place * ROW, statistics.median(each)
        length, least, longest = (WIDTH * it / most for it in (middle, min(each), max(each)))
        begin = left + LEFT
        yield _text(left + 8, y + 13, name)
        yield (
            f'<rect x="{begin}" y="{y + 2}" width="{length:.1f}" height="15" fill="{colour}"/>'
            f'<path d="M{begin + least:.1f} {y + 9.5}H{begin + longest:.1f}" stroke="black"/>'
            f"{_text(begin + max(length, longest) + 4, y + 13, f'{middle:,.0f}')}"
        )


def _ours_first(contender: tuple[str, Any]) -> bool:
    return contender[0] != OURS


def _text(x: float, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'


def main() -> None:
    source, target, *settings = sys.argv[1:]
    Path(target).write_text(chart(json.loads(Path(source).read_text()), settings))


if __name__ == "__main__":
    main()
